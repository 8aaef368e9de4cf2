//! Printing: results go to standard output, everything else to standard error.
//!
//! A failure to print must not stop a run. Text that can't be printed is dropped, and the program
//! reports this when it ends, unless the reader has closed the pipe, as in `| head`.

use anyhow::{Result, bail};
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// The first error in writing to standard output. After it, nothing is written there.
static BROKEN: OnceLock<io::Error> = OnceLock::new();

/// Whether another process of the job does the printing.
static SILENT: AtomicBool = AtomicBool::new(false);

/// Suppresses everything but errors from now on, because another process of the job prints.
pub fn silence() {
    SILENT.store(true, Ordering::Relaxed);
}

/// Prints one or more lines to standard output.
pub fn print(text: &str) {
    if BROKEN.get().is_some() || SILENT.load(Ordering::Relaxed) {
        return;
    }
    let mut output = io::stdout().lock();
    if let Err(error) = writeln!(output, "{text}").and_then(|()| output.flush()) {
        BROKEN.set(error).ok();
    }
}

/// Prints a message to standard error, if it can be written.
pub fn tell(text: &str) {
    if !SILENT.load(Ordering::Relaxed) {
        complain(text);
    }
}

/// Prints an error to standard error, even if this process is silenced.
pub fn complain(text: &str) {
    writeln!(io::stderr(), "{text}").ok();
}

/// Checks that an output file has the extension of its format, so that a mistyped name does not
/// overwrite a file of another kind.
pub(crate) fn check_extension(out: &Path, extension: &str) -> Result<()> {
    if out.extension().is_none_or(|found| found != extension) {
        bail!(
            "{}: expected a file name that ends in .{extension}, the format that is written",
            out.display()
        );
    }
    Ok(())
}

/// Checks that everything was printed, unless the reader has closed standard output.
///
/// # Errors
/// If standard output could not be written, for example on a full disk.
pub fn finish() -> Result<()> {
    match BROKEN.get() {
        Some(error) if error.kind() != ErrorKind::BrokenPipe => {
            bail!("standard output could not be written ({error}); the files on disk are not affected")
        }
        _ => Ok(()),
    }
}
