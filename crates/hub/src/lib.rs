//! Files of data sets on the Hugging Face hub, read through the cache that all tools of the hub
//! share.
//!
//! This is a crate of its own because the hub's client takes longer to compile than everything that
//! reads the files.

#![forbid(unsafe_code)]

mod error;

pub use error::{Error, Result};

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

/// A data set's repository.
#[derive(Clone, Copy, Debug)]
pub struct Repo {
    /// The account or organization.
    pub owner: &'static str,
    /// The repository's name within it.
    pub name: &'static str,
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

/// The branch with the newest state of a repository.
pub const MAIN: &str = "main";
const ENDPOINT: &str = "https://huggingface.co";
/// The maximum number of entries in a folder whose files are listed.
const MOST_FILES: usize = 10_000;
/// The number of downloaded bytes that count as progress.
const PROGRESS: u64 = 64 << 10;

/// The settings for accessing the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hub {
    /// The base address.
    pub endpoint: String,
    /// The cache's folder, in the layout that all tools of the hub share.
    pub cache: PathBuf,
    /// The token that is sent, if any.
    pub token: Option<String>,
    /// Whether only the cache is used and nothing is requested.
    pub offline: bool,
    /// How long to wait for the first answer to a request.
    pub answer_timeout: Duration,
    /// The time within which 64 KiB of a download must arrive.
    pub stall_timeout: Duration,
    /// The maximum length of a file in bytes.
    pub longest: u64,
}

impl Hub {
    /// Reads the settings from the environment. An empty variable counts as not set, and white
    /// space around a value is ignored:
    ///
    /// - `HF_ENDPOINT` is the base address, by default <https://huggingface.co>;
    /// - `HF_HUB_CACHE` (or `HUGGINGFACE_HUB_CACHE`) is the cache, or else `hub` in `HF_HOME`, or
    ///   else `huggingface/hub` in `XDG_CACHE_HOME` or `~/.cache`;
    /// - `HF_TOKEN` is the token, or else the contents of the file that `HF_TOKEN_PATH` names, or
    ///   else of `token` in `HF_HOME`; `HF_HUB_DISABLE_IMPLICIT_TOKEN` forbids sending any token,
    ///   and `HF_HUB_OFFLINE` any request, if it is 1, true, yes or on.
    ///
    /// An answer may take 10 seconds, and 64 KiB of a download must arrive within a minute. A file
    /// may have 2 GiB, four times the size of ImageNet's files.
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
        let is_on = |name: &str| {
            let value = value(name).unwrap_or_default().to_lowercase();
            ["1", "true", "yes", "on"].contains(&value.as_str())
        };
        Hub {
            endpoint: value("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into()),
            cache: path("HF_HUB_CACHE")
                .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
                .unwrap_or_else(|| home.join("hub")),
            token: token.filter(|_| !is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN")),
            offline: is_on("HF_HUB_OFFLINE"),
            answer_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(60),
            longest: 2 << 30,
        }
    }

    /// Returns the path of a file of the repository in the cache, `snapshots/<commit>/<file>`, and
    /// downloads the file if it is not there.
    ///
    /// `revision` is a commit or the name of a branch. During a download, `on_progress` gets the
    /// number of bytes that have arrived and the length of the file, or 0 if the length is unknown:
    /// first 0 and 0, and then for every chunk.
    ///
    /// The client could fill the cache itself, but it would take file names from the hub's headers.
    /// Here the names come from the caller and from the commit, which is checked.
    ///
    /// # Errors
    /// If the file cannot or must not be downloaded, or the cache cannot be written.
    pub fn fetch(
        &self,
        repo: Repo,
        file: &str,
        revision: &str,
        on_progress: &mut dyn FnMut(u64, u64),
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
        on_progress(0, 0);
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
                    on_progress(done, total);
                    Ok(())
                })
            },
        )?;
        if commit != revision {
            whole_file::write(&reference, &commit).map_err(Error::write(&reference))?;
        }
        Ok(path)
    }

    /// Returns the paths of the files in a folder of the repository, as the hub lists them now.
    ///
    /// # Errors
    /// If the hub cannot or must not be asked.
    pub fn list(&self, repo: Repo, folder: &str, revision: &str) -> Result<Vec<String>> {
        match self.offline {
            true => Err(self.is_offline(repo, folder)),
            false => Access::new(self, repo, folder)?.list(revision),
        }
    }

    fn failed(&self, repo: Repo, file: &str, what: String, remedy: &'static str) -> Error {
        let (file, repo, endpoint) = (file.into(), repo.to_string(), self.endpoint.clone());
        Error::Failed { file, repo, endpoint, what, remedy }
    }

    fn is_offline(&self, repo: Repo, file: &str) -> Error {
        Error::Offline { file: file.into(), repo: repo.to_string(), cache: self.cache.clone() }
    }
}

