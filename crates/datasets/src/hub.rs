//! Files of data sets on the Hugging Face hub, and CIFAR-100 from there.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use hf_hub::progress::{DownloadEvent, FileProgress, ProgressEvent, ProgressHandler};
use hf_hub::repository::RepoTreeEntry;
use hf_hub::{HFClient, HFClientSync, HFError};

use crate::cifar::Manifest;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::folder::{TABLES, TABLES_FOLDER};
use crate::memory::InMemoryDataset;
use crate::table;

/// A data set's repository.
#[derive(Clone, Copy)]
pub(crate) struct Repo {
    pub owner: &'static str,
    pub name: &'static str,
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

const CIFAR: Repo = Repo { owner: "uoft-cs", name: "cifar100" };
pub(crate) const REVISION: &str = "main";

/// How to reach the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hub {
    /// The base address. `None`: `HF_ENDPOINT`, or else <https://huggingface.co>.
    pub endpoint: Option<String>,
    /// The cache's folder, in the layout that all tools of the hub share. `None`: `HF_HUB_CACHE`, or else
    /// `hub` under `HF_HOME`, or else `huggingface/hub` under `XDG_CACHE_HOME` or `~/.cache`.
    pub cache: Option<PathBuf>,
    /// The token that is sent. `None`: `HF_TOKEN`, or else the file that `HF_TOKEN_PATH` names, or else the
    /// file `token` under `HF_HOME`, if there is one.
    pub token: Option<String>,
    /// Whether only the cache is used and nothing is requested.
    pub offline: bool,
    /// How long to wait for the first answer to the request for a file.
    pub answer_timeout: Duration,
    /// How long a download may make no progress.
    pub stall_timeout: Duration,
}

impl Hub {
    /// The hub as the environment describes it: endpoint, cache and token as the fields document, and offline
    /// if `HF_HUB_OFFLINE` is 1, true, yes or on. The first answer may take 10 seconds, a pause 60.
    pub fn from_env() -> Hub {
        let offline = std::env::var("HF_HUB_OFFLINE").unwrap_or_default().to_lowercase();
        Hub {
            endpoint: None,
            cache: None,
            token: None,
            offline: ["1", "true", "yes", "on"].contains(&offline.as_str()),
            answer_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(60),
        }
    }

    fn client(&self) -> Result<HFClient, HFError> {
        // One retry is enough: somebody is waiting, and can start again.
        let mut builder = HFClient::builder().retry_max_attempts(1);
        if let Some(endpoint) = &self.endpoint {
            builder = builder.endpoint(endpoint);
        }
        if let Some(cache) = &self.cache {
            builder = builder.cache_dir(cache);
        }
        if let Some(token) = &self.token {
            builder = builder.token(token);
        }
        builder.build()
    }

    /// The path of a file of the repository in the cache. Downloads it if it is not there.
    pub(crate) fn fetch(
        &self,
        repo: Repo,
        file: &str,
        revision: &str,
        on_event: &mut dyn FnMut(Event),
    ) -> Result<PathBuf> {
        let access = Access::new(self, repo, file)?;
        let files = access.client.dataset(repo.owner, repo.name);
        let cached = files.download_file().filename(file).revision(revision).local_files_only(true).send();
        if let Ok(path) = cached {
            return Ok(path);
        }
        if self.offline {
            return Err(access.offline());
        }
        on_event(Event::Download { file: file.into(), done: 0, total: 0 });
        let (name, revision) = (file.to_string(), revision.to_string());
        access.patiently(
            self,
            move |client, sender| {
                let files = client.dataset(repo.owner, repo.name);
                let request =
                    files.download_file().filename(name).revision(revision).progress(Reporter(sender));
                match request.clone().send() {
                    // The link in the cache exists, but the file that it points to was deleted.
                    Ok(path) if !path.exists() => request.force_download(true).send(),
                    done => done,
                }
            },
            &mut |done, total| on_event(Event::Download { file: file.into(), done, total }),
        )
    }

    /// The paths of the files in a folder of the repository, as the hub lists them now.
    pub(crate) fn list(&self, repo: Repo, folder: &str, revision: &str) -> Result<Vec<String>> {
        let access = Access::new(self, repo, folder)?;
        if self.offline {
            return Err(access.offline());
        }
        let (name, revision) = (folder.to_string(), revision.to_string());
        let entries = access.patiently(
            self,
            move |client, _| {
                client.dataset(repo.owner, repo.name).list_tree().path_in_repo(name).revision(revision).send()
            },
            &mut |_, _| {},
        )?;
        let file = |entry| match entry {
            RepoTreeEntry::File { path, .. } => Some(path),
            RepoTreeEntry::Directory { .. } => None,
        };
        Ok(entries.into_iter().filter_map(file).collect())
    }
}

/// A client, and what messages about a file name.
struct Access {
    client: HFClientSync,
    file: String,
    repo: String,
    endpoint: String,
    cache: PathBuf,
}

