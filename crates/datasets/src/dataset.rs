//! The interface of data sets, which are in memory or are read from files when they are used.

use std::sync::Arc;

use crate::batches::{Augmentation, Batches, Epoch, Part, test_parts, train_parts};
use crate::error::Result;
use crate::event::Event;
use crate::memory::InMemoryDataset;

/// A data set for training and evaluation: `Arc<InMemoryDataset>`, or
/// [`ImageNet`](crate::imagenet::ImageNet), which is read from files.
pub trait Dataset: Send + Sync {
    /// Returns a short name such as `"cifar100"`. A part of a data set has a name of its own.
    fn name(&self) -> &str;

    /// Returns the origin and the selected part of the data, as text for users.
    fn source(&self) -> &str;

    /// Returns what the data are and where they are from, as text for users.
    fn title(&self) -> String {
        format!("{} from {}", self.name(), self.source())
    }

    /// Checks that a network can be trained and tested on the images, and makes what reading them
    /// needs, such as a cache. Loading makes nothing of that kind.
    ///
    /// A cache that is needed earlier is made then, without reports of the progress.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) if there are no training or test images, or no
    /// training images of a class; an error of making the cache.
    fn prepare(&self, _on_event: &mut dyn FnMut(Event)) -> Result<()> {
        Ok(())
    }

    /// Returns the number of classes. Labels lie in `0..classes`.
    fn classes(&self) -> usize;

    /// Returns the number of training images.
    fn train_images(&self) -> usize;

    /// Returns the number of test images.
    fn test_images(&self) -> usize;

    /// Returns the numbers of rows and columns of the images in a batch.
    fn side(&self) -> (usize, usize);

    /// Returns the mean of each channel that normalizes batches. Full intensity is 1.
    fn mean(&self) -> [f32; 3];

    /// Returns the standard deviation of each channel that normalizes batches, in the same units.
    fn std(&self) -> [f32; 3];

    /// Returns a hash as hex digits that identifies the images, their labels and their preparation.
    fn fingerprint(&self) -> &str;

    /// Returns the training batches of one epoch.
    ///
    /// They hold each training image once, in an order drawn from `(seed, epoch)`. The random
    /// numbers of an image's augmentation depend on `(seed, epoch, the image's index)`. A failure
    /// is the last item.
    fn train_batches(&self, batch: usize, augmentation: Augmentation, seed: u64, epoch: usize) -> Batches {
        self.train_parts(batch, Part::WHOLE, Epoch { augmentation, seed, epoch })
    }

    /// Returns batches of the test images in order. A failure is the last item.
    fn test_batches(&self, batch: usize) -> Batches {
        self.test_parts(batch, Part::WHOLE)
    }

    /// Returns a part of each batch of [`Dataset::train_batches`], without empty parts.
    fn train_parts(&self, batch: usize, part: Part, epoch: Epoch) -> Batches;

    /// Returns a part of each batch of [`Dataset::test_batches`], without empty parts.
    fn test_parts(&self, batch: usize, part: Part) -> Batches;

    /// Returns the whole set if it is in memory. An accelerator can then keep a copy of it.
    fn in_memory(&self) -> Option<&InMemoryDataset> {
        None
    }

    /// Returns the images that have been left out so far because they cannot be used. A set in
    /// memory has none.
    fn skipped(&self) -> Vec<Skipped> {
        Vec::new()
    }
}

/// An image that is left out of training or evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The file, or the archive and its member.
    pub file: String,
    /// The reason why the image cannot be used.
    pub why: String,
}

impl Dataset for Arc<InMemoryDataset> {
    fn name(&self) -> &str {
        &self.name
    }

    fn source(&self) -> &str {
        &self.source
    }

    fn classes(&self) -> usize {
        self.classes
    }

    fn train_images(&self) -> usize {
        self.train.len()
    }

    fn test_images(&self) -> usize {
        self.test.len()
    }

    fn side(&self) -> (usize, usize) {
        (self.train.height, self.train.width)
    }

    fn mean(&self) -> [f32; 3] {
        self.mean
    }

    fn std(&self) -> [f32; 3] {
        self.std
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn train_parts(&self, batch: usize, part: Part, epoch: Epoch) -> Batches {
        train_parts(self, batch, part, epoch)
    }

    fn test_parts(&self, batch: usize, part: Part) -> Batches {
        test_parts(self, batch, part)
    }

    fn in_memory(&self) -> Option<&InMemoryDataset> {
        Some(self)
    }
}
