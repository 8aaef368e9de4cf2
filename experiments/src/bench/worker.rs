//! The processes that do the work, one for each implementation, and what is said to them.
//!
//! A worker says [`Hello`], then answers each line on its stdin with one on its stdout: [`Setup`] with
//! [`Ready`], [`Run`] with [`Ran`], and either with [`Failure`]. It blocks while nobody asks it, so it takes
//! nothing from the one whose turn it is.

use super::case::{Case, Layers};
use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// What a worker says first.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    /// The version of its library.
    pub(super) version: String,
    /// Threads that it computes with.
    pub(super) threads: usize,
}

/// Asks for a case, set up and warm.
#[derive(Debug, Serialize)]
pub(super) struct Setup<'a> {
    pub(super) case: &'a Case,
    /// The network, where the case is of a whole one.
    pub(super) layers: Option<&'a Layers>,
    pub(super) settings: Settings,
}

/// The settings of training that both sides use.
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
    /// Resident before the case was set up.
    pub(super) before_mib: Option<f64>,
    /// Numbers that are learned.
    pub(super) parameters: usize,
    /// Fake quantizers.
    pub(super) quantizers: usize,
    /// Of ours on a GPU.
    #[serde(default)]
    pub(super) traffic: Option<Traffic>,
}

/// What a step moves, and how fast the memory is.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Traffic {
    /// Bytes of a step, at least.
    pub(super) step_bytes: f64,
    /// Bytes a second, read and written, of a large copy.
    pub(super) copy_bytes_per_second: f64,
}

/// Asks for steps.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Run {
    pub(super) run: usize,
}

/// The answer to [`Run`].
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Ran {
    pub(super) seconds: f64,
    /// The most that was resident since the case was warm.
    pub(super) peak_mib: Option<f64>,
}

/// The answer where something went wrong.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Failure {
    pub(super) error: String,
}

/// A running worker. It ends when this is dropped.
pub(super) struct Worker {
    child: Child,
    /// `None` once the worker has been told to end.
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    /// Where its messages go.
    log: PathBuf,
}

impl Worker {
    /// Starts a process; its messages go to the file `log`.
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

    /// The process's number.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Says something and waits for the answer.
    pub(super) fn ask<T: DeserializeOwned>(&mut self, request: &impl Serialize) -> Result<T> {
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        // Where the worker has ended, its last words say more than the broken pipe.
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
        // Without requests it ends by itself.
        self.requests = None;
        self.child.wait().ok();
    }
}
