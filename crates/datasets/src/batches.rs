//! Augmentation and batches, prepared ahead of their use in a background thread.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use candle_core::{Device, Tensor};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::dataset::{CHANNELS, Dataset, Images};
use crate::error::{Error, Result, panic_message};

/// Batches that wait in the channel; one more is in the making.
const AHEAD: usize = 2;

/// How training images are varied.
///
/// An image is padded with `pad` black pixels on every side, a window of the original size is cut out at a uniformly
/// drawn place, and if `flip` the window is mirrored left to right with probability one half. The padding is black
/// *before* normalization, (0 - mean) / std after it, as when a crop of the stored bytes precedes the conversion to
/// numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Augmentation {
    /// Pixels added on every side before the crop; 0 leaves the image in place.
    pub pad: usize,
    /// Whether half of the images, at random, are mirrored left to right.
    pub flip: bool,
}

impl Augmentation {
    /// Images as they are.
    pub fn none() -> Augmentation {
        Augmentation { pad: 0, flip: false }
    }

    /// The view of training image `index` in `epoch`: a function of the arguments only, so that neither the order of
    /// the images nor the batch size matters to it.
    fn view(self, seed: u64, epoch: usize, index: usize) -> View {
        if self == Augmentation::none() {
            return View::default();
        }
        let mut rng = rng(seed, epoch, Purpose::Augment);
        // Each image gets a stream of its own under the epoch's key.
        rng.set_stream(index as u64);
        let span = 2 * self.pad as u64;
        let mut offset = || rng.random_range(0..=span) as isize - self.pad as isize;
        let (top, left) = (offset(), offset());
        View { top, left, flip: self.flip && rng.random() }
    }
}

/// Images ready for a model.
#[derive(Clone, Debug)]
pub struct Batch {
    /// f32 `[n, height, width, channels]` on the CPU: (x / 255 - mean) / std with the data set's statistics.
    pub images: Tensor,
    /// u32 `[n]` on the CPU: the classes.
    pub labels: Tensor,
}

/// The training batches of one epoch.
///
/// The order is a permutation drawn from `(seed, epoch)`, and each image is varied by `(seed, epoch, its index)` only,
/// so an epoch is the same however often and however fast it is consumed. Every image appears exactly once; the last
/// batch is short if `batch` does not divide their number, unless [`Batches::drop_last`] is asked for.
///
/// An unusable `batch` (0) is reported by the first item.
pub fn train_batches(
    data: &Arc<Dataset>,
    batch: usize,
    augmentation: Augmentation,
    seed: u64,
    epoch: usize,
) -> Batches {
    let mut order: Vec<usize> = (0..data.train.len()).collect();
    order.shuffle(&mut rng(seed, epoch, Purpose::Shuffle));
    let data = Arc::clone(data);
    let table = Normalization::new(&data);
    Batches::start(order.len(), batch, move |range| {
        let views = order[range].iter().map(|&i| (i, augmentation.view(seed, epoch, i)));
        assemble(&data.train, &table, views)
    })
}

/// The test images in order and as they are, including the last, possibly short, batch.
///
/// An unusable `batch` (0) is reported by the first item.
pub fn test_batches(data: &Arc<Dataset>, batch: usize) -> Batches {
    let data = Arc::clone(data);
    let table = Normalization::new(&data);
    Batches::start(data.test.len(), batch, move |range| {
        assemble(&data.test, &table, range.map(|i| (i, View::default())))
    })
}

/// Batches in the making: a background thread prepares up to three of them ahead. Dropping this stops the thread.
///
/// If the thread fails, the failure is the next item and the last one; an epoch never just ends early.
#[derive(Debug)]
pub struct Batches {
    /// `None` once the thread was told to stop.
    receiver: Option<Receiver<Result<Batch>>>,
    worker: Option<JoinHandle<()>>,
    failure: Option<Error>,
    remaining: usize,
    last_is_short: bool,
}

