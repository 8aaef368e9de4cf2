//! Settings of the whole process, and how a program ends.

use crate::flags::TIME_LIMIT;
use crate::output;
use anyhow::{Error, Result};
use std::process::ExitCode;

/// Runs a program's work where it runs fastest:
///
/// * with an allocator that keeps its pages ([`kernels::memory::keep_pages`]);
/// * on a thread of the pool that runs its parallel loops. This thread then takes part in the loops
///   instead of sleeping, being woken, and competing with them for a core, which saves 5 to 8 % of
///   a training step on 2 cores.
pub fn run(work: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    kernels::memory::keep_pages();
    rayon::scope(|_| work())
}

/// Returns a program's exit code, and prints an error as one line to standard error.
pub fn exit(result: Result<()>) -> ExitCode {
    match result.and_then(|()| output::finish()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(&format!("Error: {}", one_line(&error)));
            ExitCode::FAILURE
        }
    }
}

/// Ends a program whose time limit left something to do.
pub(crate) fn end_in_time() -> Result<()> {
    output::print(
        "The time limit has been reached and stages are left (--plan shows them): run the same command again to \
         continue.",
    );
    output::finish()?;
    std::process::exit(TIME_LIMIT)
}

/// Formats an error as one line, with those of its causes that it does not state itself.
pub(crate) fn one_line(error: &Error) -> String {
    let mut said = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if said.is_empty() {
            said = cause;
        } else if !said.contains(&cause) {
            said += &format!(": {cause}");
        }
    }
    joined(&said)
}

/// Joins the lines of a message. If RUST_BACKTRACE is set, Candle puts a backtrace in the middle of
/// its messages, which this removes.
fn joined(message: &str) -> String {
    let lines = message.lines().map(|line| if line.starts_with("  ") { without_frame(line) } else { line });
    lines.map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Removes what belongs to a backtrace from a line: `  12: function` or `     at file:34:5`.
fn without_frame(line: &str) -> &str {
    let text = line.trim_start();
    let digits = |text: &str| text.chars().take_while(char::is_ascii_digit).count();
    if text.starts_with("at ") {
        let column = |(place, _): (usize, &str)| {
            let after = &text[place + 1..];
            let rest = after[digits(after)..].strip_prefix(':').filter(|_| digits(after) > 0)?;
            (digits(rest) > 0).then(|| &rest[digits(rest)..])
        };
        return text.match_indices(':').find_map(column).unwrap_or(text);
    }
    let number = digits(text);
    if number > 0 && text[number..].starts_with(": ") { "" } else { text }
}

#[cfg(test)]
mod tests {
    use super::{joined, one_line};
    use anyhow::anyhow;

    #[test]
    fn causes_are_stated_once() {
        let error = anyhow!("disk full").context("a.csv: disk full").context("table 3");
        assert_eq!(one_line(&error), "table 3: a.csv: disk full");
        assert_eq!(one_line(&anyhow!("disk full").context("table 3")), "table 3: disk full");
    }

    #[test]
    fn errors_are_one_line_without_a_backtrace() {
        assert_eq!(joined("stage a: file b: not there"), "stage a: file b: not there");
        assert_eq!(joined("  at the start\n\n  and the end "), "at the start and the end");
        let backtrace = std::backtrace::Backtrace::force_capture();
        assert!(backtrace.to_string().lines().count() > 4, "{backtrace}");
        let message = format!("stage a: shapes differ\n{backtrace}: see the manual");
        let found = joined(&message);
        assert_eq!(found, "stage a: shapes differ : see the manual");
    }
}
