"""Writes the checkpoints that tests/import.rs reads, and the logits that PyTorch gets from them.

    python3 -m venv venv && venv/bin/pip install torch==2.11.0 torchvision==0.26.0 timm==1.0.31 safetensors
    venv/bin/python make_import.py

The networks are those of torchvision and timm, narrow (width 0.1, 10 classes) with random weights, and running
statistics that fit them. The three files are of the kinds that are met:

* torchvision_v2.pth: a state dict, as torchvision publishes it;
* timm_v2.safetensors: timm's names, in half precision;
* timm_v1.pth.tar: a checkpoint of a training run, the state dict among other things, its names prefixed.

expected.safetensors has the images (NHWC, 64 × 64) and the logits of each, computed in float64.

In torchvision_v2.pth some filters are planted that give next to a constant (`PLANTED`).
"""

import argparse
import collections
import pathlib

import timm
import timm.models.efficientnet
import torch
import torchvision
from safetensors.torch import save_file

assert torch.__version__.split("+")[0] == "2.11.0", torch.__version__
assert torchvision.__version__.split("+")[0] == "0.26.0", torchvision.__version__
assert timm.__version__ == "1.0.31", timm.__version__
torch.set_num_threads(1)

HERE = pathlib.Path(__file__).parent
WIDTH, CLASSES, IMAGES, SIDE = 0.1, 10, 2, 64

# convolution, its normalization, filter, shift β. A constant that goes through a depthwise layer is
# zero (β < 0), because zero padding makes other constants inexact at the border.
PLANTED = [
    ("features.3.conv.1.0", "features.3.conv.1.1", 5, 0.8),  # depthwise
    ("features.6.conv.0.0", "features.6.conv.0.1", 2, -0.5),  # expansion
    # All producers that the shortcuts add:
    ("features.4.conv.2", "features.4.conv.3", 3, 0.4),
    ("features.5.conv.2", "features.5.conv.3", 3, -0.2),
    ("features.6.conv.2", "features.6.conv.3", 3, 0.3),
    # and a single producer, which has to stay.
    ("features.12.conv.2", "features.12.conv.3", 7, 0.6),
    ("features.18.0", "features.18.1", 1000, 1.1),  # in front of the classifier
]


def norms(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def prepare(model, seed, planted=(), dtype=torch.float32):
    """Random parameters of `dtype`'s precision, and running statistics to match, measured on random images."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like, low, high):
        like.data = torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low

    model.double()
    for m in model.modules():
        if isinstance(m, torch.nn.Conv2d):
            fan = m.weight[0].numel()
            m.weight.data = torch.randn(m.weight.shape, generator=generator, dtype=torch.float64) * (2 / fan) ** 0.5
        elif isinstance(m, torch.nn.Linear):
            uniform(m.weight, -0.1, 0.1)
            uniform(m.bias, -0.5, 0.5)
    for norm in norms(model):
        uniform(norm.weight, 0.5, 1.5)
        uniform(norm.bias, -0.3, 0.8)
    modules = dict(model.named_modules())
    for convolution, norm, index, shift in planted:
        # The weights are not zero: such filters of trained networks have weights of about this
        # size.
        modules[convolution].weight.data[index] *= 1e-8
        modules[norm].bias.data[index] = shift
    for norm in norms(model):
        norm.momentum = None  # the average of all batches
        norm.reset_running_stats()
    model.train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(16, 3, SIDE, SIDE, generator=generator, dtype=torch.float64))
    # The logits are computed from the values in the file.
    model.to(dtype).double()
    return model.eval()


def state(model, dtype):
    """The state dict as it is published: floats in `dtype`, the counts of batches as they are."""
    result = model.state_dict()
    for name, tensor in result.items():
        if tensor.is_floating_point():
            result[name] = tensor.to(dtype).contiguous()
    return result


def main():
    images = torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).double()
    expected = {"images": images.permute(0, 2, 3, 1).float().contiguous()}

    def write(name, model):
        with torch.no_grad():
            logits = model(images)
        print(f"{name}: logits from {logits.min():.3f} to {logits.max():.3f}")
        expected[name] = logits.float()

    v2 = torchvision.models.MobileNetV2(num_classes=CLASSES, width_mult=WIDTH)
    prepare(v2, 2, PLANTED)
    for _, norm, index, _ in PLANTED:
        print(f"  planted {norm} {index}: V = {dict(v2.named_modules())[norm].running_var[index]:.1e}")
    torch.save(state(v2, torch.float32), HERE / "torchvision_v2.pth")
    write("torchvision_v2", v2)

    v2 = timm.models.efficientnet._gen_mobilenet_v2("mobilenetv2_100", WIDTH, num_classes=CLASSES)
    prepare(v2, 3, dtype=torch.float16)
    save_file(dict(state(v2, torch.float16)), HERE / "timm_v2.safetensors", metadata={"format": "pt"})
    write("timm_v2", v2)

    v1 = timm.models.efficientnet._gen_mobilenet_v1("mobilenetv1_100", WIDTH, num_classes=CLASSES)
    optimizer = torch.optim.SGD(v1.parameters(), lr=0.1, momentum=0.9)
    prepare(v1, 4)
    prefixed = collections.OrderedDict((f"module.{k}", v) for k, v in state(v1, torch.float32).items())
    checkpoint = {
        "epoch": 12,
        "arch": "mobilenetv1_100",
        "state_dict": prefixed,
        "optimizer": optimizer.state_dict(),
        "version": 2,
        "args": argparse.Namespace(lr=0.1, model="mobilenetv1_100", pretrained=False, mean=None, crop=0.875),
        "metric": 71.5,
    }
    torch.save(checkpoint, HERE / "timm_v1.pth.tar")
    write("timm_v1", v1)

    save_file(expected, HERE / "expected.safetensors")


main()
