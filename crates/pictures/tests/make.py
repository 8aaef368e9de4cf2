#!/usr/bin/env python3
"""Writes the files next to this script: pictures in odd forms, and what PIL makes of them.

`<name>.jpg` are JPEGs whose colours or coding are unusual; `<name>.rgb` holds what `convert("RGB")` gives, 24 rows of 32
pixels of three bytes. `scaled.txt` has a line for each of several crops and sizes of `source.rgb` (48 rows of 64 pixels): left,
top, width and height of the crop, width and height of the result, and its bytes in hexadecimal digits.

Needs Pillow (made with 13.0.0) and NumPy. The files are checked in; run this only to change them.
"""

import io
import pathlib

import numpy as np
from PIL import Image

HERE = pathlib.Path(__file__).parent


def scene(height, width):
    """A smooth picture with an edge, so that neither coding nor scaling is trivial."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    red = 40 + 180 * x
    green = 200 - 150 * y
    blue = 128 + 100 * np.sin(7 * x + 3 * y)
    picture = np.stack([red, green, blue], axis=-1)
    picture[(x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.04] = [230, 60, 40]
    return picture.clip(0, 255).astype(np.uint8)


def jpeg(image, **options):
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, **options)
    return bytearray(out.getvalue())


def write(name, data):
    (HERE / f"{name}.jpg").write_bytes(data)
    picture = Image.open(io.BytesIO(data))
    picture.load()
    (HERE / f"{name}.rgb").write_bytes(np.asarray(picture.convert("RGB")).tobytes())
    print(name, picture.mode, len(data), "bytes")


rgb = scene(24, 32)
image = Image.fromarray(rgb)
write("grey", jpeg(image.convert("L")))
write("progressive", jpeg(image, progressive=True))

# Orientation 6 in EXIF: viewers would turn the picture, PIL and torchvision do not.
exif = Image.Exif()
exif[0x0112] = 6
write("turned", jpeg(image, exif=exif))

# Inks, with some of every colour put into black.
black = 255 - rgb.max(axis=-1, keepdims=True)
black = (black * 0.7).astype(np.uint8)
share = (255.0 - black).clip(1)
inks = np.concatenate([(255.0 * (share - rgb).clip(0) / share).astype(np.uint8), black], axis=-1)
write("cmyk", jpeg(Image.fromarray(inks, "CMYK")))

# PIL writes no YCCK. Converted by hand: in the place of the first three inks stand the luminance and chrominances
# of them, which PIL's writing must not invert, and the byte at the end of Adobe's segment says so.
ycc = np.asarray(Image.fromarray(inks[..., :3]).convert("YCbCr"))
data = jpeg(Image.fromarray(np.concatenate([255 - ycc, inks[..., 3:]], axis=-1), "CMYK"))
at = data.index(b"Adobe")
assert data[at + 11] == 0
data[at + 11] = 2
write("ycck", data)

source = scene(48, 64)
(HERE / "source.rgb").write_bytes(source.tobytes())
lines = []
for box in [(0, 0, 64, 48), (5, 3, 40, 41), (10, 20, 7, 5), (63, 47, 1, 1)]:
    for size in [(24, 24), (80, 10), (9, 31)]:
        left, top, width, height = box
        crop = Image.fromarray(source).crop((left, top, left + width, top + height))
        scaled = crop.resize(size, Image.Resampling.BILINEAR)
        lines.append(" ".join(map(str, box + size)) + " " + np.asarray(scaled).tobytes().hex())
(HERE / "scaled.txt").write_text("\n".join(lines) + "\n")
