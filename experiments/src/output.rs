//! What is printed: results on standard output, everything else on standard error.
//!
//! Printing is not worth a run. What can't be printed is left out, and a program tells of it when it ends, unless it was
//! the reader who went, as in `| head`.

use anyhow::{Result, bail};
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Why standard output could not be written, from then on.
static BROKEN: OnceLock<io::Error> = OnceLock::new();

/// Whether another process of the job prints what is to be printed.
static SILENT: AtomicBool = AtomicBool::new(false);

/// From now on nothing but errors is printed: another process of the job does that.
pub fn silence() {
    SILENT.store(true, Ordering::Relaxed);
}

/// Prints a line, or several, on standard output.
pub fn print(text: &str) {
    if BROKEN.get().is_some() || SILENT.load(Ordering::Relaxed) {
        return;
    }
    let mut output = io::stdout().lock();
    if let Err(error) = writeln!(output, "{text}").and_then(|()| output.flush()) {
        BROKEN.set(error).ok();
    }
}

/// Tells something on standard error, if that can be written.
pub fn tell(text: &str) {
    if !SILENT.load(Ordering::Relaxed) {
        complain(text);
    }
}

/// Tells of an error, whichever process this is.
pub fn complain(text: &str) {
    writeln!(io::stderr(), "{text}").ok();
}

/// Checks that a file to be written has the extension of what is written, so that a slip replaces none of another kind.
pub(crate) fn check_extension(out: &Path, extension: &str) -> Result<()> {
    if out.extension().is_none_or(|found| found != extension) {
        bail!("{}: expected a name that ends in .{extension}, which is what is written", out.display());
    }
    Ok(())
}

/// Whether all that was printed went where its reader is.
///
/// # Errors
/// When standard output could not be written, as on a full disk.
pub fn finish() -> Result<()> {
    match BROKEN.get() {
        Some(error) if error.kind() != ErrorKind::BrokenPipe => {
            bail!("standard output could not be written ({error}); files are as they should be")
        }
        _ => Ok(()),
    }
}
