//! Normalized batches of varied images from a data set that is in the device's memory.
//!
//! Image `index[b]` is padded with `pad` black pixels on every side. From the padded image a window
//! of the original size is cut out, whose first row and column are `corners[b]`. If `flip[b]` is
//! not 0, the window is mirrored left to right: `y[b, h, w, c] = (p/255 − mean[c]) / std[c]`, where
//! `p` is the pixel (0 in the padding) at row `h + corners[b, 0] − pad` and column
//! `w' + corners[b, 1] − pad`, and `w'` is `W − 1 − w` if mirrored and `w` if not. If `pad` and the
//! corners are 0, the window is the image itself.

mod gpu;

use crate::check::Check;
use crate::cpu::{self, open};
use crate::elements::{Element, by_element};
use crate::work::fill;
use crate::{Result, profiler};
use candle_core::{DType, Tensor};

/// How the images of a batch are made from those of the data set.
#[derive(Clone, Copy, Debug)]
pub struct Views<'a> {
    /// The image of the data set, `u32` `[B]`.
    pub index: &'a Tensor,
    /// The first row and column of the window in the padded image, `u32` `[B, 2]`, each
    /// `0 … 2·pad`.
    pub corners: &'a Tensor,
    /// Whether the window is mirrored, `u8` `[B]`.
    pub flip: &'a Tensor,
    /// The number of black pixels on every side.
    pub pad: usize,
}

