//! Errors of accessing files on the hub.

use std::path::PathBuf;

/// The result of every function of this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of accessing the hub. Messages name the file, what was found and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file is not in the cache, and offline mode forbids downloading it.
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
    /// The hub did not send a file.
    #[error("cannot download {file} of {repo} from {endpoint}: {what}; {remedy}")]
    Failed {
        /// The file within the repository.
        file: String,
        /// The repository.
        repo: String,
        /// The base address of the hub.
        endpoint: String,
        /// What happened.
        what: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The hub refuses to send a file without a token, or to the token's account.
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
        /// What is missing, a valid token or the account's access, and the hub's own message.
        what: String,
    },
    /// The operating system could not write into the cache.
    #[error("cannot write {path}: {source}; make room there, or choose another folder")]
    Write {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The asynchronous runtime for requests could not be created.
    #[error("requests to the hub are impossible: {0}")]
    Runtime(std::io::Error),
}

impl Error {
    /// Returns a function for `map_err` that makes an error while writing `path`.
    pub(crate) fn write(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Write { path, source }
    }
}
