//! What training and evaluation need of a data set, whether it is in memory or read from files when it is
//! used.

use std::sync::Arc;

use crate::batches::{Augmentation, Batches, Epoch, Part, test_parts, train_parts};
use crate::memory::InMemoryDataset;

/// A data set to train on and to evaluate with: `Arc<InMemoryDataset>`, or
/// [`ImageNet`](crate::imagenet::ImageNet), which is read from files.
pub trait Dataset: Send + Sync {
    /// A short name such as `"cifar100"`. A part of a data set has another name than the whole.
    fn name(&self) -> &str;

    /// Where it comes from and which part of it was taken, for people to read.
    fn source(&self) -> &str;

    /// The number of classes. Labels lie in `0..classes`.
    fn classes(&self) -> usize;

    /// The number of training images.
    fn train_images(&self) -> usize;

    /// The number of test images.
    fn test_images(&self) -> usize;

    /// Rows and columns of the images in a batch.
    fn side(&self) -> (usize, usize);

    /// The mean of each channel that batches are normalized with. Full intensity is 1.
    fn mean(&self) -> [f32; 3];

    /// The standard deviation of each channel that batches are normalized with, in the same units.
    fn std(&self) -> [f32; 3];

    /// Hexadecimal digits that distinguish the images, their labels and their preparation from those of other
    /// data sets.
    fn fingerprint(&self) -> &str;

    /// The training batches of one epoch. They hold each training image once, in an order drawn from (seed,
    /// epoch); what is drawn for its augmentation depends on (seed, epoch, the image's index). A failure is
    /// the last item.
    fn train_batches(&self, batch: usize, augmentation: Augmentation, seed: u64, epoch: usize) -> Batches {
        self.train_parts(batch, Part::WHOLE, Epoch { augmentation, seed, epoch })
    }

    /// The test images in order. A failure is the last item.
    fn test_batches(&self, batch: usize) -> Batches {
        self.test_parts(batch, Part::WHOLE)
    }

    /// A part of each of [`Dataset::train_batches`]; parts without images are left out.
    fn train_parts(&self, batch: usize, part: Part, epoch: Epoch) -> Batches;

    /// A part of each of [`Dataset::test_batches`], likewise.
    fn test_parts(&self, batch: usize, part: Part) -> Batches;

    /// The whole set if it is in memory. An accelerator can then keep a copy of it.
    fn in_memory(&self) -> Option<&InMemoryDataset> {
        None
    }

    /// The images that have been left out so far because they cannot be used. A set in memory has none.
    fn skipped(&self) -> Vec<Skipped> {
        Vec::new()
    }
}

/// An image that is left out of training or of evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Its file, or its archive and member.
    pub file: String,
    /// What is wrong with it.
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
