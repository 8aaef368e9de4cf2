//! Lists of entries in TOML files, which are read one by one so that an error can name the entry.

use serde::de::DeserializeOwned;

use crate::file::{Error, Result};

/// An entry of a list that has a name of its own.
pub(crate) trait Entry: DeserializeOwned {
    /// Returns the entry's unique name of lower-case letters, digits and hyphens.
    fn id(&self) -> &str;

    /// Checks the values of an entry that has the right form. The error says what was found and
    /// what is expected.
    fn check(&self) -> std::result::Result<(), String>;
}

/// Reads the list `key` (`[[key]]`) from the text of the file `file`. Any other key is an error.
pub(crate) fn parse<T: Entry>(text: &str, file: &str, key: &str) -> Result<Vec<T>> {
    let wrong =
        |entry: &str, problem: String| Error::Entry { file: file.into(), entry: entry.into(), problem };
    let whole: toml::Table =
        toml::from_str(text).map_err(|error| wrong("the whole", error.to_string().trim_end().into()))?;
    if let Some(other) = whole.keys().find(|found| *found != key) {
        return Err(wrong(other, format!("expected [[{key}]] only")));
    }
    let Some(list) = whole.get(key).and_then(toml::Value::as_array) else {
        return Err(wrong(key, format!("found none, expected a list of [[{key}]]")));
    };
    let mut entries: Vec<T> = Vec::new();
    for (index, value) in list.iter().enumerate() {
        let id = value.get("id").and_then(toml::Value::as_str).unwrap_or("without id");
        let wrong = |problem: String| wrong(&format!("{key} {} ({id})", index + 1), problem);
        let entry: T =
            value.clone().try_into().map_err(|error| wrong(error.to_string().trim_end().into()))?;
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if entry.id().is_empty() || !entry.id().chars().all(plain) {
            return Err(wrong("id: expected lower-case letters, digits and hyphens".into()));
        }
        if entries.iter().any(|other| other.id() == entry.id()) {
            return Err(wrong("id: another entry has it too; expected a name of its own".into()));
        }
        entry.check().map_err(wrong)?;
        entries.push(entry);
    }
    Ok(entries)
}
