//! Files from the Hugging Face hub with progress events, and CIFAR-100 from the hub.

use std::path::PathBuf;

use hub::{Hub, MAIN, Repo, commit};

use crate::cifar::Manifest;
use crate::error::Result;
use crate::event::Event;
use crate::folder::{TABLES, TABLES_FOLDER};
use crate::memory::InMemoryDataset;
use crate::table;

const CIFAR: Repo = Repo { owner: "uoft-cs", name: "cifar100" };

/// Calls [`Hub::fetch`] and reports its progress as events.
pub(crate) fn fetch(
    hub: &Hub,
    repo: Repo,
    file: &str,
    revision: &str,
    on_event: &mut dyn FnMut(Event),
) -> Result<PathBuf> {
    let mut on_progress = |done, total| on_event(Event::Download { file: file.into(), done, total });
    Ok(hub.fetch(repo, file, revision, &mut on_progress)?)
}

/// Loads CIFAR-100 from the hub's `uoft-cs/cifar100`. Downloads files that are not in the cache.
///
/// Files in the cache are used without asking the hub for newer versions. The number of records,
/// the format of every picture and the range of every label are checked. [`Event::Unverified`] is
/// reported if the pictures differ from those of the official files.
///
/// # Errors
///
/// [`Error::Hub`](crate::Error::Hub) if a file cannot be downloaded or must not be,
/// [`Error::Malformed`](crate::Error::Malformed) if a file in the cache is damaged (to repair this,
/// delete the named file).
pub(crate) fn load(
    hub: &Hub,
    manifest: &Manifest,
    on_event: &mut dyn FnMut(Event),
) -> Result<InMemoryDataset> {
    on_event(Event::Trying { place: format!("the Hugging Face hub ({CIFAR})") });
    let [train, test] = TABLES.map(|table| format!("{TABLES_FOLDER}/{table}"));
    let train = fetch(hub, CIFAR, &train, MAIN, on_event)?;
    // Both files must come from the same commit.
    let commit = commit(&train);
    let test = fetch(hub, CIFAR, &test, &commit, on_event)?;
    let source = format!("hub {CIFAR} @ {commit}");
    // Links are resolved so that an error names the file to delete, not a link to it.
    let [train, test] = [train, test].map(|path| path.canonicalize().unwrap_or(path));
    let [n_train, n_test] = manifest.records;
    manifest.dataset(source, [table::read(&train, n_train)?, table::read(&test, n_test)?], on_event)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use crate::testing::{COMMIT, Mood, Server, images, manifest};
    use std::fs;
    use std::path::Path;
    use std::time::{Duration, Instant};

    /// Returns a hub, and an empty cache to fill from it.
    fn setup() -> (Server, tempfile::TempDir, Hub) {
        let (server, home) = (Server::start(), tempfile::tempdir().unwrap());
        let hub = server.hub(home.path());
        (server, home, hub)
    }

    fn quietly(hub: &Hub) -> Result<InMemoryDataset> {
        load(hub, &manifest(b"", b""), &mut |_| {})
    }

    fn check(data: &InMemoryDataset) {
        assert_eq!((&data.train, &data.test), (&images(3), &images(2)));
        assert_eq!(data.fingerprint, manifest(b"", b"").fingerprint);
        assert_eq!(data.source, format!("hub uoft-cs/cifar100 @ {COMMIT}"));
    }

    #[test]
    fn files_are_downloaded_once_and_then_taken_from_the_cache() {
        let (server, _home, hub) = setup();
        let mut events = Vec::new();
        check(&load(&hub, &manifest(b"", b""), &mut |event| events.push(event)).unwrap());
        let prefix = "/datasets/uoft-cs/cifar100/resolve";
        let (train, test) = ("cifar100/train-00000-of-00001.parquet", "cifar100/test-00000-of-00001.parquet");
        // The second file is requested from the same commit as the first one.
        let expected = [
            "GET /api/datasets/uoft-cs/cifar100/revision/main?expand=sha".into(),
            format!("HEAD {prefix}/{COMMIT}/{train}"),
            format!("GET {prefix}/{COMMIT}/{train}"),
            format!("HEAD {prefix}/{COMMIT}/{test}"),
            format!("GET {prefix}/{COMMIT}/{test}"),
        ];
        assert_eq!(server.requests(), expected);
        assert!(matches!(events[0], Event::Trying { .. }));
        for file in [train, test] {
            let last = events
                .iter()
                .rev()
                .find(|event| matches!(event, Event::Download { file: f, .. } if f == file));
            assert!(
                matches!(last, Some(Event::Download { done, total, .. }) if done == total && *total > 0),
                "{events:?}"
            );
        }
        assert!(!events.iter().any(|event| matches!(event, Event::Unverified { .. })));

        server.set(Mood::Failing);
        check(&quietly(&hub).unwrap());
        check(&quietly(&Hub { offline: true, ..hub.clone() }).unwrap());
        assert!(server.requests().is_empty());
    }

    #[test]
    fn offline_means_no_request() {
        let (server, home, hub) = setup();
        let error = quietly(&Hub { offline: true, ..hub }).unwrap_err();
        assert!(
            matches!(&error, Error::Hub(hub::Error::Offline { cache, .. }) if cache.starts_with(home.path())),
            "{error}"
        );
        assert!(error.to_string().contains("HF_HUB_OFFLINE"), "{error}");
        assert!(server.requests().is_empty());
    }

    #[test]
    fn a_hub_that_does_not_deliver_is_named() {
        let (server, home, hub) = setup();
        for (mood, reason, remedy) in [
            (Mood::Empty, "not found", "check HF_ENDPOINT"),
            (Mood::Failing, "500", "try again later"),
            (Mood::Limiting, "limited", "set HF_TOKEN"),
            (Mood::Truncating, "body", "check the network"),
            (Mood::Endless, "more than 1048576 bytes", "check HF_ENDPOINT"),
            (Mood::Misnaming, "\"../../../outside\" is given as the commit of main", "check HF_ENDPOINT"),
        ] {
            server.set(mood);
            let error = quietly(&hub).unwrap_err();
            assert!(matches!(error, Error::Hub(hub::Error::Failed { .. })), "{error}");
            let text = error.to_string();
            assert!(text.contains(&server.endpoint) && text.contains("cifar100/train-00000"), "{text}");
            assert!(text.to_lowercase().contains(reason) && text.contains(remedy), "{text}");
        }
        // These failures leave no files behind.
        assert_eq!(files(home.path()), Vec::<PathBuf>::new());
        server.set(Mood::Good);
        check(&quietly(&hub).unwrap());
    }

    /// Returns all files under a folder.
    fn files(folder: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
    }

    #[test]
    fn no_header_places_a_file_outside_the_cache() {
        let (server, home, hub) = setup();
        // The cache is three folders deep, so a path out of it stays in the test's folder.
        let hub = Hub { cache: home.path().join("a/b/hub"), ..hub };
        server.set(Mood::Placing);
        check(&quietly(&hub).unwrap());
        for file in files(home.path()) {
            assert!(file.starts_with(&hub.cache), "{file:?}");
        }
    }

    #[test]
    fn a_hub_out_of_reach_is_given_up_soon() {
        let (server, home, hub) = setup();
        let soon = Duration::from_millis(300);
        let hub = Hub { answer_timeout: soon, stall_timeout: soon, ..hub };
        for (mood, reason) in [
            (Mood::Silent, "no answer came within 0.3 seconds"),
            (Mood::Stalling, "bytes arrived in 0.3 seconds"),
            (Mood::Trickling, "bytes arrived in 0.3 seconds"),
        ] {
            server.set(mood);
            let start = Instant::now();
            let error = quietly(&hub).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
            assert!(start.elapsed() < Duration::from_secs(3));
        }
        assert_eq!(files(home.path()), Vec::<PathBuf>::new());
        // Nobody listens on a port that was just released.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let start = Instant::now();
        let hub = Hub { endpoint: format!("http://127.0.0.1:{port}"), answer_timeout: 10 * soon, ..hub };
        let error = quietly(&hub).unwrap_err();
        assert!(
            matches!(&error, Error::Hub(hub::Error::Failed { what, .. }) if what.contains("refused")),
            "{error}"
        );
        assert!(start.elapsed() < Duration::from_secs(3));
    }

    /// A list that is cut off would leave files out silently.
    #[test]
    fn a_folder_of_too_many_files_is_refused() {
        let listed = |files: usize| {
            let files = (0..files).map(|i| (format!("data/{i}"), Vec::new())).collect();
            let server = Server::of("uoft-cs/cifar100", None, files);
            server.hub(Path::new("")).list(CIFAR, "data", MAIN)
        };
        assert_eq!(listed(10_000).unwrap().len(), 10_000);
        let error = listed(10_001).unwrap_err().to_string();
        assert!(error.contains("more than 10000 entries"), "{error}");
    }

    #[test]
    fn what_the_environment_says_is_refused() {
        let (server, _home, usual) = setup();
        let refused = |hub: &Hub, expected: &str| {
            let error = quietly(hub).unwrap_err();
            assert!(
                matches!(error, Error::Hub(hub::Error::Failed { .. }))
                    && error.to_string().contains(expected),
                "{error}"
            );
        };
        for endpoint in ["hf-mirror.com", "localhost:8080", "http://"] {
            refused(&Hub { endpoint: endpoint.into(), ..usual.clone() }, "HF_ENDPOINT");
        }
        refused(&Hub { token: Some("hf x".into()), ..usual.clone() }, "set HF_TOKEN to the token alone");
        assert!(server.requests().is_empty());
        // Cached files need neither a valid endpoint nor a valid token.
        quietly(&usual).unwrap();
        check(&quietly(&Hub { endpoint: "hf-mirror.com".into(), offline: true, ..usual }).unwrap());
    }

    #[test]
    fn a_damaged_file_in_the_cache_is_named_and_mended_by_deleting_it() {
        let (server, home, hub) = setup();
        let named = |hub: &Hub| match quietly(hub) {
            Err(Error::Malformed { file, .. }) => PathBuf::from(file),
            other => panic!("{other:?}"),
        };
        server.set(Mood::Corrupting);
        let train = named(&hub);
        assert!(train.starts_with(home.path().canonicalize().unwrap()), "{train:?}");
        server.set(Mood::Good);
        // The error remains until the files are deleted, as the message asks.
        assert_eq!(named(&hub), train);
        fs::remove_file(&train).unwrap();
        let test = named(&hub);
        assert_ne!(test, train);
        fs::remove_file(&test).unwrap();
        check(&quietly(&hub).unwrap());

        let cached = fetch(&hub, CIFAR, "cifar100/test-00000-of-00001.parquet", MAIN, &mut |_| {}).unwrap();
        let blob = cached.canonicalize().unwrap();
        let contents = fs::read(&blob).unwrap();
        fs::write(&blob, &contents[..contents.len() / 2]).unwrap();
        let error = quietly(&Hub { offline: true, ..hub.clone() }).unwrap_err();
        assert!(matches!(&error, Error::Malformed { file, .. } if Path::new(file) == blob), "{error}");
        assert!(error.to_string().contains("delete it"), "{error}");
        fs::remove_file(&blob).unwrap();
        check(&quietly(&hub).unwrap());
    }
}