impl Access {
    fn new(hub: &Hub, repo: Repo, file: &str) -> Result<Access> {
        let unusable =
            |error: HFError| Error::Invalid(format!("the hub's client cannot be set up: {}", chain(&error)));
        let client = hub.client().map_err(unusable)?;
        let (endpoint, cache) = (client.endpoint().to_string(), client.cache_dir().to_path_buf());
        let client = HFClientSync::from_inner(client).map_err(unusable)?;
        Ok(Access { client, file: file.into(), repo: repo.to_string(), endpoint, cache })
    }

    fn offline(self) -> Error {
        Error::Offline { file: self.file, repo: self.repo, cache: self.cache }
    }

    fn failed(&self, what: String) -> Error {
        let (file, repo, endpoint) = (self.file.clone(), self.repo.clone(), self.endpoint.clone());
        Error::Hub { file, repo, endpoint, what }
    }

    fn refused(&self, what: String) -> Error {
        let (file, repo, endpoint) = (self.file.clone(), self.repo.clone(), self.endpoint.clone());
        // An endpoint may end with a slash, but people follow the addresses in the message.
        Error::Gated { file, repo, endpoint: endpoint.trim_end_matches('/').into(), what }
    }

    /// Does `work` in another thread, because the client has no time limit for connecting: where packets are
    /// lost, it would wait for minutes. After a timeout the thread is left to end by itself.
    fn patiently<T: Send + 'static>(
        &self,
        hub: &Hub,
        work: impl FnOnce(HFClientSync, Sender<Message<T>>) -> Result<T, HFError> + Send + 'static,
        on_progress: &mut dyn FnMut(u64, u64),
    ) -> Result<T> {
        let (sender, receiver) = channel();
        let client = self.client.clone();
        let spawned = std::thread::Builder::new().name("download".into()).spawn(move || {
            let done = work(client, sender.clone());
            // An error means that nobody waits any more.
            let _ = sender.send(Message::Done(done));
        });
        spawned.map_err(|error| self.failed(format!("no thread: {error}")))?;
        let mut timeout = hub.answer_timeout;
        loop {
            match receiver.recv_timeout(timeout) {
                Ok(Message::Progress { done, total }) => {
                    timeout = hub.stall_timeout;
                    on_progress(done, total);
                }
                Ok(Message::Done(Ok(done))) => return Ok(done),
                Ok(Message::Done(Err(error))) => return Err(self.explain(&error)),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(self.failed(format!("nothing arrived for {} seconds", timeout.as_secs_f32())));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.failed("the download broke off".into()));
                }
            }
        }
    }

    fn explain(&self, error: &HFError) -> Error {
        const UNKNOWN: &str = "no token was sent, or an invalid one";
        const NO_ACCESS: &str = "the token's account has no access";
        let (whose, context) = match error {
            HFError::AuthRequired { context } => (UNKNOWN, context),
            HFError::Forbidden { context } => (NO_ACCESS, context),
            // The client reports them so when it lists files.
            HFError::Http { context } if context.status == 401 => (UNKNOWN, context),
            HFError::Http { context } if context.status == 403 => (NO_ACCESS, context),
            _ => return self.failed(chain(error)),
        };
        let words =
            context.server_message.as_deref().map_or(String::new(), |words| format!("; it says: {words}"));
        self.refused(format!("{whose}{words}"))
    }
}

/// Loads CIFAR-100 from the hub's repository `uoft-cs/cifar100`. Downloads files that are not in the cache.
///
/// What is in the cache is used without asking the hub for something newer. The number of records, the form
/// of every picture and the range of every label are checked. [`Event::Unverified`] reports that the pictures
/// differ from those of the official files.
///
/// # Errors
///
/// [`Error::Hub`] and [`Error::Gated`] if a file cannot be downloaded, [`Error::Offline`] if it must not be,
/// [`Error::Malformed`] if a file in the cache is damaged (deleting the named file mends that).
pub fn load(hub: &Hub, on_event: &mut dyn FnMut(Event)) -> Result<InMemoryDataset> {
    load_with(hub, &Manifest::official(), on_event)
}

pub(crate) fn load_with(
    hub: &Hub,
    manifest: &Manifest,
    on_event: &mut dyn FnMut(Event),
) -> Result<InMemoryDataset> {
    on_event(Event::Trying { place: format!("the Hugging Face hub ({CIFAR})") });
    let [train, test] = TABLES.map(|table| format!("{TABLES_FOLDER}/{table}"));
    let train = hub.fetch(CIFAR, &train, REVISION, on_event)?;
    // Both files must be of one commit.
    let commit = commit(&train);
    let test = hub.fetch(CIFAR, &test, &commit, on_event)?;
    let source = format!("hub {CIFAR} @ {commit}");
    // Links are resolved so that an error names the file to delete and not a link to it.
    let [train, test] = [train, test].map(|path| path.canonicalize().unwrap_or(path));
    let [n_train, n_test] = manifest.records;
    manifest.dataset(source, [table::read(&train, n_train)?, table::read(&test, n_test)?], on_event)
}

