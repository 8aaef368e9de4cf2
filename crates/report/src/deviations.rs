//! The points where this reproduction differs from the paper, or had to choose.

use serde::Deserialize;

use crate::entries::{self, Entry};
use crate::file::Result;

/// A point where we differ from the paper, or that the paper leaves open.
#[derive(Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Deviation {
    /// The unique name: lower-case letters, digits and hyphens.
    pub id: String,
    /// The subject.
    pub point: String,
    /// What the paper says or does; "not said" if the paper leaves it open.
    pub paper: String,
    /// What this reproduction does.
    pub ours: String,
    /// The reason.
    pub why: String,
    /// The known effect, if any.
    pub effect: Option<String>,
}

impl Deviation {
    /// Reads deviations from a TOML text (`[[deviation]]`). `file` is used only in error messages.
    pub fn parse(text: &str, file: &str) -> Result<Vec<Deviation>> {
        entries::parse(text, file, "deviation")
    }
}

impl Entry for Deviation {
    fn id(&self) -> &str {
        &self.id
    }

    fn check(&self) -> std::result::Result<(), String> {
        let all = [("point", &self.point), ("paper", &self.paper), ("ours", &self.ours), ("why", &self.why)];
        match all.iter().find(|(_, text)| text.trim().is_empty()) {
            Some((key, _)) => Err(format!("{key} is empty: expected a sentence")),
            None => Ok(()),
        }
    }
}
