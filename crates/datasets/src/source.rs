//! The sources from which CIFAR-100 can be loaded.

use std::fmt;
use std::path::PathBuf;

use hub::Hub;

use crate::cifar::Manifest;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::folder;
use crate::from_hub;
use crate::memory::InMemoryDataset;
use crate::synthetic;

/// The folder that [`DataSource::Auto`] searches if `PFQ_DATA` is not set.
const FOLDER: &str = "data";

/// The source of a data set.
///
/// It is made from a text: `"auto"`, `"synthetic"`, `"hub"`; any other text is a folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DataSource {
    /// The first source that has data, of:
    ///
    /// 1. the folder that the environment variable `PFQ_DATA` names, if it is set and not empty;
    ///    the folder must then hold CIFAR-100, so that a wrong setting is noticed;
    /// 2. `./data`, in any format that [`DataSource::Folder`] reads (for example
    ///    `./data/cifar-100-binary/train.bin`);
    /// 3. the hub, as [`DataSource::Hub`];
    /// 4. the synthetic data, which [`Event::FellBack`] reports.
    ///
    /// A folder with a broken form of CIFAR-100, or a broken file in the hub's cache, is an error
    /// and does not continue the search.
    #[default]
    Auto,
    /// The synthetic stand-in, see [`synthetic`](crate::synthetic()).
    Synthetic,
    /// CIFAR-100 in this folder, in the first of these formats that exists:
    ///
    /// 1. `train.bin` and `test.bin`, in the folder or in `cifar-100-binary/` under it;
    /// 2. the pickles `cifar-100-python/train` and `cifar-100-python/test`;
    /// 3. `cifar-100-binary.tar.gz`, then `cifar-100-python.tar.gz`;
    /// 4. the hub's `cifar100/train-00000-of-00001.parquet` and
    ///    `cifar100/test-00000-of-00001.parquet`.
    ///
    /// The folder may also be `cifar-100-python` or `cifar100` itself, or hold such a folder nested
    /// in another one of the same name. The path may also be that of an official archive.
    ///
    /// Formats 1 to 3 must have the sizes and MD5 sums of the official files; this is checked for
    /// archives and their members. Nothing is written.
    Folder(PathBuf),
    /// `uoft-cs/cifar100` on the Hugging Face hub, or in its cache; see [`Hub::from_env`].
    Hub,
}

impl From<&str> for DataSource {
    fn from(text: &str) -> DataSource {
        match text {
            "auto" => DataSource::Auto,
            "synthetic" => DataSource::Synthetic,
            "hub" => DataSource::Hub,
            _ => DataSource::Folder(text.into()),
        }
    }
}

/// Loads CIFAR-100 or its stand-in. Reports progress to `on_event` and prints nothing.
///
/// # Errors
///
/// Any reason why the source cannot be read completely and correctly; see [`Error`].
/// [`DataSource::Auto`] continues with the next place only if a place holds no data at all.
pub fn load(source: &DataSource, on_event: &mut dyn FnMut(Event)) -> Result<InMemoryDataset> {
    match source {
        DataSource::Auto => Search::from_env().run(on_event),
        DataSource::Synthetic => synthetic::default(),
        DataSource::Folder(folder) => folder::load(folder, &Manifest::official(), on_event),
        DataSource::Hub => from_hub::load(&Hub::from_env(), &Manifest::official(), on_event),
    }
}

/// The places that [`DataSource::Auto`] searches. Tests set them without the environment.
struct Search {
    /// The folder that must hold data, if it is set.
    required: Option<PathBuf>,
    /// The folder that may hold data.
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

    fn run(&self, on_event: &mut dyn FnMut(Event)) -> Result<InMemoryDataset> {
        if let Some(folder) = &self.required {
            return folder::load(folder, &self.manifest, on_event);
        }
        match folder::load(&self.folder, &self.manifest, on_event) {
            Err(error @ Error::NoData { .. }) => skip(self.folder.display(), error, on_event),
            done => return done,
        }
        match from_hub::load(&self.hub, &self.manifest, on_event) {
            Err(Error::Hub(
                error @ (hub::Error::Failed { .. } | hub::Error::Gated { .. } | hub::Error::Offline { .. }),
            )) => skip("the hub", error, on_event),
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

/// Reports that a place has no data.
fn skip(place: impl fmt::Display, error: impl fmt::Display, on_event: &mut dyn FnMut(Event)) {
    on_event(Event::NoData { place: place.to_string(), why: error.to_string() });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Mood, Server, binary, images, manifest, write};
    use std::path::Path;

    #[test]
    fn sources_are_made_from_texts() {
        for (text, source) in [
            ("auto", DataSource::Auto),
            ("synthetic", DataSource::Synthetic),
            ("hub", DataSource::Hub),
            ("./hub", DataSource::Folder("./hub".into())),
        ] {
            assert_eq!(DataSource::from(text), source);
        }
    }

    fn search(root: &Path, server: &Server) -> Search {
        Search {
            required: None,
            folder: root.join("data"),
            hub: server.hub(root),
            manifest: manifest(b"", b""),
        }
    }

    fn run(search: &Search) -> (Result<InMemoryDataset>, Vec<Event>) {
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
        assert_eq!(events.iter().filter(|event| matches!(event, Event::NoData { .. })).count(), 2);

        server.set(Mood::Good);
        let (data, events) = run(&search);
        assert_eq!(data.unwrap().train, images(3));
        assert_eq!(events.iter().filter(|event| matches!(event, Event::NoData { .. })).count(), 1);

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
        // A wrong PFQ_DATA is an error too, although other places exist.
        search.required = Some(root.path().join("absent"));
        assert!(matches!(run(&search).0, Err(Error::NoData { .. })));
        assert!(server.requests().is_empty());

        search.required = None;
        search.folder = root.path().join("absent");
        server.set(Mood::Corrupting);
        assert!(matches!(run(&search).0, Err(Error::Malformed { .. })));
        // Without the hub, only synthetic data remain.
        let hub = Hub { cache: root.path().join("empty"), ..search.hub };
        for hub in [Hub { offline: true, ..hub.clone() }, Hub { endpoint: "hf-mirror.com".into(), ..hub }] {
            search.hub = hub;
            assert_eq!(run(&search).0.unwrap().name, "synthetic");
        }
    }

    #[test]
    fn load_goes_where_it_is_told() {
        let data = load(&DataSource::Synthetic, &mut |_| {}).unwrap();
        assert_eq!((data.name.as_str(), data.train.len(), data.test.len()), ("synthetic", 10_000, 2_000));
        let absent = DataSource::Folder("no/such/folder".into());
        assert!(matches!(load(&absent, &mut |_| {}), Err(Error::NoData { .. })));
    }
}
