//! Where this reproduction differs from the paper, or had to choose.

use serde::Deserialize;

use crate::entries::{self, Entry};
use crate::file::Result;

/// A point at which we differ from the paper, or which it leaves open.
#[derive(Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Deviation {
    /// Its name: lower-case letters, digits and hyphens.
    pub id: String,
    /// What it is about.
    pub point: String,
    /// What the paper says or does; "not said" where it leaves it open.
    pub paper: String,
    /// What is done here.
    pub ours: String,
    /// The reason.
    pub why: String,
    /// What is known about its effect.
    pub effect: Option<String>,
}

impl Deviation {
    /// Reads the deviations of a TOML file (`[[deviation]]`), whose name only serves the errors.
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
