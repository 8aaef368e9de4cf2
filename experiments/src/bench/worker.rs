//! The worker processes, one for each implementation, and the messages to and from them.
//!
//! A worker first sends [`Hello`]. It then answers each line on its stdin with one on its stdout:
//! [`Setup`] with [`Ready`], [`Run`] with [`Ran`], and either with [`Failure`]. It blocks while
//! there is no request, so it takes no time from the worker whose turn it is.

use super::case::{Case, Layers};
use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The first message of a worker.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    /// The version of its library.
    pub(super) version: String,
    /// The number of threads that it computes with.
    pub(super) threads: usize,
}

/// A request to set up a case and to warm it up.
#[derive(Debug, Serialize)]
pub(super) struct Setup<'a> {
    pub(super) case: &'a Case,
    /// The network, if the case is a whole one.
    pub(super) layers: Option<&'a Layers>,
    pub(super) settings: Settings,
}

/// The training settings that both sides use.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Settings {
    pub(super) rate: f64,
    pub(super) momentum: f64,
    pub(super) weight_decay: f64,
    pub(super) range_momentum: f64,
}

/// The answer to [`Setup`].
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Ready {
    /// The resident memory before the case was set up, in MiB.
    pub(super) before_mib: Option<f64>,
    /// The number of learned parameters.
    pub(super) parameters: usize,
    /// The number of fake quantizers.
    pub(super) quantizers: usize,
    /// The memory traffic of our implementation on a GPU.
    #[serde(default)]
    pub(super) traffic: Option<Traffic>,
}

/// The memory traffic of a step, and the speed of the memory.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Traffic {
    /// The least number of bytes that a step moves.
    pub(super) step_bytes: f64,
    /// The bytes per second, read and written, of a large copy.
    pub(super) copy_bytes_per_second: f64,
}

/// A request to run a number of steps.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Run {
    pub(super) run: usize,
}

/// The answer to [`Run`].
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Ran {
    pub(super) seconds: f64,
    /// The peak of the resident memory since the case was warm, in MiB.
    pub(super) peak_mib: Option<f64>,
}

/// The answer to a request that failed.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Failure {
    pub(super) error: String,
}

/// A running worker, which ends when this is dropped.
pub(super) struct Worker {
    child: Child,
    /// `None` once the worker has been told to end.
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    /// The file that its messages go to.
    log: PathBuf,
}

impl Worker {
    /// Starts a process whose messages go to the file `log`.
    pub(super) fn start(mut command: Command, log: PathBuf) -> Result<Self> {
        let file = File::create(&log).with_context(|| format!("{} could not be written", log.display()))?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(file)
            .spawn()
            .with_context(|| format!("{} could not be started", command.get_program().display()))?;
        let requests = child.stdin.take();
        let answers = child.stdout.take().context("a worker without stdout")?;
        Ok(Self { child, requests, answers: BufReader::new(answers), log })
    }

    /// Returns the process ID.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a request and waits for the answer.
    pub(super) fn ask<T: DeserializeOwned>(&mut self, request: &impl Serialize) -> Result<T> {
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        // If the worker has ended, its last message says more than the broken pipe.
        if let Some(requests) = &mut self.requests {
            requests.write_all(line.as_bytes()).and_then(|()| requests.flush()).ok();
        }
        self.answer()
    }

    /// Waits for an answer.
    pub(super) fn answer<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        if line.is_empty() {
            let status = self.child.wait()?;
            let said = std::fs::read_to_string(&self.log).unwrap_or_default();
            let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing").trim();
            bail!("it ended ({status}); its last words, from {}: {last}", self.log.display());
        }
        if let Ok(Failure { error }) = serde_json::from_str(&line) {
            bail!(error);
        }
        serde_json::from_str(&line).with_context(|| format!("the worker said {:?}", line.trim()))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The worker ends by itself when its stdin is closed.
        self.requests = None;
        self.child.wait().ok();
    }
}
