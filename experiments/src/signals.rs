//! The message of a run that is told to end.
//!
//! All finished work is on the disk already, so nothing is left to do. SIGINT (Ctrl-C), SIGTERM and
//! SIGHUP end the program with one line that says what is kept. The exit code is 128 plus the
//! signal's number, as in shells.

use std::sync::Mutex;

/// What is kept of the stage that runs; `None` if no stage runs.
static KEPT: Mutex<Option<String>> = Mutex::new(None);

/// Records what is kept of the stage that runs.
pub fn note(kept: Option<String>) {
    *KEPT.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = kept;
}

/// Starts a thread that waits for a signal.
#[cfg(unix)]
pub fn watch() {
    use crate::output;
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

    let all = [(SIGINT, "SIGINT"), (SIGTERM, "SIGTERM"), (SIGHUP, "SIGHUP")];
    let wanted = all.iter().map(|(signal, _)| *signal).filter(|signal| !is_ignored(*signal));
    // If this fails, a signal ends the program as usual.
    let Ok(mut signals) = signal_hook::iterator::Signals::new(wanted) else { return };
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let name = all.iter().find(|(known, _)| *known == signal).map_or("a signal", |(_, name)| name);
            let kept = KEPT.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
            let kept = kept.unwrap_or_else(|| "every finished stage is kept".into());
            output::tell(&format!("\nEnded by {name}: {kept}. The same command goes on from there."));
            std::process::exit(128 + signal);
        }
    });
}

/// Does nothing, because there are no such signals.
#[cfg(not(unix))]
pub fn watch() {}

/// Returns whether the program was started with a signal ignored, as by nohup.
#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask =
        status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
