//! The command line of this program.

use anyhow::{Context as _, Result};
use std::path::Path;

/// The flags of cargo for the features of this build.
const FEATURES: &str = if cfg!(feature = "nccl") {
    " -p experiments --features nccl"
} else if cfg!(feature = "cuda") {
    " -p experiments --features cuda"
} else if cfg!(feature = "mpi") {
    " -p experiments --features mpi"
} else {
    ""
};

/// Returns the cargo command that repeats this call of the program. It is the one that runs what
/// `--draw` draws.
pub(crate) fn line() -> String {
    let mut words = std::env::args();
    let program = words.next().unwrap_or_default();
    let program = Path::new(&program).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut command = vec![format!("cargo run --release{FEATURES} --bin"), program, "--".into()];
    command.extend(words.filter(|word| word != "--draw").map(quoted));
    command.join(" ").trim_end_matches(" --").into()
}

/// Returns the path of this program and its flags, without those that ask for a plan.
pub(crate) fn without_plan() -> Result<Vec<String>> {
    let program = std::env::current_exe().context("the path of this program could not be determined")?;
    let mut command = vec![program.display().to_string()];
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--plan" => {}
            "--format" => drop(words.next()),
            _ if word.starts_with("--format=") => {}
            _ => command.push(word),
        }
    }
    Ok(command)
}

/// Quotes a word for a shell, if necessary.
pub(crate) fn quoted(word: String) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_=+.,:/@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_where_a_shell_would_cut_them() {
        assert_eq!(quoted("--seeds=0,1".into()), "--seeds=0,1");
        assert_eq!(quoted("as the others,float".into()), "'as the others,float'");
        assert_eq!(quoted("it's".into()), "'it'\\''s'");
        assert_eq!(quoted(String::new()), "''");
    }
}
