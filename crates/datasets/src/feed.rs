//! Batches where the network is. On the CPU those of [`train_batches`] and [`test_batches`]; on an accelerator the
//! same ones, made there from a copy of the images in its memory.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::batches::{Normalization, View, order};
use crate::dataset::CHANNELS;
use crate::{Augmentation, Batch, Batches, Dataset, Error, Images, Result, test_batches, train_batches};

/// The batches of a data set on a device.
///
/// On an accelerator each split is copied there as bytes when its first batch is asked for, and an epoch's choices
/// (which image, which part of it, mirrored or not) when the epoch begins. So a step copies nothing from the host and
/// waits for nothing. The choices are those of the CPU, and so are the normalized values, to the bit.
pub struct Feed {
    data: Arc<Dataset>,
    device: Device,
    train: Option<Resident>,
    test: Option<Resident>,
}

impl Feed {
    /// For batches on `device`; nothing is copied yet.
    pub fn new(data: &Arc<Dataset>, device: &Device) -> Feed {
        Feed { data: Arc::clone(data), device: device.clone(), train: None, test: None }
    }

    /// The training batches of one epoch, the images and the order being those of [`train_batches`].
    ///
    /// # Errors
    /// [`Error::Candle`] if the images do not fit the device's memory, [`Error::Invalid`] if there are more pixels than
    /// a u32 counts.
    pub fn train(
        &mut self,
        batch: usize,
        augmentation: Augmentation,
        seed: u64,
        epoch: usize,
    ) -> Result<Batches> {
        if self.device.is_cpu() {
            return Ok(train_batches(&self.data, batch, augmentation, seed, epoch));
        }
        let resident = stay(&mut self.train, &self.data, &self.data.train, &self.device)?;
        let order = order(self.data.train.len(), seed, epoch);
        resident.epoch(&order, batch, augmentation.pad, |i| augmentation.view(seed, epoch, i))
    }

    /// The test images in order, those of [`test_batches`].
    ///
    /// # Errors
    /// As for [`Feed::train`].
    pub fn test(&mut self, batch: usize) -> Result<Batches> {
        if self.device.is_cpu() {
            return Ok(test_batches(&self.data, batch));
        }
        let resident = stay(&mut self.test, &self.data, &self.data.test, &self.device)?;
        resident.epoch(&Vec::from_iter(0..self.data.test.len()), batch, 0, |_| View::default())
    }
}

/// The split's copy on the device, made if it is not there yet.
fn stay<'a>(
    place: &'a mut Option<Resident>,
    data: &Dataset,
    images: &Images,
    device: &Device,
) -> Result<&'a Resident> {
    Ok(match place {
        Some(resident) => resident,
        None => place.insert(Resident::new(images, &Normalization::new(data), device)?),
    })
}

/// The images of a split in a device's memory.
#[derive(Clone)]
struct Resident {
    /// u8 `[n, height, width, channels]`.
    images: Tensor,
    /// u32 `[n]`.
    labels: Tensor,
    views: Views,
}

/// What an epoch shows, image by image in its order, on the device.
struct Choices {
    /// u32 `[n]`: the image.
    index: Tensor,
    /// u32 `[n, 2]`: the row and the column of the padded image where the window begins, 0 to twice the padding.
    corners: Tensor,
    /// u8 `[n]`: 1 where the window is mirrored, else 0.
    flip: Tensor,
    /// Pixels of the padding.
    pad: usize,
}

impl Resident {
    fn new(images: &Images, table: &Normalization, device: &Device) -> Result<Resident> {
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
            views: Views::new(table, (height, width), device)?,
        })
    }

    /// The images in the given order, each as `view` says by its index; no view reaches further out than `pad`.
    fn epoch(
        &self,
        order: &[usize],
        batch: usize,
        pad: usize,
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
        Ok(Batches::on_demand(order.len(), batch, move |range| resident.batch(&choices.part(range)?)))
    }

    fn batch(&self, choices: &Choices) -> Result<Batch> {
        Ok(Batch {
            images: self.views.of(&self.images, choices)?,
            labels: self.labels.index_select(&choices.index, 0)?,
        })
    }
}

impl Choices {
    /// Those of the given positions.
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

/// Cuts and normalizes views of images, by operations that every device has. What they need is kept as tensors:
/// constants would be copied to the device in every step.
#[derive(Clone)]
struct Views {
    /// f32 `[channels · 256]`: the normalized value of every byte, channel by channel.
    table: Tensor,
    /// u32 `[channels]`: where each channel begins in the table.
    channels: Tensor,
    rows: Axis,
    columns: Axis,
}

/// The places along an axis of an image.
#[derive(Clone)]
struct Axis {
    len: usize,
    /// i64 `[len]`: 0, 1, …
    places: Tensor,
    /// i64 `[len]`: what is added to a place to mirror it.
    mirror: Tensor,
    /// i64 `[1]`: 0.
    zero: Tensor,
    /// i64 `[1]`: `len`.
    end: Tensor,
}

impl Views {
    fn new(table: &Normalization, (height, width): (usize, usize), device: &Device) -> Result<Views> {
        Ok(Views {
            table: Tensor::new(table.0.as_flattened(), device)?,
            channels: Tensor::from_iter((0..CHANNELS as u32).map(|c| 256 * c), device)?,
            rows: Axis::new(height, device)?,
            columns: Axis::new(width, device)?,
        })
    }

