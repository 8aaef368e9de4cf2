//! Augmentation, and batches that a background thread prepares in advance.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use candle_core::{DType, Device, Tensor};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::memory::{CHANNELS, Images, InMemoryDataset};
use pictures::panic_message;

/// The number of finished batches that the channel holds while the thread makes another one.
const AHEAD: usize = 2;

/// The augmentation of training images.
///
/// An image is padded with `pad` black pixels on every side, and a window of the original size is
/// cut out at a uniformly drawn position. If `flip`, the window is mirrored left to right with
/// probability one half. The padding is black *before* normalization, so it becomes `-mean / std`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Augmentation {
    /// The number of pixels added on every side before the crop; 0 leaves the image in place.
    pub pad: usize,
    /// Whether each image is mirrored left to right with probability one half.
    pub flip: bool,
}

impl Augmentation {
    /// Returns an augmentation that changes nothing.
    pub fn none() -> Augmentation {
        Augmentation { pad: 0, flip: false }
    }

    /// Returns the view of training image `index` in `epoch`. It depends only on the arguments, so
    /// neither on the order of the images nor on the batch size.
    pub(crate) fn view(self, seed: u64, epoch: usize, index: usize) -> View {
        if self == Augmentation::none() {
            return View::default();
        }
        let mut rng = rng(seed, epoch, Purpose::Augment);
        // Each image has its own stream under the epoch's key.
        rng.set_stream(index as u64);
        let span = 2 * self.pad as u64;
        let mut offset = || rng.random_range(0..=span) as isize - self.pad as isize;
        let (top, left) = (offset(), offset());
        View { top, left, flip: self.flip && rng.random() }
    }
}

/// The values from which the order and the views of an epoch's training images are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epoch {
    /// The augmentation of the images.
    pub augmentation: Augmentation,
    /// The seed of the training run.
    pub seed: u64,
    /// The index of the epoch, from 0.
    pub epoch: usize,
}

/// The part of each batch that is made, if several ranks share one batch.
///
/// The parts of a batch hold its images in order, and their sizes differ by at most one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The index of the part, from 0.
    pub index: usize,
    /// The number of parts of a batch, at least 1.
    pub of: usize,
}

impl Part {
    /// The whole batch as a single part.
    pub const WHOLE: Part = Part { index: 0, of: 1 };

    /// Returns the range of this part within the range of a batch.
    fn positions(self, batch: Range<usize>) -> Range<usize> {
        let end = |part: usize| batch.start + batch.len() * part / self.of;
        end(self.index)..end(self.index + 1)
    }
}

/// A batch of normalized images and their labels.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The images, (x / 255 - mean) / std with the data set's statistics, `[n, height, width,
    /// channels]`. The dtype is f32 unless a [`Feed`](crate::Feed) makes another one.
    pub images: Tensor,
    /// The classes, u32, `[n]`.
    pub labels: Tensor,
}

impl Batch {
    /// Moves the batch to `device` and converts the images to `dtype`. Tensors that already match
    /// are not copied.
    fn to(self, (device, dtype): &(Device, DType)) -> Result<Batch> {
        let images = self.images.to_device(device)?.to_dtype(*dtype)?;
        Ok(Batch { images, labels: self.labels.to_device(device)? })
    }
}

/// Returns the training batches of one epoch on the CPU; [`Feed`](crate::Feed) makes the same
/// batches on any device.
///
/// The order is a permutation drawn from `(seed, epoch)`, and the augmentation of an image depends
/// only on `(seed, epoch, its index)`. So an epoch is the same however often and however fast it is
/// consumed. Every image appears exactly once. The last batch is short if `batch` does not divide
/// the number of images.
///
/// If `batch` is 0, the first item is an error.
pub fn train_batches(
    data: &Arc<InMemoryDataset>,
    batch: usize,
    augmentation: Augmentation,
    seed: u64,
    epoch: usize,
) -> Batches {
    train_parts(data, batch, Part::WHOLE, Epoch { augmentation, seed, epoch })
}