impl Batches {
    /// `images` images in batches of `batch`, each made by `make` from the positions that it covers.
    fn start(
        images: usize,
        batch: usize,
        mut make: impl FnMut(Range<usize>) -> Result<Batch> + Send + 'static,
    ) -> Batches {
        if batch == 0 {
            return Batches::failed(Error::Invalid("a batch must hold at least one image".into()));
        }
        let (sender, receiver) = sync_channel(AHEAD);
        let worker = std::thread::Builder::new().name("batches".into()).spawn(move || {
            for start in (0..images).step_by(batch) {
                let made = make(start..images.min(start + batch));
                let failed = made.is_err();
                // A failing send means that nobody wants more.
                if sender.send(made).is_err() || failed {
                    return;
                }
            }
        });
        match worker {
            Err(error) => Batches::failed(Error::Loader(format!("no thread: {error}"))),
            Ok(worker) => Batches {
                receiver: Some(receiver),
                worker: Some(worker),
                failure: None,
                remaining: images.div_ceil(batch),
                last_is_short: !images.is_multiple_of(batch),
            },
        }
    }

    /// Nothing but one error.
    fn failed(error: Error) -> Batches {
        Batches { receiver: None, worker: None, failure: Some(error), remaining: 1, last_is_short: false }
    }

    /// Leaves out the last batch if it is short. To be called before the first item is taken.
    pub fn drop_last(mut self) -> Batches {
        self.remaining -= usize::from(std::mem::take(&mut self.last_is_short));
        self
    }

    /// The number of batches still to come, if nothing fails.
    pub fn len(&self) -> usize {
        self.remaining
    }

    /// Whether no batch is to come.
    pub fn is_empty(&self) -> bool {
        self.remaining == 0
    }

    /// Ends the thread and returns the message of its panic, if it had one.
    fn stop(&mut self) -> Option<String> {
        self.receiver = None;
        self.worker.take()?.join().err().map(|payload| panic_message(&*payload))
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
        if self.remaining == 0 {
            return None;
        }
        if let Some(error) = self.failure.take() {
            return self.fail(error);
        }
        match self.receiver.as_ref().map(Receiver::recv) {
            Some(Ok(Ok(batch))) => {
                self.remaining -= 1;
                Some(Ok(batch))
            }
            Some(Ok(Err(error))) => self.fail(error),
            Some(Err(_)) | None => {
                let why = self.stop().unwrap_or_else(|| "its thread ended early".into());
                self.fail(Error::Loader(why))
            }
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        // A failure ends the iteration early, yet is an item itself.
        (self.remaining.min(1), Some(self.remaining))
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What random numbers are for; each purpose has a sequence of its own.
#[derive(Clone, Copy)]
enum Purpose {
    Shuffle = 1,
    Augment = 2,
}

/// The generator of one epoch and purpose.
fn rng(seed: u64, epoch: usize, purpose: Purpose) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&(epoch as u64).to_le_bytes());
    key[16] = purpose as u8;
    ChaCha8Rng::from_seed(key)
}

/// Where an output image lies in its source: output pixel (y, x) is source pixel (y + top, x + left), after which the
/// output is mirrored if `flip`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct View {
    top: isize,
    left: isize,
    flip: bool,
}

/// The normalized value of every byte, per channel: one look-up instead of a conversion, a subtraction and a division.
struct Normalization([[f32; 256]; CHANNELS]);

impl Normalization {
    fn new(data: &Dataset) -> Normalization {
        Normalization(std::array::from_fn(|c| {
            std::array::from_fn(|value| (value as f32 / 255.0 - data.mean[c]) / data.std[c])
        }))
    }

    /// Writes one pixel.
    #[inline]
    fn pixel(&self, source: &[u8; CHANNELS], target: &mut [f32; CHANNELS]) {
        for c in 0..CHANNELS {
            target[c] = self.0[c][usize::from(source[c])];
        }
    }

    /// Writes the view of an image of the given width (`[height, width, 3]`, as is `target`).
    fn image(&self, source: &[u8], width: usize, view: View, target: &mut [f32]) {
        let mut black = [0.0; CHANNELS];
        self.pixel(&[0; CHANNELS], &mut black);
        let (source, _) = source.as_chunks::<CHANNELS>();
        let (target, _) = target.as_chunks_mut::<CHANNELS>();
        let height = source.len() / width;
        // The columns of the output that lie within the source.
        let begin = view.left.min(0).unsigned_abs().min(width);
        let end = width.saturating_sub(view.left.max(0).unsigned_abs()).max(begin);
        for (y, row) in target.chunks_exact_mut(width).enumerate() {
            // Black first, then the part that lies within the source.
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

/// The batch of the given images.
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
    let shape = (n, images.height, images.width, images.channels);
    Ok(Batch {
        images: Tensor::from_vec(pixels, shape, &Device::Cpu)?,
        labels: Tensor::from_vec(labels, n, &Device::Cpu)?,
    })
}