    /// The chosen views of `images[count, height, width, channels]`, normalized: f32 `[n, height, width, channels]`.
    fn of(&self, images: &Tensor, choices: &Choices) -> Result<Tensor> {
        let Views { table, channels, rows, columns } = self;
        let n = choices.index.elem_count();
        let whole = |values: &Tensor| values.to_dtype(DType::I64);
        let corners = (whole(&choices.corners)? - choices.pad as f64)?;
        // Which row and column of its image each row and column of the output shows.
        let y = rows.places.broadcast_add(&corners.narrow(1, 0, 1)?)?;
        let x = columns.mirror.broadcast_mul(&whole(&choices.flip)?.reshape((n, 1))?)?;
        let x = x.broadcast_add(&columns.places)?.broadcast_add(&corners.narrow(1, 1, 1)?)?;
        let inside = rows.holds(&y)?.unsqueeze(2)?.broadcast_mul(&columns.holds(&x)?.unsqueeze(1)?)?;
        // The number of the pixel among all; outside any, as it is made black after that.
        let first = (whole(&choices.index)?.reshape((n, 1))? * (rows.len * columns.len) as f64)?;
        let line = (y * columns.len as f64)?.broadcast_add(&first)?;
        let pixel = line.unsqueeze(2)?.broadcast_add(&x.unsqueeze(1)?)?;
        let pixel = (pixel * whole(&inside)?)?.flatten_all()?.to_dtype(DType::U32)?;
        let bytes = images.reshape(((), CHANNELS))?.index_select(&pixel, 0)?;
        let bytes = bytes.broadcast_mul(&inside.reshape(((), 1))?)?;
        let entries = bytes.to_dtype(DType::U32)?.broadcast_add(channels)?.flatten_all()?;
        Ok(table.index_select(&entries, 0)?.reshape((n, rows.len, columns.len, CHANNELS))?)
    }
}

impl Axis {
    fn new(len: usize, device: &Device) -> Result<Axis> {
        let end = len as i64;
        Ok(Axis {
            len,
            places: Tensor::arange(0, end, device)?,
            mirror: Tensor::from_iter((0..end).map(|place| end - 1 - 2 * place), device)?,
            zero: Tensor::new(&[0i64], device)?,
            end: Tensor::new(&[end], device)?,
        })
    }

    /// u8: 1 for a place on the axis, else 0.
    fn holds(&self, place: &Tensor) -> Result<Tensor> {
        Ok((place.broadcast_ge(&self.zero)? * place.broadcast_lt(&self.end)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bits of every image and the labels, batch by batch.
    fn collect(batches: Batches) -> Vec<(Vec<usize>, Vec<u32>, Vec<u32>)> {
        let unpack = |batch: Result<Batch>| {
            let Batch { images, labels } = batch.unwrap();
            let bits = images.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let bits = bits.into_iter().map(f32::to_bits).collect();
            (images.dims().to_vec(), bits, labels.to_vec1().unwrap())
        };
        batches.map(unpack).collect()
    }

    /// What a device makes of its copy, here on the CPU, has the bits of the background thread's batches.
    #[test]
    fn copies_on_a_device_give_the_same_bits() {
        let data = Arc::new(crate::synthetic(230, 70, 1).unwrap());
        let table = Normalization::new(&data);
        let train = Resident::new(&data.train, &table, &Device::Cpu).unwrap();
        for augmentation in [
            Augmentation::none(),
            Augmentation { pad: 4, flip: true },
            Augmentation { pad: 4, flip: false },
            // Whole images beyond the border.
            Augmentation { pad: 40, flip: true },
        ] {
            for (batch, seed, epoch) in [(64, 1, 0), (7, 1, 3), (500, 2, 0)] {
                let order = order(data.train.len(), seed, epoch);
                let found = train
                    .epoch(&order, batch, augmentation.pad, |i| augmentation.view(seed, epoch, i))
                    .unwrap();
                assert_eq!(found.len(), 230usize.div_ceil(batch));
                let expected = train_batches(&data, batch, augmentation, seed, epoch);
                assert!(collect(found) == collect(expected), "{augmentation:?}, {batch} images a batch");
            }
        }
        let test = Resident::new(&data.test, &table, &Device::Cpu).unwrap();
        let found = test.epoch(&Vec::from_iter(0..70), 50, 0, |_| View::default()).unwrap();
        assert!(collect(found) == collect(test_batches(&data, 50)));
    }

    #[test]
    fn a_feed_gives_what_its_device_needs() {
        let data = Arc::new(crate::synthetic(30, 20, 1).unwrap());
        let varied = Augmentation { pad: 4, flip: true };
        let mut feed = Feed::new(&data, &Device::Cpu);
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
        let train = Resident::new(&data.train, &Normalization::new(&data), &Device::Cpu).unwrap();
        let items = Vec::from_iter(train.epoch(&[0, 1], 0, 0, |_| View::default()).unwrap());
        assert!(matches!(items.as_slice(), [Err(Error::Invalid(_))]));
        let mut broken = Dataset::clone(&data);
        broken.train.pixels.truncate(5 * 3072);
        let error = Resident::new(&broken.train, &Normalization::new(&data), &Device::Cpu).err().unwrap();
        assert!(error.to_string().contains("15360 bytes of 30 images"), "{error}");
    }
}
