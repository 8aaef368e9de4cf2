//! CIFAR-100, a synthetic stand-in, and ImageNet: loading, verification, augmentation, batches.
//!
//! [`load`] takes a data set from a folder, from the Hugging Face hub, or draws a synthetic one, and verifies
//! all of it before any of it is used. [`train_batches`] and [`test_batches`] turn it into normalized
//! tensors, prepared ahead in a background thread and yet a function of their arguments alone; a [`Feed`] makes the
//! same ones where the network is, on an accelerator from a copy of the images in its memory.
//! [`imagenet`] is read from files as it is used; [`Data`] is what it and the sets in memory have in common.
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
mod data;
mod dataset;
mod error;
mod feed;
mod folder;
mod hub;
pub mod imagenet;
mod pickle;
mod source;
mod synthetic;
mod table;
#[cfg(test)]
mod testing;

pub use batches::{Augmentation, Batch, Batches, test_batches, train_batches};
pub use data::{Data, Skipped};
pub use dataset::{Dataset, Images};
pub use error::{Error, Result};
pub use feed::Feed;
pub use hub::{Hub, load as load_hub};
pub use source::{Event, Source, load};
pub use synthetic::synthetic;
