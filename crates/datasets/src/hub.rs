//! Files of data sets on the Hugging Face hub, and CIFAR-100 from there.

use std::fmt;
use std::fs::File;
use std::future::Future;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use hf_hub::repository::{HFRepository, RepoTreeEntry, RepoTypeDataset};
use hf_hub::{HFClient, HFError};
use tokio::runtime::Builder;
use tokio::time::{Instant, timeout, timeout_at};

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
const ENDPOINT: &str = "https://huggingface.co";
/// The number of files that no folder may exceed.
const MOST_FILES: usize = 10_000;
/// The number of bytes of a download that count as progress.
const PROGRESS: u64 = 64 << 10;

/// How to reach the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hub {
    /// The base address.
    pub endpoint: String,
    /// The cache's folder, in the layout that all tools of the hub share.
    pub cache: PathBuf,
    /// The token that is sent, if there is one.
    pub token: Option<String>,
    /// Whether only the cache is used and nothing is requested.
    pub offline: bool,
    /// How long to wait for the first answer to a request.
    pub answer_timeout: Duration,
    /// How long a download may take for 64 KiB.
    pub stall_timeout: Duration,
    /// The length in bytes that no file may exceed.
    pub longest: u64,
}

impl Hub {
    /// The hub as the environment describes it. An empty variable counts as one that is not set, and white
    /// space around a value is ignored:
    ///
    /// - `HF_ENDPOINT` is the base address, by default <https://huggingface.co>;
    /// - `HF_HUB_CACHE` is the cache, or else `hub` in `HF_HOME`, or else `huggingface/hub` in
    ///   `XDG_CACHE_HOME` or `~/.cache`;
    /// - `HF_TOKEN` is the token, or else the contents of the file that `HF_TOKEN_PATH` names, or else of
    ///   `token` in `HF_HOME`; `HF_HUB_DISABLE_IMPLICIT_TOKEN` forbids to send any;
    /// - `HF_HUB_OFFLINE` forbids requests if it is 1, true, yes or on.
    ///
    /// An answer may take 10 seconds, and a minute of a download must bring 64 KiB. A file may have 2 GiB,
    /// which is four times as much as those of ImageNet.
    pub fn from_env() -> Hub {
        Hub::described(|name| std::env::var(name).ok())
    }

