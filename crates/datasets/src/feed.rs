//! Batches on the network's device.
//!
//! On the CPU they are those of [`Dataset::train_batches`] and [`Dataset::test_batches`]. On an
//! accelerator they have the same images; if the data set is in memory, they are made on the device
//! from a copy of the images.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use kernels::augment::{self, Views};

use crate::batches::{Augmentation, Batch, Batches, Epoch, Part, View, order};
use crate::dataset::Dataset;
use crate::error::{Error, Result};
use crate::memory::{CHANNELS, Images, InMemoryDataset};

/// A source of batches of a data set on a device.
///
/// On an accelerator, the first epoch of a split copies all images of an in-memory data set to the
/// device, as bytes. The start of an epoch copies its choices: the index of each image, the
/// position of its window, and whether it is mirrored. So a step copies nothing from the host and
/// does not wait. The choices are the same as on the CPU, and so are the normalized values, up to
/// the rounding of the device's division. Batches from files are copied one by one.
pub struct Feed<'a> {
    data: &'a dyn Dataset,
    device: Device,
    dtype: DType,
    part: Part,
    train: Option<Resident>,
    test: Option<Resident>,
}

impl<'a> Feed<'a> {
    /// Returns a feed of batches on `device` with images in `F32` or `BF16`. Copies nothing yet.
    pub fn new(data: &'a dyn Dataset, device: &Device, dtype: DType) -> Self {
        Feed { data, device: device.clone(), dtype, part: Part::WHOLE, train: None, test: None }
    }

    /// Returns a feed of this part of each batch; parts without images are left out.
    pub fn part(self, part: Part) -> Self {
        Feed { part, ..self }
    }

    /// Returns the data set.
    pub fn data(&self) -> &'a dyn Dataset {
        self.data
    }

    /// Returns the data set if its batches are made from a copy on the device.
    fn copied(&self) -> Option<&'a InMemoryDataset> {
        self.data.in_memory().filter(|_| !self.device.is_cpu())
    }

    /// Returns the training batches of one epoch, with the images and the order of
    /// [`Dataset::train_batches`].
    ///
    /// # Errors
    /// [`Error::Candle`] if the images do not fit into the device's memory, [`Error::Invalid`] if
    /// the number of pixels does not fit into a u32.
    pub fn train(
        &mut self,
        batch: usize,
        augmentation: Augmentation,
        seed: u64,
        epoch: usize,
    ) -> Result<Batches> {
        let Some(data) = self.copied() else {
            let batches = self.data.train_parts(batch, self.part, Epoch { augmentation, seed, epoch });
            return Ok(batches.on(&self.device, self.dtype));
        };
        let resident = stay(&mut self.train, data, &data.train, &self.device)?;
        let order = order(data.train.len(), seed, epoch);
        let view = |i| augmentation.view(seed, epoch, i);
        resident.epoch(&order, (batch, self.part), augmentation.pad, self.dtype, view)
    }

    /// Returns batches of the test images in order, as [`Dataset::test_batches`] does.
    ///
    /// # Errors
    /// The same as for [`Feed::train`].
    pub fn test(&mut self, batch: usize) -> Result<Batches> {
        let Some(data) = self.copied() else {
            return Ok(self.data.test_parts(batch, self.part).on(&self.device, self.dtype));
        };
        let resident = stay(&mut self.test, data, &data.test, &self.device)?;
        let order = Vec::from_iter(0..data.test.len());
        resident.epoch(&order, (batch, self.part), 0, self.dtype, |_| View::default())
    }
}

/// Returns the split's copy on the device. Makes the copy if it does not exist yet.
fn stay<'a>(
    place: &'a mut Option<Resident>,
    data: &InMemoryDataset,
    images: &Images,
    device: &Device,
) -> Result<&'a Resident> {
    Ok(match place {
        Some(resident) => resident,
        None => place.insert(Resident::new(data, images, device)?),
    })
}

/// The images of a split in a device's memory.
#[derive(Clone)]
struct Resident {
    /// The pixels, u8, `[n, height, width, channels]`.
    images: Tensor,
    /// The labels, u32, `[n]`.
    labels: Tensor,
    /// The mean, f32, `[channels]`, where full intensity is 1.
    mean: Tensor,
    /// The standard deviation, f32, `[channels]`, in the same units.
    std: Tensor,
}

/// The random choices of an epoch on the device, for each image in its order.
struct Choices {
    /// The index of each image, u32, `[n]`.
    index: Tensor,
    /// The row and the column of the padded image where the window begins, from 0 to twice the
    /// padding; u32, `[n, 2]`.
    corners: Tensor,
    /// 1 if the window is mirrored, else 0; u8, `[n]`.
    flip: Tensor,
    /// The number of pixels of padding on every side.
    pad: usize,
}

impl Resident {
    fn new(data: &InMemoryDataset, images: &Images, device: &Device) -> Result<Resident> {
        let (n, height, width) = (images.len(), images.height, images.width);
        let pixels = n * height * width;
        if u32::try_from(pixels).is_err() || images.pixels.len() != pixels * CHANNELS {
            return Err(Error::Invalid(format!(
                "{} bytes of {n} images of {height}x{width} pixels: expected {CHANNELS} a pixel, and at most {} pixels",
                images.pixels.len(),
                u32::MAX
            )));
        }
        let labels: Vec<u32> = images.labels.iter().copied().map(u32::from).collect();
        Ok(Resident {
            images: Tensor::from_slice(&images.pixels, (n, height, width, CHANNELS), device)?,
            labels: Tensor::new(labels, device)?,
            mean: Tensor::new(&data.mean, device)?,
            std: Tensor::new(&data.std, device)?,
        })
    }