/// Returns a part of each batch of [`train_batches`].
pub(crate) fn train_parts(data: &Arc<InMemoryDataset>, batch: usize, part: Part, draws: Epoch) -> Batches {
    let Epoch { augmentation, seed, epoch } = draws;
    let order = order(data.train.len(), seed, epoch);
    let data = Arc::clone(data);
    let table = Normalization::new(&data);
    Batches::start(order.len(), batch, part, move |range| {
        let views = order[range].iter().map(|&i| (i, augmentation.view(seed, epoch, i)));
        assemble(&data.train, &table, views)
    })
}

/// Returns the order of an epoch's training images, a permutation of `0..images`.
pub(crate) fn order(images: usize, seed: u64, epoch: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..images).collect();
    order.shuffle(&mut rng(seed, epoch, Purpose::Shuffle));
    order
}

/// Returns batches of the test images on the CPU, in order and without augmentation. The last batch
/// may be short.
///
/// If `batch` is 0, the first item is an error.
pub fn test_batches(data: &Arc<InMemoryDataset>, batch: usize) -> Batches {
    test_parts(data, batch, Part::WHOLE)
}

/// Returns a part of each batch of [`test_batches`].
pub(crate) fn test_parts(data: &Arc<InMemoryDataset>, batch: usize, part: Part) -> Batches {
    let data = Arc::clone(data);
    let table = Normalization::new(&data);
    Batches::start(data.test.len(), batch, part, move |range| {
        assemble(&data.test, &table, range.map(|i| (i, View::default())))
    })
}

/// An iterator over the batches of an epoch.
///
/// A background thread prepares up to three batches in advance; it stops when this value is
/// dropped. Batches that are made on an accelerator from a copy of the images need no thread: each
/// is started when the caller asks for it, because the device runs asynchronously.
///
/// If the thread fails, the failure is the next and the last item, so an epoch never ends early
/// without an error.
pub struct Batches {
    maker: Maker,
    /// The device and the dtype to which each batch is converted; `None` does not convert it.
    place: Option<(Device, DType)>,
    remaining: usize,
}

/// The source of the batches.
enum Maker {
    /// A background thread.
    Thread { receiver: Receiver<Result<Batch>>, worker: JoinHandle<()> },
    /// A function that the calling thread runs.
    Caller(Box<dyn FnMut() -> Result<Batch> + Send>),
    /// No source any more. The error, if there is one, is the next item.
    Stopped(Option<Error>),
}

impl Batches {
    /// Starts a thread that makes this part of each batch; a batch has `batch` of the `images`
    /// images. The thread calls `make` with the positions of each part.
    pub(crate) fn start(
        images: usize,
        batch: usize,
        part: Part,
        mut make: impl FnMut(Range<usize>) -> Result<Batch> + Send + 'static,
    ) -> Batches {
        if batch == 0 {
            return Batches::failed(no_images());
        }
        let (sender, receiver) = sync_channel(AHEAD);
        let worker = std::thread::Builder::new().name("batches".into()).spawn(move || {
            for range in ranges(images, batch, part) {
                let made = make(range);
                let failed = made.is_err();
                // Sending fails if the receiver was dropped, so nobody wants more batches.
                if sender.send(made).is_err() || failed {
                    return;
                }
            }
        });
        match worker {
            Err(error) => Batches::failed(Error::Loader(format!("no thread: {error}"))),
            Ok(worker) => Batches::of(images, batch, part, Maker::Thread { receiver, worker }),
        }
    }

    /// Makes the same batches without a thread: `make` is called when a batch is requested.
    pub(crate) fn on_demand(
        images: usize,
        batch: usize,
        part: Part,
        mut make: impl FnMut(Range<usize>) -> Result<Batch> + Send + 'static,
    ) -> Batches {
        if batch == 0 {
            return Batches::failed(no_images());
        }
        let mut ranges = ranges(images, batch, part);
        let next = move || make(ranges.next().ok_or_else(|| Error::Loader("no more images".into()))?);
        Batches::of(images, batch, part, Maker::Caller(Box::new(next)))
    }