/// Returns whether a revision is a commit and not a name. A commit is safe as the name of a folder.
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
        // The client would silently leave out a token that no header can hold.
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

    /// Returns the commit that the revision names now.
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

    /// Lists the files in the folder.
    fn list(&self, revision: &str) -> Result<Vec<String>> {
        let entries = block_on(self.answer(async {
            let entries = self
                .client
                .list_tree()
                .path_in_repo(self.file)
                .revision(revision)
                .limit(MOST_FILES + 1)
                .send()?;
            entries.try_collect::<Vec<_>>().await
        }))?;
        if entries.len() > MOST_FILES {
            let what = format!("the folder has more than {MOST_FILES} entries");
            return Err(self.failed(what, CHECK_ENDPOINT));
        }
        let file = |entry| match entry {
            RepoTreeEntry::File { path, .. } => Some(path),
            RepoTreeEntry::Directory { .. } => None,
        };
        Ok(entries.into_iter().filter_map(file).collect())
    }

    /// Downloads the file and passes its bytes to `write`, together with the number of bytes so far
    /// and the length of the file, or 0 if it is unknown.
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

    /// Waits for an answer, at most for the permitted time.
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
            // The client reports these errors in this way when it lists files.
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

/// Runs requests on this thread.
fn block_on<T>(requests: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(Error::Runtime)?;
    let done = runtime.block_on(requests);
    // After a timeout, do not wait for a pending name look-up.
    runtime.shutdown_background();
    done
}

/// Returns the commit of a file in the cache, whose path is `snapshots/<commit>/<folder>/<file>`.
pub fn commit(cached: &Path) -> String {
    let commit = cached.ancestors().nth(2).and_then(Path::file_name).and_then(|name| name.to_str());
    commit.unwrap_or(MAIN).to_string()
}

/// Returns the message of an error and of its causes, which say why a connection failed.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut texts: Vec<String> = causes.map(ToString::to_string).collect();
    // The messages of some errors repeat their cause.
    texts.dedup_by(|later, earlier| earlier.contains(later.as_str()));
    texts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_environment_says_is_cleaned() {
        let hub = |variables: &[(&str, &str)]| {
            Hub::described(|name| Some(variables.iter().find(|(known, _)| *known == name)?.1.into()))
        };
        let home = tempfile::tempdir().unwrap();
        let path = home.path().to_str().unwrap();
        // An empty variable counts as not set.
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
        // White space around a value is ignored.
        let spaced =
            hub(&[("HF_ENDPOINT", " http://x\n"), ("HF_TOKEN", "hf_x\r\n"), ("HF_HUB_OFFLINE", "Yes\n")]);
        assert_eq!(
            (spaced.endpoint.as_str(), spaced.token.as_deref(), spaced.offline),
            ("http://x", Some("hf_x"), true)
        );
        std::fs::write(home.path().join("token"), "hf_stored\n").unwrap();
        assert_eq!(hub(&[("HF_HOME", path)]).token.as_deref(), Some("hf_stored"));
        let without = |value| hub(&[("HF_HOME", path), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", value)]).token;
        assert_eq!((without("1"), without("0").is_some()), (None, true));
        assert_eq!(hub(&[("HF_HOME", path)]).cache, home.path().join("hub"));
        assert_eq!(hub(&[("HF_HOME", path), ("HF_HUB_CACHE", "/c")]).cache, Path::new("/c"));
    }
}