    /// Returns the batches of the images in this order. `view` returns the view of the image with
    /// an index; the view's offsets must be at most `pad`.
    fn epoch(
        &self,
        order: &[usize],
        (batch, part): (usize, Part),
        pad: usize,
        dtype: DType,
        view: impl Fn(usize) -> View,
    ) -> Result<Batches> {
        let device = self.images.device();
        let views: Vec<View> = order.iter().map(|&i| view(i)).collect();
        let corner = |offset: isize| (offset + pad as isize) as u32;
        let corners: Vec<u32> = views.iter().flat_map(|view| [corner(view.top), corner(view.left)]).collect();
        let choices = Choices {
            index: Tensor::from_iter(order.iter().map(|&i| i as u32), device)?,
            corners: Tensor::from_vec(corners, (order.len(), 2), device)?,
            flip: Tensor::from_iter(views.iter().map(|view| u8::from(view.flip)), device)?,
            pad,
        };
        let resident = self.clone();
        Ok(Batches::on_demand(order.len(), batch, part, move |range| {
            resident.batch(&choices.part(range)?, dtype)
        }))
    }

    fn batch(&self, choices: &Choices, dtype: DType) -> Result<Batch> {
        let Choices { index, corners, flip, pad } = choices;
        let views = Views { index, corners, flip, pad: *pad };
        Ok(Batch {
            images: augment::batch(&self.images, views, &self.mean, &self.std, dtype)?,
            labels: self.labels.index_select(&choices.index, 0)?,
        })
    }
}

impl Choices {
    /// Returns the choices at the given positions.
    fn part(&self, range: Range<usize>) -> Result<Choices> {
        let part = |values: &Tensor| values.narrow(0, range.start, range.len());
        Ok(Choices {
            index: part(&self.index)?,
            corners: part(&self.corners)?,
            flip: part(&self.flip)?,
            pad: self.pad,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batches::{test_batches, train_batches};
    use std::sync::Arc;

    /// Returns the shape, the bit patterns of the images, and the labels of each batch.
    fn collect(batches: Batches) -> Vec<(Vec<usize>, Vec<u32>, Vec<u32>)> {
        let unpack = |batch: Result<Batch>| {
            let Batch { images, labels } = batch.unwrap();
            let bits = images.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let bits = bits.into_iter().map(f32::to_bits).collect();
            (images.dims().to_vec(), bits, labels.to_vec1().unwrap())
        };
        batches.map(unpack).collect()
    }

    /// Checks that batches made from a copy (on the CPU, in this test) equal those of the
    /// background thread, bit by bit.
    #[test]
    fn copies_on_a_device_give_the_same_bits() {
        let data = Arc::new(crate::synthetic(230, 70, 1).unwrap());
        let train = Resident::new(&data, &data.train, &Device::Cpu).unwrap();
        for augmentation in [
            Augmentation::none(),
            Augmentation { pad: 4, flip: true },
            Augmentation { pad: 4, flip: false },
            // Some of these windows lie completely in the padding.
            Augmentation { pad: 40, flip: true },
        ] {
            for (batch, seed, epoch) in [(64, 1, 0), (7, 1, 3), (500, 2, 0)] {
                let order = order(data.train.len(), seed, epoch);
                let found = train
                    .epoch(&order, (batch, Part::WHOLE), augmentation.pad, DType::F32, |i| {
                        augmentation.view(seed, epoch, i)
                    })
                    .unwrap();
                assert_eq!(found.len(), 230usize.div_ceil(batch));
                let expected = train_batches(&data, batch, augmentation, seed, epoch);
                assert!(collect(found) == collect(expected), "{augmentation:?}, {batch} images a batch");
            }
        }
        let test = Resident::new(&data, &data.test, &Device::Cpu).unwrap();
        let found = test
            .epoch(&Vec::from_iter(0..70), (50, Part::WHOLE), 0, DType::F32, |_| View::default())
            .unwrap();
        assert!(collect(found) == collect(test_batches(&data, 50)));
    }

    #[test]
    fn a_feed_gives_what_its_device_needs() {
        let data = Arc::new(crate::synthetic(30, 20, 1).unwrap());
        let varied = Augmentation { pad: 4, flip: true };
        let mut feed = Feed::new(&data, &Device::Cpu, DType::F32);
        assert!(
            collect(feed.train(8, varied, 1, 2).unwrap()) == collect(train_batches(&data, 8, varied, 1, 2))
        );
        assert!(collect(feed.test(8).unwrap()) == collect(test_batches(&data, 8)));
        // The CPU needs no copy.
        assert!(feed.train.is_none() && feed.test.is_none());
    }

    #[test]
    fn unusable_arguments_are_errors() {
        let data = Arc::new(crate::synthetic(30, 20, 1).unwrap());
        let train = Resident::new(&data, &data.train, &Device::Cpu).unwrap();
        let items = Vec::from_iter(
            train.epoch(&[0, 1], (0, Part::WHOLE), 0, DType::F32, |_| View::default()).unwrap(),
        );
        assert!(matches!(items.as_slice(), [Err(Error::Invalid(_))]));
        let mut broken = InMemoryDataset::clone(&data);
        broken.train.pixels.truncate(5 * 3072);
        let error = Resident::new(&data, &broken.train, &Device::Cpu).err().unwrap();
        assert!(error.to_string().contains("15360 bytes of 30 images"), "{error}");
    }
}
