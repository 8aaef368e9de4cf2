//! Scaling of parts of pictures.

use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};

use crate::{CHANNELS, Picture};

/// A part of a picture, in whole pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crop {
    /// The first row.
    pub top: usize,
    /// The first column.
    pub left: usize,
    /// The number of rows, at least one.
    pub height: usize,
    /// The number of columns, at least one.
    pub width: usize,
}

/// A part of a picture whose borders may lie between pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Region {
    /// The upper border, in rows from the top of the crop.
    pub top: f64,
    /// The left border, in columns from the left of the crop.
    pub left: f64,
    /// The height in rows.
    pub height: f64,
    /// The width in columns.
    pub width: f64,
}

/// Scales pictures, and reuses its scratch memory from picture to picture.
#[derive(Default)]
pub struct Scaler(Resizer);

impl Scaler {
    /// Scales a region of a crop of the picture to `height` x `width`; returns
    /// `[height, width, 3]`.
    ///
    /// Without a region, the whole crop is scaled. Scaling is bilinear and, if the picture becomes
    /// smaller, averages over the support of the smaller picture ("antialias"), as PIL and
    /// torchvision do. A region gets the pixels that scaling the whole crop would give, but only
    /// these are computed.
    ///
    /// # Errors
    /// A description of what is wrong with the crop or the region.
    pub fn scale(
        &mut self,
        picture: &Picture,
        crop: Crop,
        region: Option<Region>,
        height: usize,
        width: usize,
    ) -> Result<Vec<u8>, String> {
        fn failed(error: impl std::fmt::Display) -> String {
            format!("it cannot be scaled: {error}")
        }
        let Picture { width: w, height: h, ref pixels } = *picture;
        let source = TypedImageRef::<U8x3>::from_buffer(w as u32, h as u32, pixels).map_err(failed)?;
        // Crop before scaling, so that no pixel outside the crop contributes.
        let [left, top, w, h] = [crop.left, crop.top, crop.width, crop.height].map(|x| x as u32);
        let source = TypedCroppedImage::from_ref(&source, left, top, w, h).map_err(failed)?;
        let mut scaled = vec![0; height * width * CHANNELS];
        let mut target =
            TypedImage::<U8x3>::from_buffer(width as u32, height as u32, &mut scaled).map_err(failed)?;
        let mut options =
            ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear)).use_alpha(false);
        if let Some(Region { top, left, height, width }) = region {
            options = options.crop(left, top, width, height);
        }
        // `resize` would be compiled for every pixel type.
        self.0.resize_typed(&source, &mut target, &options).map_err(failed)?;
        Ok(scaled)
    }
}
