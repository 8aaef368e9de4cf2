//! What can go wrong while loading or batching a data set.

use std::path::PathBuf;

/// The result of every function of this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. A message names the file or the argument, what was found, what was expected and, if there
/// is a remedy, what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A folder does not exist, or has CIFAR-100 in none of the forms that
    /// [`DataSource::Folder`](crate::DataSource::Folder) reads.
    #[error(
        "no CIFAR-100 in {folder}: {what}; unpack cifar-100-binary.tar.gz from \
         https://www.cs.toronto.edu/~kriz/cifar.html there"
    )]
    NoData {
        /// The folder that was searched.
        folder: PathBuf,
        /// What it lacks.
        what: String,
    },
    /// A folder does not exist, or has ImageNet in none of the forms that are read.
    #[error(
        "no ImageNet in {folder}: {what}; it needs train/ and val/ with a folder for each class, \
         ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or the parquet files of ILSVRC/imagenet-1k"
    )]
    NoImageNet {
        /// The folder that was searched.
        folder: PathBuf,
        /// What it lacks.
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
    /// More images cannot be used than `bad_percent` permits.
    #[error(
        "{bad} of {images} {split} images cannot be used, more than the {limit_percent} % that are tolerated \
         (bad_percent): the first is {first}; restore the files, or raise the limit"
    )]
    TooManyBad {
        /// `"training"` or `"test"`.
        split: &'static str,
        /// The number of images that have been found unusable so far.
        bad: usize,
        /// The number of images in the split.
        images: usize,
        /// The permitted percentage.
        limit_percent: f64,
        /// The first unusable image and what is wrong with it.
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
    /// The length of a file, or of an archive's member, is not that of the official one.
    #[error(
        "{file} has {found} bytes instead of {expected}: it is truncated or not the official file; \
         delete it and download it again"
    )]
    WrongSize {
        /// The file, or `archive: member`.
        file: String,
        /// Its length in bytes.
        found: u64,
        /// The length of the official file in bytes.
        expected: u64,
    },
    /// The contents of a file, or of an archive's member, are not those of the official one.
    #[error(
        "{file} has MD5 {found} instead of {expected}: it is corrupted or not the official file; \
         delete it and download it again"
    )]
    Checksum {
        /// The file, or `archive: member`.
        file: String,
        /// Its MD5 in lower-case hex.
        found: String,
        /// The MD5 of the official file in lower-case hex.
        expected: String,
    },
    /// A file cannot be decoded, or what it decodes to is not the data set.
    #[error("{file} cannot be used: {what}; delete it and download it again")]
    Malformed {
        /// The file, or `archive: member`.
        file: String,
        /// What was found and what was expected.
        what: String,
    },
    /// A cache of shrunk pictures is damaged, or is one of other pictures.
    #[error("the cache of pictures can't be used, as of {file}: {what}; {remedy}")]
    Cache {
        /// The file.
        file: PathBuf,
        /// What was found and what was expected.
        what: String,
        /// What to do.
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
    /// The hub gives no file, or the cache cannot be written.
    #[error(transparent)]
    Hub(#[from] hub::Error),
    /// An argument is unusable.
    #[error("{0}")]
    Invalid(String),
    /// The background thread that prepares batches did not start, or stopped unexpectedly.
    #[error("the batch loader stopped: {0}")]
    Loader(String),
    /// Candle could not make a tensor.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A kernel could not cut a batch out of the images.
    #[error(transparent)]
    Kernel(#[from] kernels::Error),
}

impl Error {
    /// For `map_err`: an error while reading `path`.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }

    /// For `map_err`: an error while writing `path`.
    pub(crate) fn write(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Write { path, source }
    }

    /// `file` cannot be decoded, or is not the data set.
    pub(crate) fn malformed(file: impl Into<String>, what: impl Into<String>) -> Error {
        Error::Malformed { file: file.into(), what: what.into() }
    }
}