/// The commit of a file in the cache, which is `snapshots/<commit>/<folder>/<file>`.
pub(crate) fn commit(cached: &Path) -> String {
    let commit = cached.ancestors().nth(2).and_then(Path::file_name).and_then(|name| name.to_str());
    commit.unwrap_or(REVISION).to_string()
}

/// A message from the thread that asks the hub.
enum Message<T> {
    Progress { done: u64, total: u64 },
    Done(Result<T, HFError>),
}

/// Passes on the progress of a download.
struct Reporter<T>(Sender<Message<T>>);

impl<T: Send + 'static> ProgressHandler for Reporter<T> {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        let (done, total) = match event {
            DownloadEvent::Start { total_bytes, .. } => (0, *total_bytes),
            DownloadEvent::AggregateProgress { bytes_completed, total_bytes, .. } => {
                (*bytes_completed, *total_bytes)
            }
            DownloadEvent::Progress { files } => match files.last() {
                Some(FileProgress { bytes_completed, total_bytes, .. }) => (*bytes_completed, *total_bytes),
                None => return,
            },
            DownloadEvent::Complete => return,
        };
        // An error means that nobody waits any more.
        let _ = self.0.send(Message::Progress { done, total });
    }
}

/// An error with its causes: those of a failed connection say why it failed.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut texts: Vec<String> = causes.map(ToString::to_string).collect();
    // The texts of some errors repeat their cause.
    texts.dedup_by(|later, earlier| earlier.contains(later.as_str()));
    texts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{COMMIT, Mood, Server, images, manifest};
    use std::fs;
    use std::time::Instant;

    /// An empty cache and a hub to fill it from.
    fn setup() -> (Server, tempfile::TempDir, Hub) {
        let (server, home) = (Server::start(), tempfile::tempdir().unwrap());
        let hub = server.hub(home.path());
        (server, home, hub)
    }

    fn quietly(hub: &Hub) -> Result<InMemoryDataset> {
        load_with(hub, &manifest(b"", b""), &mut |_| {})
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
        check(&load_with(&hub, &manifest(b"", b""), &mut |event| events.push(event)).unwrap());
        let prefix = "/datasets/uoft-cs/cifar100/resolve";
        let (train, test) = ("cifar100/train-00000-of-00001.parquet", "cifar100/test-00000-of-00001.parquet");
        // The second file is asked for under the commit that the first one came from.
        let expected = [
            format!("HEAD {prefix}/main/{train}"),
            format!("GET {prefix}/main/{train}"),
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
        assert!(matches!(&error, Error::Offline { cache, .. } if cache.starts_with(home.path())), "{error}");
        assert!(error.to_string().contains("HF_HUB_OFFLINE"), "{error}");
        assert!(server.requests().is_empty());
    }

    #[test]
    fn a_hub_that_does_not_deliver_is_named() {
        let (server, _home, hub) = setup();
        for (mood, reason) in [(Mood::Empty, "not found"), (Mood::Failing, "500"), (Mood::Truncating, "body")]
        {
            server.set(mood);
            let error = quietly(&hub).unwrap_err();
            assert!(matches!(error, Error::Hub { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains(&server.endpoint) && text.contains("cifar100/train-00000"), "{text}");
            assert!(text.to_lowercase().contains(reason), "{text}");
        }
        // These failures leave nothing behind.
        server.set(Mood::Good);
        check(&quietly(&hub).unwrap());
    }

    #[test]
    fn a_hub_out_of_reach_is_given_up_soon() {
        let (server, _home, hub) = setup();
        let soon = Duration::from_millis(300);
        let hub = Hub { answer_timeout: soon, stall_timeout: soon, ..hub };
        for mood in [Mood::Silent, Mood::Stalling] {
            server.set(mood);
            let start = Instant::now();
            let error = quietly(&hub).unwrap_err().to_string();
            assert!(error.contains("nothing arrived for 0.3 seconds"), "{error}");
            assert!(start.elapsed() < Duration::from_secs(3));
        }
        // No one listens on a port that was just given back.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let start = Instant::now();
        let hub =
            Hub { endpoint: Some(format!("http://127.0.0.1:{port}")), answer_timeout: 10 * soon, ..hub };
        let error = quietly(&hub).unwrap_err();
        assert!(matches!(&error, Error::Hub { what, .. } if what.contains("refused")), "{error}");
        assert!(start.elapsed() < Duration::from_secs(3));

        let error = quietly(&Hub { endpoint: Some("nowhere".into()), ..hub }).unwrap_err();
        assert!(matches!(error, Error::Invalid(_)), "{error}");
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
        // It stays an error until the files are deleted, as the message asks.
        assert_eq!(named(&hub), train);
        fs::remove_file(&train).unwrap();
        let test = named(&hub);
        assert_ne!(test, train);
        fs::remove_file(&test).unwrap();
        check(&quietly(&hub).unwrap());

        let cached = hub.fetch(CIFAR, "cifar100/test-00000-of-00001.parquet", REVISION, &mut |_| {}).unwrap();
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
