//! CIFAR-100, a synthetic stand-in, and ImageNet: loading, verification, augmentation, batches.
//!
//! [`load`] loads CIFAR-100 from a folder or from the Hugging Face hub, or draws a synthetic set,
//! and verifies all of it before any of it is used. [`train_batches`] and [`test_batches`] turn it
//! into normalized tensors. A background thread prepares them, but they depend only on the
//! arguments. A [`Feed`] gives the same batches on the network's device; on an accelerator it makes
//! them from a copy of the images in the device's memory. [`imagenet`] reads its pictures from
//! files when they are used. [`Dataset`] is the common interface.
//!
//! ```
//! # fn main() -> datasets::Result<()> {
//! use std::sync::Arc;
//! let data = Arc::new(datasets::synthetic(200, 100, 7)?);
//! for batch in datasets::train_batches(&data, 64, datasets::Augmentation { pad: 4, flip: true }, 7, 0) {
//!     let batch = batch?;
//!     assert_eq!(batch.images.dims()[1..], [32, 32, 3]);
//! }
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod batches;
mod cifar;
mod dataset;
mod error;
mod event;
mod feed;
mod folder;
mod from_hub;
pub mod imagenet;
mod memory;
mod pickled;
mod source;
mod subset;
mod synthetic;
mod table;
#[cfg(test)]
mod testing;
mod text;

pub use batches::{Augmentation, Batch, Batches, Epoch, Part, test_batches, train_batches};
pub use dataset::{Dataset, Skipped};
pub use error::{Error, Result};
pub use event::Event;
pub use feed::Feed;
pub use memory::{Images, InMemoryDataset};
pub use source::{DataSource, load};
pub use synthetic::synthetic;
