//! What loading reports while it works.

use std::fmt;

/// What loading reports while it works. `Display` gives a text to show to people.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A place is searched for data.
    Trying {
        /// The place.
        place: String,
    },
    /// A place has no data; the next one follows.
    NoData {
        /// The place.
        place: String,
        /// What was found there, or why nothing could be.
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
    /// The data have the right form, but they are not known to be the official pictures in their official
    /// order.
    Unverified {
        /// Why not.
        why: String,
    },
    /// An archive is searched for the positions of its members. This can take minutes.
    Indexing {
        /// The archive.
        archive: String,
    },
    /// A table is unpacked into an archive.
    Unpacking {
        /// The parquet file.
        table: String,
        /// The tar file.
        archive: String,
    },
    /// Pictures are decoded and shrunk into a cache: a part of it, of which there may be many.
    Shrinking {
        /// The folder of the cache.
        folder: String,
        /// `training` or `test`.
        split: String,
        /// The number of the split's pictures that are there already.
        done: usize,
        /// The number of the split's pictures.
        total: usize,
    },
    /// A file that saves time at the next start could not be written.
    NotKept {
        /// The file.
        file: String,
        /// Why not.
        why: String,
    },
    /// No real data were found, so synthetic data are used: results say nothing about CIFAR-100. Show this
    /// event loudly.
    FellBack {
        /// Where real data were looked for.
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
