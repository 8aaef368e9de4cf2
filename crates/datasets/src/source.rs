//! Where data come from, and what loading has to tell.

use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::cifar::Manifest;
use crate::dataset::Dataset;
use crate::error::{Error, Result};
use crate::folder;
use crate::hub::{self, Hub};
use crate::synthetic;

/// The folder that [`Source::Auto`] searches if `PFQ_DATA` is not set.
const FOLDER: &str = "data";

/// Where to take a data set from. Read from text (`"auto"`, `"synthetic"`, `"hub"`, anything else is a folder) and
/// written as the same text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Source {
    /// The first of:
    ///
    /// 1. the folder named by the environment variable `PFQ_DATA`, if it is set and not empty; it must then hold
    ///    CIFAR-100, for a wrong setting should not go unnoticed;
    /// 2. `./data`, in any form that [`Source::Folder`] reads (so `./data/cifar-100-binary/train.bin` counts);
    /// 3. the hub, as [`Source::Hub`];
    /// 4. the synthetic data, announced by [`Event::FellBack`].
    ///
    /// A folder that holds a broken form of CIFAR-100 is an error, never a reason to look further, and so is a
    /// broken file in the hub's cache.
    #[default]
    Auto,
    /// The procedurally drawn stand-in, see [`synthetic`](crate::synthetic()).
    Synthetic,
    /// CIFAR-100 in this folder, in the first form that is there:
    ///
    /// 1. `train.bin` and `test.bin`, in the folder or in `cifar-100-binary/` under it;
    /// 2. the pickles `cifar-100-python/train` and `cifar-100-python/test`;
    /// 3. `cifar-100-binary.tar.gz`, then `cifar-100-python.tar.gz`;
    /// 4. the hub's `cifar100/train-00000-of-00001.parquet` and `cifar100/test-00000-of-00001.parquet`.
    ///
    /// The folder may also be `cifar-100-python` or `cifar100` itself.
    ///
    /// Forms 1 to 3 are checked against the sizes and MD5 sums of the official files, archives and their members
    /// alike. Nothing is written.
    Folder(PathBuf),
    /// `uoft-cs/cifar100` on the Hugging Face hub, from its cache or downloaded to it, see [`Hub::from_env`].
    Hub,
}

impl FromStr for Source {
    type Err = Infallible;

    fn from_str(text: &str) -> std::result::Result<Source, Infallible> {
        Ok(Source::from(text.to_string()))
    }
}

impl From<String> for Source {
    fn from(text: String) -> Source {
        match text.as_str() {
            "auto" => Source::Auto,
            "synthetic" => Source::Synthetic,
            "hub" => Source::Hub,
            _ => Source::Folder(text.into()),
        }
    }
}

impl From<Source> for String {
    fn from(source: Source) -> String {
        source.to_string()
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Auto => f.write_str("auto"),
            Source::Synthetic => f.write_str("synthetic"),
            Source::Hub => f.write_str("hub"),
            Source::Folder(folder) => write!(f, "{}", folder.display()),
        }
    }
}

/// What loading has to tell while it is at work. The text of `Display` is fit to be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A place is being read or asked.
    Trying {
        /// The place.
        place: String,
    },
    /// A place has no data, and the next one is tried.
    Skipped {
        /// The place.
        place: String,
        /// Why it was left.
        why: String,
    },
    /// A download moves on. There can be many of these, several a second.
    Download {
        /// The file within the repository.
        file: String,
        /// Bytes that have arrived.
        done: u64,
        /// Bytes to arrive; 0 if unknown.
        total: u64,
    },
    /// The data decode well and have the right form, but cannot be shown to be the official pictures in their
    /// order.
    Unverified {
        /// Why not.
        why: String,
    },
    /// No real data were found and synthetic data are used instead: results say nothing about CIFAR-100. Show
    /// this one loudly.
    FellBack {
        /// What was tried.
        why: String,
    },
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::Trying { place } => write!(f, "looking for CIFAR-100 in {place}"),
            Event::Skipped { place, why } => write!(f, "not using {place}: {why}"),
            Event::Download { file, done, total: 0 } => write!(f, "downloading {file}: {done} bytes"),
            Event::Download { file, done, total } => write!(f, "downloading {file}: {done} of {total} bytes"),
            Event::Unverified { why } => write!(f, "the data could not be verified: {why}"),
            Event::FellBack { why } => {
                write!(f, "NOT CIFAR-100: using SYNTHETIC data, since no real data were found ({why})")
            }
        }
    }
}

/// Loads a data set. `on_event` is told what happens on the way; nothing is printed.
///
/// # Errors
///
/// Whatever keeps the asked-for source from being read completely and correctly; see [`Error`]. [`Source::Auto`]
/// moves on only from places that hold no data at all.
pub fn load(source: &Source, on_event: &mut dyn FnMut(Event)) -> Result<Dataset> {
    match source {
        Source::Auto => Search::from_env().run(on_event),
        Source::Synthetic => synthetic::default(),
        Source::Folder(folder) => folder::load(folder, &Manifest::official(), on_event),
        Source::Hub => hub::load(&Hub::from_env(), on_event),
    }
}

/// The places of [`Source::Auto`], apart from the environment so that tests can choose them.
struct Search {
    /// The folder that must hold data.
    required: Option<PathBuf>,
    /// The folder that may.
    folder: PathBuf,
    hub: Hub,
    manifest: Manifest,
}

impl Search {
    fn from_env() -> Search {
        Search {
            required: std::env::var_os("PFQ_DATA").filter(|value| !value.is_empty()).map(PathBuf::from),
            folder: FOLDER.into(),
            hub: Hub::from_env(),
            manifest: Manifest::official(),
        }
    }

    fn run(&self, on_event: &mut dyn FnMut(Event)) -> Result<Dataset> {
        if let Some(folder) = &self.required {
            return folder::load(folder, &self.manifest, on_event);
        }
        match folder::load(&self.folder, &self.manifest, on_event) {
            Err(error @ Error::NoData { .. }) => skip(self.folder.display(), error, on_event),
            done => return done,
        }
        match hub::load_with(&self.hub, &self.manifest, on_event) {
            Err(error @ (Error::Hub { .. } | Error::Offline { .. })) => skip("the hub", error, on_event),
            done => return done,
        }
        let why = format!(
            "neither in the folder {} nor on the hub, and PFQ_DATA is not set",
            self.folder.display()
        );
        on_event(Event::FellBack { why });
        synthetic::default()
    }
}

/// Tells that a place has no data.
fn skip(place: impl fmt::Display, error: Error, on_event: &mut dyn FnMut(Event)) {
    on_event(Event::Skipped { place: place.to_string(), why: error.to_string() });
}
