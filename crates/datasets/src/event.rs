//! Progress reports of loading.

use std::fmt;

/// A progress report of loading. `Display` gives a text for users.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A place is searched for data.
    Trying {
        /// The place.
        place: String,
    },
    /// A place has no data, so the next place is searched.
    NoData {
        /// The place.
        place: String,
        /// What was found there, or why nothing could be found.
        why: String,
    },
    /// A download has made progress. This event can come several times a second.
    Download {
        /// The file within the repository.
        file: String,
        /// The number of bytes that have arrived.
        done: u64,
        /// The number of bytes of the whole file; 0 if it is unknown.
        total: u64,
    },
    /// The data have the right format, but may not be the official pictures in official order.
    Unverified {
        /// The reason.
        why: String,
    },
    /// Classes have training images but no test images.
    Untested {
        /// The classes, as text.
        classes: String,
    },
    /// An archive is searched for the positions of its members. This can take minutes.
    Indexing {
        /// The archive.
        archive: String,
    },
    /// A parquet file is unpacked into an archive.
    Unpacking {
        /// The parquet file.
        table: String,
        /// The tar file.
        archive: String,
    },
    /// One part of the pictures is decoded and shrunk into a cache. A cache can have many parts.
    Shrinking {
        /// The folder of the cache.
        folder: String,
        /// `training` or `test`.
        split: String,
        /// The number of the split's pictures that are already done.
        done: usize,
        /// The number of pictures in the split.
        total: usize,
    },
    /// A file that saves time at the next start could not be written.
    NotKept {
        /// The file.
        file: String,
        /// The reason.
        why: String,
    },
    /// No real data were found, so synthetic data are used and results say nothing about CIFAR-100.
    /// Show this event prominently.
    FellBack {
        /// The places where real data were searched.
        why: String,
    },
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::Trying { place } => write!(f, "looking for data in {place}"),
            Event::NoData { place, why } => write!(f, "not using {place}: {why}"),
            Event::Download { file, done, total: 0 } => write!(f, "downloading {file}: {done} bytes"),
            Event::Download { file, done, total } => write!(f, "downloading {file}: {done} of {total} bytes"),
            Event::Unverified { why } => write!(f, "the data could not be verified: {why}"),
            Event::Untested { classes } => {
                write!(f, "test accuracies say nothing about {classes}, as there are no test images")
            }
            Event::Indexing { archive } => write!(f, "finding the images in {archive}"),
            Event::Unpacking { table, archive } => write!(f, "unpacking {table} to {archive}"),
            Event::Shrinking { folder, split, done, total } => {
                write!(f, "shrinking pictures into {folder}: {done} of {total} {split} pictures are done")
            }
            Event::NotKept { file, why } => {
                write!(f, "{file} could not be written, so it will be made again: {why}")
            }
            Event::FellBack { why } => {
                write!(f, "NOT CIFAR-100: using SYNTHETIC data, since no real data were found ({why})")
            }
        }
    }
}
