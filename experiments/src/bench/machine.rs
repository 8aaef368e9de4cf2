//! What a figure depends on besides the code: the machine, the time, and this process's memory.

use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

/// Returns a field of this process's memory use, in MiB; `None` if the system does not tell.
pub(super) fn resident_mib(field: &str) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    mib(&status, field)
}

/// Resets the peak of the resident memory to its current size, if the system can.
pub(super) fn reset_peak() {
    std::fs::write("/proc/self/clear_refs", "5").ok();
}

/// Returns the value of a line `field:  123 kB`, in MiB.
fn mib(text: &str, field: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(line.split_whitespace().next()?.parse::<f64>().ok()? / 1024.0)
}

/// What the cores did since the machine started, in ticks of the system.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Ticks {
    all: u64,
    /// Ticks that were not idle, including those that a hypervisor took.
    busy: u64,
    /// Ticks of the known processes.
    known: u64,
}

impl Ticks {
    /// Reads the ticks up to now, with those of the given processes; `None` if the system does not
    /// tell.
    pub(super) fn now(processes: impl Iterator<Item = u32>) -> Option<Self> {
        let (all, busy) = ticks_of_cores(&std::fs::read_to_string("/proc/stat").ok()?)?;
        let of = |id: u32| ticks_of_process(&std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?);
        // A process that has ended meanwhile is left out.
        Some(Self { all, busy, known: processes.filter_map(of).sum() })
    }

    /// Returns the share of the cores that other than the known processes took since `earlier`.
    pub(super) fn others_since(self, earlier: Self) -> f64 {
        let others = (self.busy - earlier.busy).saturating_sub(self.known.saturating_sub(earlier.known));
        others as f64 / (self.all - earlier.all).max(1) as f64
    }
}

/// Returns all ticks, and those that were not idle, from the first line of `/proc/stat`.
fn ticks_of_cores(text: &str) -> Option<(u64, u64)> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    // The fields: user, nice, system, idle, waiting for a disk, two kinds of interrupts, taken by a
    // hypervisor.
    let ticks: Vec<u64> = line.split_whitespace().take(8).filter_map(|field| field.parse().ok()).collect();
    let all = ticks.iter().sum();
    Some((all, all - ticks.get(3)? - ticks.get(4)?))
}

/// Returns the ticks in user and kernel mode from `/proc/PID/stat`. The second field, the name, may
/// contain any character.
fn ticks_of_process(text: &str) -> Option<u64> {
    let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// Returns whether the processor has instructions for products of bfloat16.
pub(super) fn has_bf16() -> bool {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    info.split_whitespace().any(|word| matches!(word, "avx512_bf16" | "amx_bf16"))
}

/// Returns the machine and its state as pairs of name and value. What is not known is left out.
pub(super) fn facts(threads: usize) -> Vec<(String, String)> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let value = |text: Option<String>, name: &str, separator: char| {
        text?.lines().find_map(|line| {
            let (key, value) = line.split_once(separator)?;
            (key.trim() == name).then(|| value.trim().trim_matches('"').to_string())
        })
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = read("/proc/meminfo").and_then(|text| mib(&text, "MemTotal"));
    let system = value(read("/etc/os-release"), "PRETTY_NAME", '=');
    let kernel = read("/proc/sys/kernel/osrelease").map(|text| text.trim().to_string());
    let load =
        read("/proc/loadavg").map(|text| text.split_whitespace().take(3).collect::<Vec<_>>().join(", "));
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let all = [
        ("processor", value(read("/proc/cpuinfo"), "model name", ':')),
        ("cores", Some(format!("{threads} used of {cores}"))),
        ("memory", memory.map(|mib| format!("{:.0} GiB", mib / 1024.0))),
        (
            "system",
            Some(match (system, kernel) {
                (Some(system), Some(kernel)) => format!("{system}, kernel {kernel}"),
                _ => std::env::consts::OS.into(),
            }),
        ),
        (
            "load average at the start",
            load.map(|load| format!("{load} (1, 5, 15 minutes; building counts in)")),
        ),
        ("date", Some(date(seconds))),
        ("code", Some(env!("PFQ_COMMIT").into())),
        ("compiler", rustc()),
    ];
    all.into_iter().filter_map(|(name, value)| Some((name.into(), value?))).collect()
}

/// Returns the version of the installed compiler, because the benchmark is built where it runs.
fn rustc() -> Option<String> {
    let output = Command::new("rustc").arg("--version").output().ok()?;
    String::from_utf8(output.stdout).ok().map(|text| text.trim().to_string())
}

/// Returns the day, in UTC, of a number of seconds since 1970, in the proleptic Gregorian calendar.
fn date(seconds: u64) -> String {
    // Years begin in March here, so that a leap day is the last day of its year. Day 0 is 719468
    // days before 1970.
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, expected) in [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (951_868_800, "2000-03-01"),
            (1_767_225_599, "2025-12-31"),
            (1_767_225_600, "2026-01-01"),
        ] {
            assert_eq!(date(seconds), expected);
        }
    }

    #[test]
    fn ticks_of_others() {
        let cores = |busy, idle| ticks_of_cores(&format!("cpu  {busy} 10 5 {idle} 1 0 0 4 0 0\ncpu0 1\n"));
        assert_eq!(cores(100, 80), Some((200, 119)));
        assert_eq!(ticks_of_process("7 (a) b) S 1 2 3 4 5 6 7 8 9 10 30 12 13 14"), Some(42));
        let ticks = |(all, busy), known| Ticks { all, busy, known };
        let (earlier, later) = (ticks(cores(100, 80).unwrap(), 50), ticks(cores(190, 90).unwrap(), 130));
        assert_eq!(later.others_since(earlier), 0.1);
    }

    #[test]
    fn memory_lines() {
        let text = "VmPeak:\t  9 kB\nVmHWM:\t    2048 kB\n";
        assert_eq!((mib(text, "VmHWM"), mib(text, "VmRSS")), (Some(2.0), None));
    }
}
