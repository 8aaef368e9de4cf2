//! Errors of loading and batching a data set.

use std::path::PathBuf;

/// The result of the functions of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate. Its message names the file or the argument, what was found, what was
/// expected and, if there is a remedy, what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A folder does not exist, or does not hold CIFAR-100 in any format that
    /// [`DataSource::Folder`](crate::DataSource::Folder) reads.
    #[error(
        "no CIFAR-100 in {folder}: {what}; unpack cifar-100-binary.tar.gz from \
         https://www.cs.toronto.edu/~kriz/cifar.html there"
    )]
    NoData {
        /// The folder that was searched.
        folder: PathBuf,
        /// What is missing there.
        what: String,
    },
    /// A folder does not exist, or does not hold pictures in any supported format.
    #[error(
        "no pictures in {folder}: {what}; expected train/CLASS/* and val/CLASS/*, or ImageNet's \
         ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or the parquet files of ILSVRC/imagenet-1k"
    )]
    NoImageNet {
        /// The folder that was searched.
        folder: PathBuf,
        /// What is missing there.
        what: String,
    },
    /// A file does not give the classes or the labels that it should.
    #[error("{file} does not give the labels: {what}")]
    Labels {
        /// The file.
        file: PathBuf,
        /// What was found and what was expected.
        what: String,
    },
    /// More images are unusable than `bad_percent` permits.
    #[error(
        "{bad} of {images} {split} images cannot be used, more than the {limit_percent} % that are tolerated: the \
         first is {first}; restore the files, or raise the limit (--bad-percent of pfq, bad_percent in a settings \
         file)"
    )]
    TooManyBad {
        /// `"training"` or `"test"`.
        split: &'static str,
        /// The number of unusable images found so far.
        bad: usize,
        /// The number of images in the split.
        images: usize,
        /// The permitted percentage.
        limit_percent: f64,
        /// The first unusable image and the reason why it cannot be used.
        first: String,
    },
    /// Only one of two files that belong together exists.
    #[error(
        "{path} is missing, although {beside} is there: unpack the archive again so that both are present"
    )]
    MissingFile {
        /// The file that is missing.
        path: PathBuf,
        /// The file that exists.
        beside: PathBuf,
    },
    /// A file or an archive's member does not have the length of the official file.
    #[error(
        "{file} has {found} bytes instead of {expected}: it is truncated or not the official file; \
         delete it and download it again"
    )]
    WrongSize {
        /// The file, or `archive: member`.
        file: String,
        /// The length of the file in bytes.
        found: u64,
        /// The length of the official file in bytes.
        expected: u64,
    },
    /// A file or an archive's member does not have the checksum of the official file.
    #[error(
        "{file} has MD5 {found} instead of {expected}: it is corrupted or not the official file; \
         delete it and download it again"
    )]
    Checksum {
        /// The file, or `archive: member`.
        file: String,
        /// The MD5 of the file as lower-case hex digits.
        found: String,
        /// The MD5 of the official file as lower-case hex digits.
        expected: String,
    },
    /// A file cannot be decoded, or its contents are not the data set.
    #[error("{file} cannot be used: {what}; delete it and download it again")]
    Malformed {
        /// The file, or `archive: member`.
        file: String,
        /// What was found and what was expected.
        what: String,
    },
    /// A cache of shrunk pictures is damaged, or was made from other pictures.
    #[error("the cache of pictures can't be used, as of {file}: {what}; {remedy}")]
    Cache {
        /// The file.
        file: PathBuf,
        /// What was found and what was expected.
        what: String,
        /// The remedy.
        remedy: &'static str,
    },
    /// The operating system could not read a file.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The operating system could not write a file.
    #[error("cannot write {path}: {source}; make room there, or choose another folder")]
    Write {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The hub does not deliver a file, or the hub's cache cannot be written.
    #[error(transparent)]
    Hub(#[from] hub::Error),
    /// An argument is invalid.
    #[error("{0}")]
    Invalid(String),
    /// The background thread that prepares batches did not start, or stopped unexpectedly.
    #[error("the batch loader stopped: {0}")]
    Loader(String),
    /// Candle could not make a tensor.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A kernel could not make a batch of the images.
    #[error(transparent)]
    Kernel(#[from] kernels::Error),
}

impl Error {
    /// Returns a function for `map_err` that wraps an error of reading `path`.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }

    /// Returns a function for `map_err` that wraps an error of writing `path`.
    pub(crate) fn write(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Write { path, source }
    }

    /// Returns the error that `file` cannot be decoded, or is not the data set.
    pub(crate) fn malformed(file: impl Into<String>, what: impl Into<String>) -> Error {
        Error::Malformed { file: file.into(), what: what.into() }
    }
}
