//! What training and evaluation need of a data set, be it in memory or read from files as it is used.

use std::sync::Arc;

use crate::batches::{Augmentation, Batches, test_batches, train_batches};
use crate::dataset::Dataset;

/// A data set to train on and to evaluate with. `Arc<Dataset>` (in memory) and
/// [`ImageNet`](crate::imagenet::ImageNet) (read from files) are such.
pub trait Data: Send + Sync {
    /// Its short name, such as `"cifar100"`; that of a part of it is another.
    fn name(&self) -> &str;

    /// Where it comes from and what was taken of it, for people to read.
    fn source(&self) -> &str;

    /// The number of classes; labels lie in `0..classes`.
    fn classes(&self) -> usize;

    /// The number of training images.
    fn train_images(&self) -> usize;

    /// The number of test images.
    fn test_images(&self) -> usize;

    /// Rows and columns of the images in a batch.
    fn side(&self) -> (usize, usize);

    /// The mean of each channel that batches are normalized with, full intensity being 1.
    fn mean(&self) -> [f32; 3];

    /// The standard deviation of each channel that batches are normalized with, in the same units.
    fn std(&self) -> [f32; 3];

    /// What tells the images, their labels and their preparation from those of other data sets: hexadecimal
    /// digits.
    fn fingerprint(&self) -> &str;

    /// The training batches of one epoch, each training image once, in an order drawn from (seed, epoch),
    /// augmented by what is drawn from (seed, epoch, the image's index). A failure is the last item.
    fn train_batches(&self, batch: usize, augmentation: Augmentation, seed: u64, epoch: usize) -> Batches;

    /// The test images in order. A failure is the last item.
    fn test_batches(&self, batch: usize) -> Batches;

    /// The whole set, if it is in memory: a copy of it can then stay in an accelerator's.
    fn in_memory(&self) -> Option<&Dataset> {
        None
    }

    /// The images that were left out so far because they could not be used. In memory there are none.
    fn skipped(&self) -> Vec<Skipped> {
        Vec::new()
    }
}

/// An image that was left out of training or of evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Its file, or archive and member.
    pub file: String,
    /// What is wrong with it.
    pub why: String,
}

impl Data for Arc<Dataset> {
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

    fn train_batches(&self, batch: usize, augmentation: Augmentation, seed: u64, epoch: usize) -> Batches {
        train_batches(self, batch, augmentation, seed, epoch)
    }

    fn test_batches(&self, batch: usize) -> Batches {
        test_batches(self, batch)
    }

    fn in_memory(&self) -> Option<&Dataset> {
        Some(self)
    }
}