    fn of(images: usize, batch: usize, part: Part, maker: Maker) -> Batches {
        let remaining = ranges(images, batch, part).count();
        Batches { maker, place: None, remaining }
    }

    /// Converts each batch to `device` and its images to `dtype` when it is requested.
    pub(crate) fn on(mut self, device: &Device, dtype: DType) -> Batches {
        self.place = Some((device.clone(), dtype));
        self
    }

    /// Returns an iterator whose only item is an error.
    pub(crate) fn failed(error: Error) -> Batches {
        Batches { maker: Maker::Stopped(Some(error)), place: None, remaining: 1 }
    }

    /// Returns the number of remaining batches. Fewer batches follow if one fails, or if one is
    /// skipped because none of its images can be read.
    pub fn len(&self) -> usize {
        self.remaining
    }

    /// Returns whether no batch remains.
    pub fn is_empty(&self) -> bool {
        self.remaining == 0
    }

    /// Ends the thread and returns the message of its panic, if it panicked.
    fn stop(&mut self) -> Option<String> {
        let Maker::Thread { receiver, worker } = std::mem::replace(&mut self.maker, Maker::Stopped(None))
        else {
            return None;
        };
        // This tells the thread to end, so it must come before the wait.
        drop(receiver);
        worker.join().err().map(|payload| panic_message(&*payload).into())
    }

    /// Ends the iteration with `error`.
    fn fail(&mut self, error: Error) -> Option<Result<Batch>> {
        self.remaining = 0;
        Some(Err(error))
    }
}

impl Iterator for Batches {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Result<Batch>> {
        while self.remaining > 0 {
            let made = match &mut self.maker {
                Maker::Thread { receiver, .. } => receiver.recv().ok(),
                Maker::Caller(make) => Some(make()),
                Maker::Stopped(failure) => failure.take().map(Err),
            };
            let batch = match made {
                Some(Ok(batch)) => batch,
                Some(Err(error)) => return self.fail(error),
                None => {
                    let why = self.stop().unwrap_or_else(|| "its thread ended early".into());
                    return self.fail(Error::Loader(why));
                }
            };
            self.remaining -= 1;
            // A batch is empty if none of its images could be read; `Dataset::skipped` names them.
            if batch.labels.elem_count() > 0 {
                return Some(match &self.place {
                    Some(place) => batch.to(place),
                    None => Ok(batch),
                });
            }
        }
        None
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        // A failure ends the iteration early, and a batch can be skipped.
        (0, Some(self.remaining))
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Returns the positions of each batch's part without the empty parts.
fn ranges(images: usize, batch: usize, part: Part) -> impl Iterator<Item = Range<usize>> {
    let batches = (0..images).step_by(batch).map(move |start| start..images.min(start + batch));
    batches.map(move |batch| part.positions(batch)).filter(|part| !part.is_empty())
}

fn no_images() -> Error {
    Error::Invalid("a batch must hold at least one image".into())
}

/// The purpose of random numbers. Each purpose has its own sequence.
#[derive(Clone, Copy)]
pub(crate) enum Purpose {
    Shuffle = 1,
    Augment = 2,
}

/// Returns the random number generator of one epoch and purpose.
pub(crate) fn rng(seed: u64, epoch: usize, purpose: Purpose) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&(epoch as u64).to_le_bytes());
    key[16] = purpose as u8;
    ChaCha8Rng::from_seed(key)
}

/// The position of an output image in its source: output pixel (y, x) is source pixel (y + top, x +
/// left). The output is then mirrored if `flip`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) top: isize,
    pub(crate) left: isize,
    pub(crate) flip: bool,
}

/// A table of the normalized value of every byte for each channel.
///
/// The lookup replaces a conversion, a subtraction and a division.
pub(crate) struct Normalization(pub(crate) [[f32; 256]; CHANNELS]);

impl Normalization {
    pub(crate) fn new(data: &InMemoryDataset) -> Normalization {
        Normalization::of(data.mean, data.std)
    }