/// Returns the batch `[B, H, W, C]` of `images: u8 [N, H, W, C]`, in `dtype` (`F32` or `BF16`).
///
/// It is normalized with `mean` and `std`, `f32` `[C]`. All tensors must be on one device.
///
/// # Errors
/// Returns an error for wrong shapes and dtypes and, on the CPU, for an index or a corner outside
/// its range. On a GPU, where nothing waits for the results of a kernel, an index outside the data
/// set gives NaN, and a corner outside its range gives black pixels.
pub fn batch(images: &Tensor, views: Views<'_>, mean: &Tensor, std: &Tensor, dtype: DType) -> Result<Tensor> {
    let check = Check("augment::batch");
    let (count, h, w, c) = check.map("images", images.dims())?;
    let images = check.dtype("images", images, DType::U8)?;
    let b = views.index.elem_count();
    let index = check.of("index", views.index, &[b], DType::U32)?;
    let corners = check.of("corners", views.corners, &[b, 2], DType::U32)?;
    let flip = check.of("flip", views.flip, &[b], DType::U8)?;
    let (mean, std) = (check.dims("mean", mean, &[c])?, check.dims("std", std, &[c])?);
    let _note = profiler::note(check.0, 0, b * h * w * c * (1 + dtype.size_in_bytes()));
    if crate::gpu::runs(images.device()) {
        return gpu::batch(&images, [&index, &corners, &flip], views.pad, [&mean, &std], dtype);
    }
    let (mean, std) = (cpu::values(&mean)?, cpu::values(&std)?);
    let (index, corners) = (index.to_vec1::<u32>()?, corners.to_vec2::<u32>()?);
    let flip = flip.to_vec1::<u8>()?;
    if let Some(i) = index.iter().find(|i| **i as usize >= count) {
        return Err(check.setting(format!("image {i} of {count}")));
    }
    if let Some(corner) = corners.iter().flatten().find(|corner| **corner as usize > 2 * views.pad) {
        return Err(check.setting(format!("a window at {corner} with {} pixels of padding", views.pad)));
    }
    by_element!(dtype, T => {
        // The normalized value of every byte.
        let value = |i: usize| T::nearest(((i / c) as f32 / 255.0 - mean[i % c]) / std[i % c]);
        let values: Vec<T> = (0..256 * c).map(value).collect();
        let opened = open(&images);
        let (images, pad) = (opened.elements::<u8>()?, views.pad);
        let y = fill(b * h * w * c, h * w * c, |range, y| {
            let b = range.start / (h * w * c);
            let image = &images[index[b] as usize * h * w * c..][..h * w * c];
            let (top, left) = (corners[b][0] as usize, corners[b][1] as usize);
            for (row, y) in y.chunks_exact_mut(w * c).enumerate() {
                let row = (row + top).checked_sub(pad).filter(|row| *row < h);
                for (at, y) in y.chunks_exact_mut(c).enumerate() {
                    let at = if flip[b] != 0 { w - 1 - at } else { at };
                    let column = (at + left).checked_sub(pad).filter(|column| *column < w);
                    for (channel, y) in y.iter_mut().enumerate() {
                        let pixel = match (row, column) {
                            (Some(row), Some(column)) => image[(row * w + column) * c + channel],
                            _ => 0,
                        };
                        *y = values[usize::from(pixel) * c + channel];
                    }
                }
            }
        });
        cpu::tensor(y, (b, h, w, c))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use candle_core::Device;

    fn images() -> Tensor {
        let bytes: Vec<u8> = (0..2 * 3 * 4 * 2).map(|i| (i * 37 % 256) as u8).collect();
        Tensor::from_vec(bytes, (2, 3, 4, 2), &Device::Cpu).unwrap()
    }

    #[test]
    fn windows_of_padded_and_mirrored_images() {
        let (mean, std) = (tensor(&[0.5, 0.25]), tensor(&[0.2, 0.3]));
        let index = Tensor::new(&[1u32, 0, 1], &Device::Cpu).unwrap();
        let corners = Tensor::new(&[[2u32, 2], [0, 3], [4, 1]], &Device::Cpu).unwrap();
        let flip = Tensor::new(&[0u8, 1, 0], &Device::Cpu).unwrap();
        let views = Views { index: &index, corners: &corners, flip: &flip, pad: 2 };
        let found = batch(&images(), views, &mean, &std, DType::F32).unwrap();
        assert_eq!(found.dims(), [3, 3, 4, 2]);
        // Candle pads, cuts, mirrors and normalizes.
        let bytes = images().to_dtype(DType::F32).unwrap();
        for (b, (image, top, left, flip)) in
            [(1, 2, 2, false), (0, 0, 3, true), (1, 4, 1, false)].iter().enumerate()
        {
            let padded =
                bytes.get(*image).unwrap().pad_with_zeros(0, 2, 2).unwrap().pad_with_zeros(1, 2, 2).unwrap();
            let mut window = padded.narrow(0, *top, 3).unwrap().narrow(1, *left, 4).unwrap();
            if *flip {
                let mirrored = Tensor::new(&[3u32, 2, 1, 0], &Device::Cpu).unwrap();
                window = window.contiguous().unwrap().index_select(&mirrored, 1).unwrap();
            }
            let window = (window.contiguous().unwrap() / 255.0).unwrap();
            let expected = window.broadcast_sub(&mean).unwrap().broadcast_div(&std).unwrap();
            assert_close(&found.get(b).unwrap(), &expected, 1e-6, &format!("image {b}"));
        }
    }

    #[test]
    fn what_is_outside_is_an_error() {
        let (mean, std) = (tensor(&[0.5, 0.25]), tensor(&[0.2, 0.3]));
        let flip = Tensor::new(&[0u8], &Device::Cpu).unwrap();
        let run = |index: u32, corner: u32| {
            let index = Tensor::new(&[index], &Device::Cpu).unwrap();
            let corners = Tensor::new(&[[corner, 0]], &Device::Cpu).unwrap();
            let views = Views { index: &index, corners: &corners, flip: &flip, pad: 1 };
            batch(&images(), views, &mean, &std, DType::F32).map(drop).map_err(|error| error.to_string())
        };
        assert_eq!(run(1, 2), Ok(()));
        assert_eq!(run(2, 0).unwrap_err(), "augment::batch: image 2 of 2");
        assert_eq!(run(0, 3).unwrap_err(), "augment::batch: a window at 3 with 1 pixels of padding");
    }
}
