//! A table's stages as jobs of a real Slurm, with a controller and a node in a folder of their own.
//! Skipped if slurmctld, slurmd and sbatch are not installed (Debian: slurmctld, slurmd,
//! slurm-client).

mod tiny;

use report::Row;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Long enough for jobs that take seconds, on a machine that is busy with other work.
const PATIENCE: Duration = Duration::from_secs(300);

/// A controller and a node, which end when this is dropped.
struct Slurm {
    folder: tempfile::TempDir,
    processes: Vec<Child>,
}

impl Slurm {
    /// Starts both; `None` if Slurm is not installed.
    fn start() -> Option<Self> {
        let installed = ["slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue"].map(program);
        if installed.iter().any(Option::is_none) {
            eprintln!("SKIPPED: Slurm is not installed (slurmctld, slurmd and slurm-client of Debian)");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        // The ports are free again when the listeners are dropped.
        let ports = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [controller, node] = ports.map(|listener| listener.local_addr().unwrap().port());
        let name = |command: &str, flag: &str| {
            let output = Command::new(command).arg(flag).output().unwrap();
            String::from_utf8(output.stdout).unwrap().trim().to_string()
        };
        let (host, user) = (name("hostname", "-s"), name("id", "-un"));
        let at = folder.path().display();
        let configuration = format!(
            "ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser={user}\nSlurmdUser={user}\n\
             SlurmctldPort={controller}\nSlurmdPort={node}\nAuthType=auth/none\nCredType=cred/none\n\
             StateSaveLocation={at}/state\nSlurmdSpoolDir={at}/spool\nSlurmctldPidFile={at}/slurmctld.pid\n\
             SlurmdPidFile={at}/slurmd.pid\nSlurmctldLogFile={at}/slurmctld.log\nSlurmdLogFile={at}/slurmd.log\n\
             ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSwitchType=switch/none\nMpiDefault=none\n\
             SelectType=select/cons_tres\nSelectTypeParameters=CR_CPU\nSchedulerType=sched/builtin\nReturnToService=2\n\
             KillWait=2\nMailProg=/bin/true\nNodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN\n\
             PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP\n"
        );
        std::fs::write(folder.path().join("slurm.conf"), configuration).unwrap();
        for name in ["state", "spool"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let mut slurm = Self { folder, processes: Vec::new() };
        for daemon in ["slurmctld", "slurmd"] {
            let mut command = Command::new(program(daemon).unwrap());
            // The daemons take their configuration from the flag, all other programs from
            // SLURM_CONF.
            command.args(["-D", "-f"]).arg(slurm.folder.path().join("slurm.conf"));
            command.stdout(Stdio::null()).stderr(Stdio::null());
            slurm.processes.push(command.spawn().unwrap());
        }
        slurm.wait("the node to be idle", |slurm| slurm.says("sinfo", &["-h", "-o", "%t"]).trim() == "idle");
        Some(slurm)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("SLURM_CONF", self.folder.path().join("slurm.conf"));
        command
    }

    fn says(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program).args(arguments).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn wait(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let started = Instant::now();
        while !done(self) {
            let log = std::fs::read_to_string(self.folder.path().join("slurmctld.log")).unwrap_or_default();
            let queue = self.says("squeue", &[]);
            assert!(started.elapsed() < PATIENCE, "waited in vain for {what}:\n{queue}\n{log}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Submits what is left of Table 3 in `folder`, started by `launch`; returns what the script
    /// printed.
    fn submit(&self, folder: &Path, launch: &str) -> String {
        let script = table3(folder, &["--plan", "--format", "slurm"]);
        std::fs::write(folder.join("submit.sh"), script).unwrap();
        let mut command = self.command("bash");
        command.current_dir(folder).env("LAUNCH", launch).args(["submit.sh", "--output=%A_%a.log"]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn wait_for_all_jobs(&self) {
        self.wait("the jobs to end", |slurm| slurm.says("squeue", &["-h"]).is_empty());
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        self.says("scontrol", &["shutdown"]);
        for process in &mut self.processes {
            process.kill().ok();
            process.wait().ok();
        }
    }
}

/// Returns the path of a program, which may also be in the administrator's folders.
fn program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(name)).find(|program| program.is_file())
}

/// Runs the rows of one network of Table 3 in `folder`; returns what the program printed.
fn table3(folder: &Path, flags: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_table3"));
    command.args(["--config", "tiny.toml", "--device", "cpu", "--data", "synthetic"]);
    command.args(["--only", "mobilenet_v1,a4w4"]).args(flags).current_dir(folder);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Returns what the jobs printed.
fn logs(folder: &Path) -> String {
    let files = std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
    let files = files.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    files.map(|path| std::fs::read_to_string(path).unwrap()).collect()
}

/// Returns the rows without their times.
fn rows(folder: &Path) -> Vec<Row> {
    let rows = report::read_csv(&folder.join("results/table3/tiny/table3.csv")).unwrap();
    rows.into_iter().map(|row| Row { wall_seconds: 0.0, ..row }).collect()
}

/// Returns a folder with the tiny profile, whose pre-training has so many epochs that it can be
/// killed within them.
fn place() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    tiny::write_profile(folder.path());
    let path = folder.path().join("tiny.toml");
    let mut profile: toml::Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
    profile["training"]["pretraining"]["cosine_epochs"] = toml::Value::Integer(100);
    std::fs::write(&path, profile.to_string()).unwrap();
    folder
}

#[test]
fn a_table_runs_as_jobs_and_survives_that_one_is_killed() {
    let Some(slurm) = Slurm::start() else { return };
    let [undisturbed, place] = [place(), place()];
    table3(undisturbed.path(), &[]);

    // The arrays are pre-training, the first stage of both methods, their second stage, the third
    // and the fourth stage of Algorithm 1, and the table.
    let said = slurm.submit(place.path(), "");
    let names: Vec<&str> = said.lines().map(|line| line.split_once(": ").unwrap().1).collect();
    assert_eq!(names.first(), Some(&"table3-1"), "{said}");
    assert_eq!(names.last(), Some(&"table3"), "{said}");
    let first = said.split_once(':').unwrap().0;

    let epochs = || {
        let stages = std::fs::read_dir(place.path().join("runs")).into_iter().flatten().flatten();
        let metrics =
            stages.filter_map(|stage| std::fs::read_to_string(stage.path().join("metrics.csv")).ok());
        metrics.map(|text| text.lines().count()).max().unwrap_or(0)
    };
    slurm.wait("pre-training to begin", |_| epochs() > 3);
    slurm.says("scancel", &["--signal=KILL", "--full", first]);
    // The jobs that depend on it never run.
    slurm.wait_for_all_jobs();
    let begun = epochs();
    assert!((4..100).contains(&begun), "{begun} epochs");
    assert!(!place.path().join("results").exists());

    slurm.submit(place.path(), "env -u NOTHING");
    slurm.wait_for_all_jobs();
    let logs = logs(place.path());
    assert!(logs.contains("going on from the checkpoint"), "{logs}");
    assert_eq!(rows(place.path()), rows(undisturbed.path()), "{logs}");
    assert!(table3(place.path(), &["--plan"]).contains("7 of 7 stages done"));
}

/// Each job consists of two MPI processes.
#[test]
#[cfg(feature = "mpi")]
fn jobs_of_two_processes_train_together() {
    let Some(slurm) = Slurm::start() else { return };
    if program("mpirun").is_none() {
        return eprintln!("SKIPPED: mpirun is not installed (openmpi-bin of Debian)");
    }
    let place = tempfile::tempdir().unwrap();
    tiny::write_profile(place.path());
    let launch = "env OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 RAYON_NUM_THREADS=1 \
                  OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_mpi_yield_when_idle=1 \
                  mpirun --oversubscribe --bind-to none -n 2";
    slurm.submit(place.path(), launch);
    slurm.wait_for_all_jobs();
    let logs = logs(place.path());
    assert!(table3(place.path(), &["--plan"]).contains("7 of 7 stages done"), "{logs}");
    let rows = rows(place.path());
    assert!(
        rows.len() == 2 && rows.iter().all(|row| row.device.ends_with(", 2 processes")),
        "{rows:?}: {logs}"
    );
}