    /// Returns the table for this mean and standard deviation, where full intensity is 1.
    pub(crate) fn of(mean: [f32; CHANNELS], std: [f32; CHANNELS]) -> Normalization {
        Normalization(std::array::from_fn(|c| {
            std::array::from_fn(|value| (value as f32 / 255.0 - mean[c]) / std[c])
        }))
    }

    /// Normalizes one pixel.
    #[inline]
    pub(crate) fn pixel(&self, source: &[u8; CHANNELS], target: &mut [f32; CHANNELS]) {
        for c in 0..CHANNELS {
            target[c] = self.0[c][usize::from(source[c])];
        }
    }

    /// Writes the normalized view of an image to `target`. Both are `[height, width, 3]`.
    fn image(&self, source: &[u8], width: usize, view: View, target: &mut [f32]) {
        let mut black = [0.0; CHANNELS];
        self.pixel(&[0; CHANNELS], &mut black);
        let (source, _) = source.as_chunks::<CHANNELS>();
        let (target, _) = target.as_chunks_mut::<CHANNELS>();
        let height = source.len() / width;
        // These columns of the output lie inside the source.
        let begin = view.left.min(0).unsigned_abs().min(width);
        let end = width.saturating_sub(view.left.max(0).unsigned_abs()).max(begin);
        for (y, row) in target.chunks_exact_mut(width).enumerate() {
            // The part outside the source stays black.
            row.fill(black);
            let Some(y) = usize::try_from(y as isize + view.top).ok().filter(|&y| y < height) else {
                continue;
            };
            let line = source[y * width..][..width].iter().skip(view.left.max(0) as usize);
            let inside = row[begin..end].iter_mut();
            line.zip(inside).for_each(|(source, target)| self.pixel(source, target));
            if view.flip {
                row.reverse();
            }
        }
    }
}

