//! What can go wrong while loading or batching a data set.

use std::path::PathBuf;

/// The result of everything fallible in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. Each message names the file or argument, what was found, what was expected and,
/// where there is something to do about it, what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A folder does not exist or holds none of the forms of CIFAR-100 that
    /// [`Source::Folder`](crate::Source::Folder) reads.
    #[error(
        "no CIFAR-100 in {folder}: {what}; unpack cifar-100-binary.tar.gz from \
         https://www.cs.toronto.edu/~kriz/cifar.html there"
    )]
    NoData {
        /// The folder that was searched.
        folder: PathBuf,
        /// That it does not exist, or what was looked for.
        what: String,
    },
    /// A folder holds no form of ImageNet.
    #[error(
        "no ImageNet in {folder}: {what}; it needs train/ and val/ with a folder for each class, \
         ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or the parquet files of ILSVRC/imagenet-1k"
    )]
    NoImageNet {
        /// The folder that was searched.
        folder: PathBuf,
        /// That it does not exist, or what was looked for.
        what: String,
    },
    /// A file that gives classes or labels cannot be used.
    #[error("{file} does not give the labels: {what}")]
    Labels {
        /// The file.
        file: PathBuf,
        /// What was found and what was expected.
        what: String,
    },
    /// More images are damaged than is tolerated.
    #[error(
        "{bad} of {images} {split} images cannot be used, more than the {limit_percent} % that are tolerated \
         (bad_percent): the first is {first}; restore the files, or raise the limit"
    )]
    TooManyBad {
        /// `"training"` or `"test"`.
        split: &'static str,
        /// How many were found damaged so far.
        bad: usize,
        /// The number of images in the split.
        images: usize,
        /// The percentage that is tolerated.
        limit_percent: f64,
        /// The first of them, with what is wrong with it.
        first: String,
    },
    /// One file of a form is there and the other one is not.
    #[error(
        "{path} is missing, although {beside} is there: unpack the archive again so that both are present"
    )]
    MissingFile {
        /// The file that is missing.
        path: PathBuf,
        /// The file whose presence says that `path` belongs there.
        beside: PathBuf,
    },
    /// An official file, or a member of an official archive, has the wrong length.
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
    /// An official file, or a member of an official archive, has the wrong contents.
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
    /// A file cannot be decoded, or decodes to something that is not the data set.
    #[error("{file} cannot be used: {what}; delete it and download it again")]
    Malformed {
        /// The file, or `archive: member`.
        file: String,
        /// What was found and what was expected.
        what: String,
    },
    /// The operating system refused to read or write.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The reason given.
        source: std::io::Error,
    },
    /// The operating system refused to write.
    #[error("cannot write {path}: {source}; make room there, or choose another folder")]
    Write {
        /// The file.
        path: PathBuf,
        /// The reason given.
        source: std::io::Error,
    },
    /// Offline mode is on and the file is not in the cache.
    #[error(
        "{file} of {repo} is not in the cache {cache} and HF_HUB_OFFLINE forbids downloading it: unset \
         HF_HUB_OFFLINE, or point HF_HOME at a cache that holds the file"
    )]
    Offline {
        /// The file within the repository.
        file: String,
        /// The repository.
        repo: String,
        /// The cache directory that was searched.
        cache: PathBuf,
    },
    /// The hub did not deliver a file.
    #[error(
        "cannot download {file} of {repo} from {endpoint}: {what}; check the network, or put the files into a \
         folder"
    )]
    Hub {
        /// The file within the repository.
        file: String,
        /// The repository.
        repo: String,
        /// The base address of the hub.
        endpoint: String,
        /// What happened.
        what: String,
    },
    /// The hub refused a file for want of a token, or of access for its account.
    #[error(
        "{endpoint} refused {file} of {repo} ({what}): if that data set is given only to those who have accepted \
         its terms, do so at {endpoint}/datasets/{repo}; then make a token for reading at \
         {endpoint}/settings/tokens, and put it into the environment variable HF_TOKEN, or log in with \
         `hf auth login`, which keeps it in the file `token` in HF_HOME (~/.cache/huggingface by default)"
    )]
    Gated {
        /// The file within the repository.
        file: String,
        /// The repository.
        repo: String,
        /// The base address of the hub.
        endpoint: String,
        /// Whether there was no valid token or one without access, and the hub's own words.
        what: String,
    },
    /// An argument, or data handed to the library, is unusable.
    #[error("{0}")]
    Invalid(String),
    /// The background thread that prepares batches could not start or stopped unexpectedly.
    #[error("the batch loader stopped: {0}")]
    Loader(String),
    /// A tensor could not be made.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A batch could not be cut out of the images.
    #[error(transparent)]
    Kernel(#[from] kernels::Error),
}

impl Error {
    /// For `map_err`: an input/output error on `path`.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }

    /// For `map_err`: an output error on `path`.
    pub(crate) fn write(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Write { path, source }
    }

    /// Undecodable contents of `file`.
    pub(crate) fn malformed(file: impl Into<String>, what: impl Into<String>) -> Error {
        Error::Malformed { file: file.into(), what: what.into() }
    }
}

/// The message of a panic caught at a thread's or call's boundary.
pub(crate) fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic").to_string()
}