    fn described(variable: impl Fn(&str) -> Option<String>) -> Hub {
        let value = |name: &str| {
            let value = variable(name)?.trim().to_string();
            (!value.is_empty()).then_some(value)
        };
        let path = |name: &str| value(name).map(PathBuf::from);
        let cache = path("XDG_CACHE_HOME")
            .or_else(|| Some(path("HOME")?.join(".cache")))
            .unwrap_or_else(std::env::temp_dir);
        let home = path("HF_HOME").unwrap_or_else(|| cache.join("huggingface"));
        let stored = |file: PathBuf| {
            let token = std::fs::read_to_string(file).ok()?.trim().to_string();
            (!token.is_empty()).then_some(token)
        };
        let token = value("HF_TOKEN")
            .or_else(|| stored(path("HF_TOKEN_PATH")?))
            .or_else(|| stored(home.join("token")));
        let offline = value("HF_HUB_OFFLINE").unwrap_or_default().to_lowercase();
        Hub {
            endpoint: value("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into()),
            cache: path("HF_HUB_CACHE")
                .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
                .unwrap_or_else(|| home.join("hub")),
            token: token.filter(|_| value("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_none()),
            offline: ["1", "true", "yes", "on"].contains(&offline.as_str()),
            answer_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(60),
            longest: 2 << 30,
        }
    }

    /// The path of a file of the repository in the cache. Downloads it if it is not there.
    ///
    /// The client could fill the cache itself, but it would name files as the hub's headers say. Here the
    /// names come from the caller and from the commit, which is checked.
    pub(crate) fn fetch(
        &self,
        repo: Repo,
        file: &str,
        revision: &str,
        on_event: &mut dyn FnMut(Event),
    ) -> Result<PathBuf> {
        let folder = self.cache.join(format!("datasets--{}--{}", repo.owner, repo.name));
        let snapshot = |commit: &str| folder.join("snapshots").join(commit).join(file);
        let reference = folder.join("refs").join(revision);
        let known = match is_commit(revision) {
            true => Some(revision.to_string()),
            false => std::fs::read_to_string(&reference).ok().map(|commit| commit.trim().into()),
        };
        let known = known.filter(|commit| is_commit(commit)).map(|commit| snapshot(&commit));
        if let Some(path) = known.filter(|path| path.is_file()) {
            return Ok(path);
        }
        if self.offline {
            return Err(self.is_offline(repo, file));
        }
        on_event(Event::Download { file: file.into(), done: 0, total: 0 });
        let access = Access::new(self, repo, file)?;
        let commit = access.commit(revision)?;
        let path = snapshot(&commit);
        whole_file::replace(
            &path,
            |error| Error::write(&path)(error),
            |temporary| {
                let mut output = File::create(temporary).map_err(Error::write(&path))?;
                access.download(&commit, |bytes, done, total| {
                    output.write_all(bytes).map_err(Error::write(&path))?;
                    on_event(Event::Download { file: file.into(), done, total });
                    Ok(())
                })
            },
        )?;
        if commit != revision {
            whole_file::write(&reference, &commit).map_err(Error::write(&reference))?;
        }
        Ok(path)
    }

    /// The paths of the files in a folder of the repository, as the hub lists them now.
    pub(crate) fn list(&self, repo: Repo, folder: &str, revision: &str) -> Result<Vec<String>> {
        match self.offline {
            true => Err(self.is_offline(repo, folder)),
            false => Access::new(self, repo, folder)?.list(revision),
        }
    }

    fn failed(&self, repo: Repo, file: &str, what: String, remedy: &'static str) -> Error {
        let (file, repo, endpoint) = (file.into(), repo.to_string(), self.endpoint.clone());
        Error::Hub { file, repo, endpoint, what, remedy }
    }

    fn is_offline(&self, repo: Repo, file: &str) -> Error {
        Error::Offline { file: file.into(), repo: repo.to_string(), cache: self.cache.clone() }
    }
}

/// Whether a revision is a commit and not a name. A commit is safe as the name of a folder.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Requests for a file or a folder of a repository.
struct Access<'a> {
    hub: &'a Hub,
    repo: Repo,
    file: &'a str,
    client: HFRepository<RepoTypeDataset>,
}

/// What to do after a failure.
const CHECK_NETWORK: &str = "check the network, or put the files into a folder";
const CHECK_ENDPOINT: &str = "check HF_ENDPOINT, or put the files into a folder";

impl<'a> Access<'a> {
    fn new(hub: &'a Hub, repo: Repo, file: &'a str) -> Result<Access<'a>> {
        let unusable = |what: &str, remedy| Err(hub.failed(repo, file, what.into(), remedy));
        if !["http://", "https://"].iter().any(|scheme| hub.endpoint.starts_with(scheme)) {
            let remedy = "HF_ENDPOINT must be an address such as https://huggingface.co";
            return unusable("the address has no scheme", remedy);
        }
        // The client would leave out a token that no header can hold.
        if hub.token.as_ref().is_some_and(|token| !token.bytes().all(|byte| byte.is_ascii_graphic())) {
            return unusable(
                "the token has a character that no token has",
                "set HF_TOKEN to the token alone",
            );
        }
        // One retry is enough: somebody is waiting, and can start again.
        let mut builder =
            HFClient::builder().retry_max_attempts(1).endpoint(&hub.endpoint).cache_dir(&hub.cache);
        if let Some(token) = &hub.token {
            builder = builder.token(token);
        }
        match builder.build() {
            Ok(client) => Ok(Access { hub, repo, file, client: client.dataset(repo.owner, repo.name) }),
            Err(error) => unusable(&chain(&error), CHECK_ENDPOINT),
        }
    }

    fn failed(&self, what: String, remedy: &'static str) -> Error {
        self.hub.failed(self.repo, self.file, what, remedy)
    }

    /// The commit that the revision names now.
    fn commit(&self, revision: &str) -> Result<String> {
        if is_commit(revision) {
            return Ok(revision.into());
        }
        let request = self.client.info().revision(revision).expand(vec!["sha".into()]).send();
        let commit = block_on(self.answer(request))?.sha.unwrap_or_default();
        match is_commit(&commit) {
            true => Ok(commit),
            false => {
                Err(self.failed(format!("{commit:?} is given as the commit of {revision}"), CHECK_ENDPOINT))
            }
        }
    }

    /// The files in the folder.
    fn list(&self, revision: &str) -> Result<Vec<String>> {
        let entries = block_on(self.answer(async {
            let entries = self
                .client
                .list_tree()
                .path_in_repo(self.file)
                .revision(revision)
                .limit(MOST_FILES)
                .send()?;
            entries.try_collect::<Vec<_>>().await
        }))?;
        let file = |entry| match entry {
            RepoTreeEntry::File { path, .. } => Some(path),
            RepoTreeEntry::Directory { .. } => None,
        };
        Ok(entries.into_iter().filter_map(file).collect())
    }

    /// Downloads the file and gives its bytes to `write`, with the number of bytes so far and that of the
    /// whole file, or 0 if it is unknown.
    fn download(&self, commit: &str, mut write: impl FnMut(&[u8], u64, u64) -> Result<()>) -> Result<()> {
        block_on(async {
            let request = self.client.download_file_stream().filename(self.file).revision(commit).send();
            let (length, mut stream) = self.answer(request).await?;
            let limit = self.hub.stall_timeout;
            let (mut done, mut counted, mut since) = (0, 0, Instant::now());
            loop {
                let Ok(chunk) = timeout_at(since + limit, stream.next()).await else {
                    let (bytes, seconds) = (done - counted, limit.as_secs_f32());
                    return Err(self
                        .failed(format!("only {bytes} bytes arrived in {seconds} seconds"), CHECK_NETWORK));
                };
                let Some(chunk) = chunk else {
                    return match length {
                        Some(length) if length != done => {
                            Err(self
                                .failed(format!("it ended after {done} of {length} bytes"), CHECK_NETWORK))
                        }
                        _ => Ok(()),
                    };
                };
                let chunk = chunk.map_err(|error| self.explain(&error))?;
                done += chunk.len() as u64;
                if done.max(length.unwrap_or(0)) > self.hub.longest {
                    let what = format!("the file has more than {} bytes", self.hub.longest);
                    return Err(self.failed(what, CHECK_ENDPOINT));
                }
                if done - counted >= PROGRESS {
                    (counted, since) = (done, Instant::now());
                }
                write(&chunk, done, length.unwrap_or(0))?;
            }
        })
    }

    /// Waits for an answer, but not for longer than permitted.
    async fn answer<T>(&self, request: impl Future<Output = Result<T, HFError>>) -> Result<T> {
        match timeout(self.hub.answer_timeout, request).await {
            Ok(answer) => answer.map_err(|error| self.explain(&error)),
            Err(_) => {
                let seconds = self.hub.answer_timeout.as_secs_f32();
                Err(self.failed(format!("no answer came within {seconds} seconds"), CHECK_NETWORK))
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
            _ => {
                let remedy = match error {
                    HFError::RateLimited { .. } => {
                        "wait some minutes, or set HF_TOKEN, with which the hub permits more"
                    }
                    HFError::EntryNotFound { .. }
                    | HFError::RepoNotFound { .. }
                    | HFError::RevisionNotFound { .. } => CHECK_ENDPOINT,
                    HFError::Http { .. } => "try again later, or put the files into a folder",
                    _ => CHECK_NETWORK,
                };
                return self.failed(chain(error), remedy);
            }
        };
        let words =
            context.server_message.as_deref().map_or(String::new(), |words| format!("; it says: {words}"));
        let (file, repo, what) = (self.file.into(), self.repo.to_string(), format!("{whose}{words}"));
        // An endpoint may end with a slash, but people follow the addresses in the message.
        let endpoint = self.hub.endpoint.trim_end_matches('/').into();
        Error::Gated { file, repo, endpoint, what }
    }
}

/// Does requests in this thread.
fn block_on<T>(requests: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::Invalid(format!("requests are impossible: {error}")))?;
    let done = runtime.block_on(requests);
    // After a timeout, nobody should wait for the look-up of a name to end.
    runtime.shutdown_background();
    done
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
        assert!(matches!(&error, Error::Offline { cache, .. } if cache.starts_with(home.path())), "{error}");
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
            assert!(matches!(error, Error::Hub { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains(&server.endpoint) && text.contains("cifar100/train-00000"), "{text}");
            assert!(text.to_lowercase().contains(reason) && text.contains(remedy), "{text}");
        }
        // These failures leave nothing behind.
        assert_eq!(files(home.path()), Vec::<PathBuf>::new());
        server.set(Mood::Good);
        check(&quietly(&hub).unwrap());
    }

    /// All files under a folder.
    fn files(folder: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
    }

    #[test]
    fn no_header_places_a_file_outside_the_cache() {
        let (server, home, hub) = setup();
        // The cache is three folders deep, so that what leads out of it stays in the test's folder.
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
        // No one listens on a port that was just given back.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let start = Instant::now();
        let hub = Hub { endpoint: format!("http://127.0.0.1:{port}"), answer_timeout: 10 * soon, ..hub };
        let error = quietly(&hub).unwrap_err();
        assert!(matches!(&error, Error::Hub { what, .. } if what.contains("refused")), "{error}");
        assert!(start.elapsed() < Duration::from_secs(3));
    }

    #[test]
    fn what_the_environment_says_is_cleaned_or_refused() {
        let hub = |variables: &[(&str, &str)]| {
            Hub::described(|name| Some(variables.iter().find(|(known, _)| *known == name)?.1.into()))
        };
        let home = tempfile::tempdir().unwrap();
        let path = home.path().to_str().unwrap();
        // An empty variable is not set.
        let empty = [
            "HF_ENDPOINT",
            "HF_HOME",
            "HF_HUB_CACHE",
            "HF_TOKEN",
            "HF_TOKEN_PATH",
            "XDG_CACHE_HOME",
            "HF_HUB_OFFLINE",
        ];
        for value in ["", " \n"] {
            let mut variables: Vec<_> = empty.map(|name| (name, value)).into();
            variables.push(("HOME", path));
            assert_eq!(hub(&variables), hub(&[("HOME", path)]));
        }
        let plain = hub(&[("HOME", path)]);
        assert_eq!((plain.endpoint.as_str(), plain.token.as_ref(), plain.offline), (ENDPOINT, None, false));
        assert_eq!(plain.cache, home.path().join(".cache/huggingface/hub"));
        // White space around a value does not count.
        let spaced =
            hub(&[("HF_ENDPOINT", " http://x\n"), ("HF_TOKEN", "hf_x\r\n"), ("HF_HUB_OFFLINE", "Yes\n")]);
        assert_eq!(
            (spaced.endpoint.as_str(), spaced.token.as_deref(), spaced.offline),
            ("http://x", Some("hf_x"), true)
        );
        fs::write(home.path().join("token"), "hf_stored\n").unwrap();
        assert_eq!(hub(&[("HF_HOME", path)]).token.as_deref(), Some("hf_stored"));
        assert_eq!(hub(&[("HF_HOME", path), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).token, None);
        assert_eq!(hub(&[("HF_HOME", path)]).cache, home.path().join("hub"));
        assert_eq!(hub(&[("HF_HOME", path), ("HF_HUB_CACHE", "/c")]).cache, Path::new("/c"));

        let (server, _home, usual) = setup();
        let refused = |hub: &Hub, expected: &str| {
            let error = quietly(hub).unwrap_err();
            assert!(matches!(error, Error::Hub { .. }) && error.to_string().contains(expected), "{error}");
        };
        for endpoint in ["hf-mirror.com", "localhost:8080", "http://"] {
            refused(&Hub { endpoint: endpoint.into(), ..usual.clone() }, "HF_ENDPOINT");
        }
        refused(&Hub { token: Some("hf x".into()), ..usual.clone() }, "set HF_TOKEN to the token alone");
        assert!(server.requests().is_empty());
        // What is in the cache needs neither.
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
