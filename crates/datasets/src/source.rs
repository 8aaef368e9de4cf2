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

/// Where to take a data set from. Read from text (`"auto"`, `"synthetic"`, `"hub"`, anything else is a
/// folder) and written as the same text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Source {
    /// The first of:
    ///
    /// 1. the folder named by the environment variable `PFQ_DATA`, if it is set and not empty; it must then
    ///    hold CIFAR-100, for a wrong setting should not go unnoticed;
    /// 2. `./data`, in any form that [`Source::Folder`] reads (so `./data/cifar-100-binary/train.bin`
    ///    counts);
    /// 3. the hub, as [`Source::Hub`];
    /// 4. the synthetic data, announced by [`Event::FellBack`].
    ///
    /// A folder that holds a broken form of CIFAR-100 is an error, never a reason to look further, and so is
    /// a broken file in the hub's cache.
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
    /// Forms 1 to 3 are checked against the sizes and MD5 sums of the official files, archives and their
    /// members alike. Nothing is written.
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
    /// An archive is gone through for the positions of its members, which can take minutes.
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
    /// A file that would save time could not be written.
    NotKept {
        /// The file.
        file: String,
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
            Event::Trying { place } => write!(f, "looking for data in {place}"),
            Event::Skipped { place, why } => write!(f, "not using {place}: {why}"),
            Event::Download { file, done, total: 0 } => write!(f, "downloading {file}: {done} bytes"),
            Event::Download { file, done, total } => write!(f, "downloading {file}: {done} of {total} bytes"),
            Event::Unverified { why } => write!(f, "the data could not be verified: {why}"),
            Event::Indexing { archive } => write!(f, "finding the images in {archive}"),
            Event::Unpacking { table, archive } => write!(f, "unpacking {table} to {archive}"),
            Event::NotKept { file, why } => {
                write!(f, "{file} could not be written, so that it will be made again: {why}")
            }
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
/// Whatever keeps the asked-for source from being read completely and correctly; see [`Error`].
/// [`Source::Auto`] moves on only from places that hold no data at all.
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
            Err(error @ (Error::Hub { .. } | Error::Gated { .. } | Error::Offline { .. })) => {
                skip("the hub", error, on_event)
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Mood, Server, binary, images, manifest, write};
    use std::path::Path;
    use std::time::Duration;

    #[test]
    fn sources_are_read_and_written() {
        for text in ["auto", "synthetic", "hub", "some/folder"] {
            let source: Source = text.parse().unwrap();
            assert_eq!(source.to_string(), text);
            let json = serde_json::to_string(&source).unwrap();
            assert_eq!(json, format!("{text:?}"));
            assert_eq!(serde_json::from_str::<Source>(&json).unwrap(), source);
        }
        assert_eq!("auto".parse(), Ok(Source::Auto));
        assert_eq!("./hub".parse(), Ok(Source::Folder("./hub".into())));
    }

    fn search(root: &Path, server: &Server) -> Search {
        Search {
            required: None,
            folder: root.join("data"),
            hub: Hub {
                endpoint: Some(server.endpoint.clone()),
                cache: Some(root.join("cache")),
                token: None,
                offline: false,
                answer_timeout: Duration::from_secs(10),
                stall_timeout: Duration::from_secs(10),
            },
            manifest: manifest(b"", b""),
        }
    }

    fn run(search: &Search) -> (Result<Dataset>, Vec<Event>) {
        let mut events = Vec::new();
        let data = search.run(&mut |event| events.push(event));
        (data, events)
    }

    fn write_data(folder: &Path) {
        write(&folder.join("cifar-100-binary/train.bin"), &binary(3));
        write(&folder.join("cifar-100-binary/test.bin"), &binary(2));
    }

    #[test]
    fn auto_takes_the_first_place_that_has_data() {
        let (root, server) = (tempfile::tempdir().unwrap(), Server::start());
        let mut search = search(root.path(), &server);

        server.set(Mood::Empty);
        let (data, events) = run(&search);
        assert_eq!(data.unwrap().name, "synthetic");
        assert!(matches!(events.last(), Some(Event::FellBack { .. })), "{events:?}");
        assert!(events.last().unwrap().to_string().starts_with("NOT CIFAR-100: using SYNTHETIC data"));
        assert_eq!(events.iter().filter(|event| matches!(event, Event::Skipped { .. })).count(), 2);

        server.set(Mood::Good);
        let (data, events) = run(&search);
        assert_eq!(data.unwrap().train, images(3));
        assert_eq!(events.iter().filter(|event| matches!(event, Event::Skipped { .. })).count(), 1);

        write_data(&search.folder);
        server.requests();
        let (data, events) = run(&search);
        assert!(data.unwrap().source.contains("data"));
        assert!(matches!(events.as_slice(), [Event::Trying { .. }]), "{events:?}");
        assert!(server.requests().is_empty());

        let required = root.path().join("chosen");
        write_data(&required);
        search.required = Some(required);
        assert!(run(&search).0.unwrap().source.contains("chosen"));
    }

    #[test]
    fn auto_does_not_pass_over_what_is_broken() {
        let (root, server) = (tempfile::tempdir().unwrap(), Server::start());
        let mut search = search(root.path(), &server);
        write_data(&search.folder);
        write(&search.folder.join("cifar-100-binary/test.bin"), &binary(1));
        assert!(matches!(run(&search).0, Err(Error::WrongSize { .. })));
        // A wrong PFQ_DATA is an error too, even though there would be other places.
        search.required = Some(root.path().join("absent"));
        assert!(matches!(run(&search).0, Err(Error::NoData { .. })));
        assert!(server.requests().is_empty());

        search.required = None;
        search.folder = root.path().join("absent");
        server.set(Mood::Corrupting);
        assert!(matches!(run(&search).0, Err(Error::Malformed { .. })));
        // Offline without a cache, there is nothing but synthetic data.
        search.hub = Hub { offline: true, cache: Some(root.path().join("empty")), ..search.hub };
        assert_eq!(run(&search).0.unwrap().name, "synthetic");
    }

    #[test]
    fn load_goes_where_it_is_told() {
        let data = load(&Source::Synthetic, &mut |_| {}).unwrap();
        assert_eq!((data.name.as_str(), data.train.len(), data.test.len()), ("synthetic", 10_000, 2_000));
        let absent = Source::Folder("no/such/folder".into());
        assert!(matches!(load(&absent, &mut |_| {}), Err(Error::NoData { .. })));
    }
}