/// Makes a batch from the given indices of images and their views.
fn assemble(
    images: &Images,
    table: &Normalization,
    views: impl ExactSizeIterator<Item = (usize, View)>,
) -> Result<Batch> {
    let (n, size) = (views.len(), images.image_size());
    let mut pixels = vec![0f32; n * size];
    let mut labels = Vec::with_capacity(n);
    for ((i, view), target) in views.zip(pixels.chunks_exact_mut(size)) {
        table.image(images.image(i), images.width, view, target);
        labels.push(u32::from(images.labels[i]));
    }
    let shape = (n, images.height, images.width, CHANNELS);
    Ok(Batch {
        images: Tensor::from_vec(pixels, shape, &Device::Cpu)?,
        labels: Tensor::from_vec(labels, n, &Device::Cpu)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    const VARIED: Augmentation = Augmentation { pad: 4, flip: true };

    /// Returns a data set whose training images all differ.
    fn data() -> Arc<InMemoryDataset> {
        Arc::new(crate::synthetic(230, 70, 1).unwrap())
    }

    fn collect(batches: Batches) -> Vec<(Vec<f32>, Vec<u32>)> {
        let unpack = |batch: Result<Batch>| {
            let Batch { images, labels } = batch.unwrap();
            assert_eq!(images.dims()[1..], [32, 32, 3]);
            assert_eq!(images.dims()[0], labels.dims1().unwrap());
            (images.flatten_all().unwrap().to_vec1().unwrap(), labels.to_vec1().unwrap())
        };
        batches.map(unpack).collect()
    }

    /// Returns the bit patterns of each image of an epoch.
    fn single_images(batches: Batches) -> Vec<Vec<u32>> {
        let split = |(pixels, _): (Vec<f32>, _)| {
            pixels.chunks(3072).map(|image| image.iter().map(|x| x.to_bits()).collect()).collect::<Vec<_>>()
        };
        collect(batches).into_iter().flat_map(split).collect()
    }

    #[test]
    fn an_epoch_is_a_function_of_its_arguments() {
        let data = data();
        let epoch = |seed, epoch| collect(train_batches(&data, 64, VARIED, seed, epoch));
        let first = epoch(1, 0);
        assert_eq!(first, epoch(1, 0));
        assert_ne!(first, epoch(1, 1));
        assert_ne!(first, epoch(2, 0));
        // A slow consumer receives the same batches.
        let slowly =
            train_batches(&data, 64, VARIED, 1, 0).inspect(|_| std::thread::sleep(Duration::from_millis(20)));
        let slowly: Vec<Vec<u32>> = slowly.map(|batch| batch.unwrap().labels.to_vec1().unwrap()).collect();
        assert_eq!(slowly, first.iter().map(|(_, labels)| labels.clone()).collect::<Vec<_>>());
        // Several consumers at once receive the same batches.
        std::thread::scope(|scope| {
            let runs: Vec<_> = (0..3).map(|_| scope.spawn(|| epoch(1, 0))).collect();
            runs.into_iter().for_each(|run| assert_eq!(run.join().unwrap(), first));
        });
        // The images do not depend on the batch size.
        assert_eq!(
            single_images(train_batches(&data, 64, VARIED, 1, 0)),
            single_images(train_batches(&data, 7, VARIED, 1, 0))
        );
    }

    #[test]
    fn every_image_appears_once_with_its_label() {
        let data = data();
        let plain = single_images(train_batches(&data, 1, Augmentation::none(), 0, 0));
        let mut order = single_images(train_batches(&data, 64, Augmentation::none(), 5, 3));
        let labels: Vec<u32> = collect(train_batches(&data, 64, Augmentation::none(), 5, 3))
            .into_iter()
            .flat_map(|b| b.1)
            .collect();
        assert_eq!((order.len(), plain.iter().collect::<HashSet<_>>().len()), (230, 230));
        assert_ne!(order, plain);
        let table = Normalization::new(&data);
        let normalized = |i: usize| {
            let mut target = vec![0.0; 3072];
            table.image(data.train.image(i), 32, View::default(), &mut target);
            target.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        let originals: Vec<_> = (0..230).map(normalized).collect();
        for (image, label) in order.iter().zip(labels) {
            let i = originals.iter().position(|original| original == image).unwrap();
            assert_eq!(u32::from(data.train.labels[i]), label);
        }
        order.sort_unstable();
        let mut plain = plain;
        plain.sort_unstable();
        assert_eq!(order, plain);
    }

    #[test]
    fn the_last_batch_may_be_short() {
        let data = data();
        let sizes =
            |batches: Batches| collect(batches).iter().map(|(_, labels)| labels.len()).collect::<Vec<_>>();
        let train = |batch| train_batches(&data, batch, VARIED, 0, 0);
        assert_eq!((train(100).len(), sizes(train(100))), (3, vec![100, 100, 30]));
        assert_eq!(sizes(train(115)), [115, 115]);
        assert_eq!(sizes(train(500)), [230]);
        assert_eq!(sizes(test_batches(&data, 50)), [50, 20]);
        let mut batches = train(100);
        batches.next();
        assert_eq!((batches.len(), batches.size_hint()), (2, (0, Some(2))));
    }

    #[test]
    fn test_batches_are_in_order_and_normalized() {
        let data = data();
        let batches = collect(test_batches(&data, 50));
        let labels: Vec<u32> = batches.iter().flat_map(|(_, labels)| labels.clone()).collect();
        assert_eq!(labels, data.test.labels.iter().map(|&label| u32::from(label)).collect::<Vec<_>>());
        let pixels = batches.iter().flat_map(|(pixels, _)| pixels);
        for (p, (found, &byte)) in pixels.zip(&data.test.pixels).enumerate() {
            let expected =
                (f64::from(byte) / 255.0 - f64::from(data.mean[p % 3])) / f64::from(data.std[p % 3]);
            assert!((f64::from(*found) - expected).abs() < 1e-5);
        }
        // Over the training images, the normalized values have mean 0 and standard deviation 1.
        let train = collect(train_batches(&data, 230, Augmentation::none(), 0, 0)).remove(0).0;
        for c in 0..3 {
            let channel: Vec<f64> = train.iter().skip(c).step_by(3).map(|&x| x.into()).collect();
            let mean = channel.iter().sum::<f64>() / channel.len() as f64;
            let square = channel.iter().map(|x| x * x).sum::<f64>() / channel.len() as f64;
            assert!(mean.abs() < 1e-4 && (square - 1.0).abs() < 1e-4, "{mean} {square}");
        }
    }

    #[test]
    fn views_are_those_worked_out_by_hand() {
        // Two rows of three pixels have the red values 1 2 3 / 4 5 6; green and blue are constant.
        let source: Vec<u8> = (1..=6).flat_map(|red| [red, 10, 20]).collect();
        // With this table the result shows where each byte went, and black differs from all pixels.
        let table =
            Normalization(std::array::from_fn(|c| std::array::from_fn(|v| v as f32 - 100.0 * c as f32)));
        let red = |top, left, flip| {
            let mut target = vec![0.0; 18];
            table.image(&source, 3, View { top, left, flip }, &mut target);
            for pixel in target.chunks(3) {
                let black = pixel[0] == 0.0;
                assert_eq!(pixel[1..], if black { [-100.0, -200.0] } else { [-90.0, -180.0] });
            }
            target.iter().step_by(3).copied().collect::<Vec<f32>>()
        };
        assert_eq!(red(0, 0, false), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(red(0, 0, true), [3.0, 2.0, 1.0, 6.0, 5.0, 4.0]);
        assert_eq!(red(1, 0, false), [4.0, 5.0, 6.0, 0.0, 0.0, 0.0]);
        assert_eq!(red(-1, 1, false), [0.0, 0.0, 0.0, 2.0, 3.0, 0.0]);
        assert_eq!(red(-1, 1, true), [0.0, 0.0, 0.0, 0.0, 3.0, 2.0]);
        assert_eq!(red(0, -2, false), [0.0, 0.0, 1.0, 0.0, 0.0, 4.0]);
        for (top, left) in [(2, 0), (-2, 0), (0, 3), (0, -3), (9, 9), (-9, -9)] {
            assert_eq!(red(top, left, false), [0.0; 6], "{top} {left}");
        }
    }

    #[test]
    fn parts_of_a_batch_are_its_images_in_order() {
        const EPOCH: Epoch = Epoch { augmentation: VARIED, seed: 1, epoch: 2 };
        let data = data();
        let whole = collect(train_batches(&data, 64, VARIED, 1, 2));
        let tested = collect(test_batches(&data, 32));
        // The last batch has 38 training images or 6 test images, so five parts differ in size.
        for of in [1, 2, 5] {
            let together = |parts: Vec<Vec<(Vec<f32>, Vec<u32>)>>| -> Vec<(Vec<f32>, Vec<u32>)> {
                let batch = |i: usize| {
                    let parts = parts.iter().map(|part| part[i].clone());
                    parts.reduce(|(a, b), (c, d)| ([a, c].concat(), [b, d].concat())).unwrap()
                };
                (0..parts[0].len()).map(batch).collect()
            };
            let parts = |make: &dyn Fn(Part) -> Batches| {
                together((0..of).map(|index| collect(make(Part { index, of }))).collect())
            };
            assert!(parts(&|part| train_parts(&data, 64, part, EPOCH)) == whole, "{of} parts");
            assert!(parts(&|part| test_parts(&data, 32, part)) == tested, "{of} parts of test images");
        }
        // A batch of 6 images has 4 parts of one or two images. If a batch has fewer images than
        // parts, the empty parts are left out.
        let sizes = |index| Part { index, of: 4 }.positions(0..6).len();
        assert_eq!([0, 1, 2, 3].map(sizes), [1, 2, 1, 2]);
        let few = |index| collect(test_parts(&data, 34, Part { index, of: 3 })).len();
        assert_eq!([0, 1, 2].map(few), [2, 3, 3]);
    }

    #[test]
    fn augmentation_draws_every_view_about_equally_often() {
        let augmentation = Augmentation { pad: 1, flip: true };
        let mut counts = std::collections::HashMap::new();
        for i in 0..18_000 {
            let View { top, left, flip } = augmentation.view(3, 1, i);
            *counts.entry((top, left, flip)).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 18);
        assert!(counts.values().all(|n| (850..1150).contains(n)), "{counts:?}");
        assert!((0..100).all(|i| !Augmentation { pad: 4, flip: false }.view(0, 0, i).flip));
        assert!((0..100).all(|i| Augmentation::none().view(0, 0, i) == View::default()));
    }

    #[test]
    fn augmentation_is_read_and_written() {
        let text = serde_json::to_string(&VARIED).unwrap();
        assert_eq!(text, r#"{"pad":4,"flip":true}"#);
        assert_eq!(serde_json::from_str::<Augmentation>(&text).unwrap(), VARIED);
    }

    #[test]
    fn dropping_stops_the_thread() {
        let data = data();
        let made = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&made);
        let table = Normalization::new(&data);
        let mut batches = Batches::start(1_000_000, 1, Part::WHOLE, move |range| {
            counter.fetch_add(1, Ordering::SeqCst);
            assemble(&data.train, &table, range.map(|_| (0, View::default())))
        });
        batches.next().unwrap().unwrap();
        drop(batches);
        // Dropping waits for the thread, which owns the other reference.
        assert_eq!(Arc::strong_count(&made), 1);
        assert!(made.load(Ordering::SeqCst) <= 5);
    }

    /// However many batches in a row have no image that can be read, the next one that has images
    /// is returned.
    #[test]
    fn batches_without_images_are_passed_over() {
        const IMAGES: usize = 100_000;
        fn make(range: Range<usize>) -> Result<Batch> {
            let labels: Vec<u32> = range.filter(|i| i + 1 == IMAGES).map(|i| i as u32).collect();
            let images = Tensor::zeros((labels.len(), 1, 1, CHANNELS), DType::F32, &Device::Cpu)?;
            Ok(Batch { images, labels: Tensor::new(labels, &Device::Cpu)? })
        }
        for batches in
            [Batches::start(IMAGES, 1, Part::WHOLE, make), Batches::on_demand(IMAGES, 1, Part::WHOLE, make)]
        {
            let labels: Vec<Vec<u32>> =
                batches.map(|batch| batch.unwrap().labels.to_vec1().unwrap()).collect();
            assert_eq!(labels, [[IMAGES as u32 - 1]]);
        }
    }

    #[test]
    fn failures_are_the_last_item() {
        let data = data();
        let table = Normalization::new(&data);
        let failing = |what: fn() -> Error| {
            let (data, table) = (Arc::clone(&data), Normalization(table.0));
            Batches::start(10, 1, Part::WHOLE, move |range| match range.start {
                2 => Err(what()),
                _ => assemble(&data.train, &table, range.map(|i| (i, View::default()))),
            })
        };
        let mut batches = failing(|| panic!("out of {}", "luck"));
        assert!(batches.next().unwrap().is_ok() && batches.next().unwrap().is_ok());
        let error = batches.next().unwrap().unwrap_err();
        assert_eq!(error.to_string(), "the batch loader stopped: out of luck");
        assert!(batches.next().is_none() && batches.is_empty());

        let items: Vec<_> = failing(|| Error::Invalid("no more".into())).collect();
        assert_eq!(items.len(), 3);
        assert_eq!(items[2].as_ref().unwrap_err().to_string(), "no more");

        // The fields are public, so a data set can be inconsistent.
        let mut broken = InMemoryDataset::clone(&data);
        broken.train.pixels.truncate(5 * 3072);
        let items: Vec<_> = train_batches(&Arc::new(broken), 64, VARIED, 0, 0).collect();
        assert!(items.last().unwrap().is_err());

        let items: Vec<_> = train_batches(&data, 0, VARIED, 0, 0).collect();
        assert!(matches!(items.as_slice(), [Err(Error::Invalid(_))]));
        let items: Vec<_> = test_batches(&data, 0).collect();
        assert!(matches!(items.as_slice(), [Err(Error::Invalid(_))]));
    }
}
