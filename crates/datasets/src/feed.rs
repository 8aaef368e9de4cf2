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
        resident.epoch(&order(self.data.train.len(), seed, epoch), batch, |i| augmentation.view(seed, epoch, i))
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
        resident.epoch(&Vec::from_iter(0..self.data.test.len()), batch, |_| View::default())
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
    /// u8 `[n · height · width + 1, channels]`: the pixels of all images, and a black one.
    pixels: Tensor,
    /// u32 `[n]`.
    labels: Tensor,
    /// f32 `[channels · 256]`: the normalized value of every byte, channel by channel.
    table: Tensor,
    /// u32 `[channels]`: where each channel begins in the table.
    channels: Tensor,
    rows: Axis,
    columns: Axis,
}

/// The places along an axis of an image, as tensors: constants would be copied to the device in every step.
#[derive(Clone)]
struct Axis {
    len: usize,
    /// i64 `[len]`: 0, 1, …
    places: Tensor,
    /// i64 `[len]`: what a place is further from the axis' other end.
    mirror: Tensor,
    /// i64 `[1]`: 0.
    zero: Tensor,
    /// i64 `[1]`: `len`.
    end: Tensor,
}

/// What an epoch shows, image by image in its order, on the device.
struct Choices {
    /// u32 `[n]`: the image.
    index: Tensor,
    /// i64 `[n]`: the row of the image that is the first of the output; the rows outside are black.
    top: Tensor,
    /// i64 `[n]`: the column likewise, before the output is mirrored.
    left: Tensor,
    /// i64 `[n]`: 1 where the output is mirrored, else 0.
    flip: Tensor,
}

impl Resident {
    fn new(images: &Images, table: &Normalization, device: &Device) -> Result<Resident> {
        let (height, width) = (images.height, images.width);
        let count = images.len() * height * width;
        if u32::try_from(count).is_err() || images.pixels.len() != count * CHANNELS {
            return Err(Error::Invalid(format!(
                "{} bytes of {} images of {height}x{width} pixels: expected {CHANNELS} a pixel, and at most {} pixels",
                images.pixels.len(),
                images.len(),
                u32::MAX
            )));
        }
        let mut pixels = images.pixels.clone();
        pixels.extend([0; CHANNELS]);
        let labels: Vec<u32> = images.labels.iter().copied().map(u32::from).collect();
        Ok(Resident {
            pixels: Tensor::from_vec(pixels, (count + 1, CHANNELS), device)?,
            labels: Tensor::new(labels, device)?,
            table: Tensor::new(table.0.as_flattened(), device)?,
            channels: Tensor::from_iter((0..CHANNELS as u32).map(|c| 256 * c), device)?,
            rows: Axis::new(height, device)?,
            columns: Axis::new(width, device)?,
        })
    }

    /// The images in the given order, each as `view` says by its index.
    fn epoch(&self, order: &[usize], batch: usize, view: impl Fn(usize) -> View) -> Result<Batches> {
        let device = self.pixels.device();
        let views: Vec<View> = order.iter().map(|&i| view(i)).collect();
        let numbers = |f: fn(&View) -> i64| Tensor::from_iter(views.iter().map(f), device);
        let choices = Choices {
            index: Tensor::from_iter(order.iter().map(|&i| i as u32), device)?,
            top: numbers(|view| view.top as i64)?,
            left: numbers(|view| view.left as i64)?,
            flip: numbers(|view| view.flip.into())?,
        };
        let images = self.clone();
        Ok(Batches::on_demand(order.len(), batch, move |range| images.batch(&choices.part(range)?)))
    }

    fn batch(&self, choices: &Choices) -> Result<Batch> {
        Ok(Batch {
            images: self.augment(choices)?,
            labels: self.labels.index_select(&choices.index, 0)?,
        })
    }

    /// The chosen views, normalized: f32 `[n, height, width, channels]`.
    fn augment(&self, choices: &Choices) -> Result<Tensor> {
        let Resident { pixels, table, channels, rows, columns, .. } = self;
        let n = choices.index.elem_count();
        let column = |values: &Tensor| values.reshape((n, 1));
        // Which row and column of its image each row and column of the output shows.
        let y = rows.places.broadcast_add(&column(&choices.top)?)?;
        let x = columns.mirror.broadcast_mul(&column(&choices.flip)?)?;
        let x = x.broadcast_add(&columns.places)?.broadcast_add(&column(&choices.left)?)?;
        let inside = rows.holds(&y)?.unsqueeze(2)?.broadcast_mul(&columns.holds(&x)?.unsqueeze(1)?)?;
        // The number of the pixel among all, or of the black one, which is the last.
        let first = (choices.index.to_dtype(DType::I64)? * (rows.len * columns.len) as f64)?;
        let line = (y * columns.len as f64)?.broadcast_add(&column(&first)?)?;
        let pixel = line.unsqueeze(2)?.broadcast_add(&x.unsqueeze(1)?)?;
        let black = (pixels.dims()[0] - 1) as f64;
        let pixel = (((pixel - black)? * inside)? + black)?;
        let bytes = pixels.index_select(&pixel.flatten_all()?.to_dtype(DType::U32)?, 0)?;
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

    /// i64: 1 for a place on the axis, else 0.
    fn holds(&self, place: &Tensor) -> Result<Tensor> {
        let holds = (place.broadcast_ge(&self.zero)? * place.broadcast_lt(&self.end)?)?;
        Ok(holds.to_dtype(DType::I64)?)
    }
}

impl Choices {
    /// Those of the given positions.
    fn part(&self, range: Range<usize>) -> Result<Choices> {
        let part = |values: &Tensor| values.narrow(0, range.start, range.len());
        Ok(Choices {
            index: part(&self.index)?,
            top: part(&self.top)?,
            left: part(&self.left)?,
            flip: part(&self.flip)?,
        })
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
                let found = train.epoch(&order, batch, |i| augmentation.view(seed, epoch, i)).unwrap();
                assert_eq!(found.len(), 230usize.div_ceil(batch));
                let expected = train_batches(&data, batch, augmentation, seed, epoch);
                assert!(collect(found) == collect(expected), "{augmentation:?}, {batch} images a batch");
            }
        }
        let test = Resident::new(&data.test, &table, &Device::Cpu).unwrap();
        let found = test.epoch(&Vec::from_iter(0..70), 50, |_| View::default()).unwrap();
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
        let items = Vec::from_iter(train.epoch(&[0, 1], 0, |_| View::default()).unwrap());
        assert!(matches!(items.as_slice(), [Err(Error::Invalid(_))]));
        let mut broken = Dataset::clone(&data);
        broken.train.pixels.truncate(5 * 3072);
        let error = Resident::new(&broken.train, &Normalization::new(&data), &Device::Cpu).err().unwrap();
        assert!(error.to_string().contains("15360 bytes of 30 images"), "{error}");
    }
}
