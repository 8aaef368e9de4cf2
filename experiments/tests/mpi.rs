//! Tables by several processes that train together under Open MPI. Skipped if this was built
//! without the feature `mpi`, or if mpirun is not installed (Debian: libopenmpi-dev and
//! openmpi-bin).

mod tiny;

use std::process::Command;
use tiny::{Place, TABLE3, said};

/// A program that can't join the other processes says so, instead of repeating their work.
#[test]
#[cfg(not(feature = "mpi"))]
fn without_mpi_one_of_several_processes_is_refused() {
    eprintln!("SKIPPED: all else here needs the feature mpi (cargo test --features experiments/mpi)");
    for (variable, refused) in [("OMPI_COMM_WORLD_SIZE", "2"), ("PMI_SIZE", "16")] {
        let output = Command::new(TABLE3).arg("--plan").env(variable, refused).output().unwrap();
        let error = said(&output);
        assert!(!output.status.success() && error.contains("built without MPI"), "{error}");
    }
    let place = Place::new();
    let mut command = Command::new(TABLE3);
    command.current_dir(place.root()).args(["--config", "tiny.toml", "--data", "synthetic", "--plan"]);
    assert!(command.env("OMPI_COMM_WORLD_SIZE", "1").status().unwrap().success());
}

#[cfg(feature = "mpi")]
mod together {
    use super::*;
    use candle_core::{Device, Tensor};
    use models::Network;
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::process::{Child, Output, Stdio};
    use std::time::{Duration, Instant};

    /// τ: about the median of the variances after two steps from 1.
    const THRESHOLD: f64 = 0.9;

    /// The time in which a job must end after it has lost a process.
    const MOST: Duration = Duration::from_secs(30);

    /// Writes the tiny profile as `name`, with another number of training images and another τ, and
    /// with settings that all trainings get.
    fn change(place: &Place, name: &str, images: i64, threshold: f64, settings: &[(&str, toml::Value)]) {
        let text = std::fs::read_to_string(place.path("tiny.toml")).unwrap();
        let mut profile: toml::Table = text.parse().unwrap();
        profile["data"]["train_images"] = images.into();
        profile["pfq"]["threshold"] = threshold.into();
        for (_, training) in profile["training"].as_table_mut().unwrap() {
            let all = settings.iter().map(|(key, value)| (key.to_string(), value.clone()));
            training.as_table_mut().unwrap().extend(all);
        }
        std::fs::write(place.path(name), profile.to_string()).unwrap();
    }

    /// Returns mpirun for any user and for more processes than cores; `None` if it is not
    /// installed.
    fn mpirun() -> Option<Command> {
        if Command::new("mpirun").arg("--version").output().is_err() {
            eprintln!("SKIPPED: mpirun is not installed (libopenmpi-dev and openmpi-bin of Debian)");
            return None;
        }
        let mut command = Command::new("mpirun");
        command.args(["--oversubscribe", "--bind-to", "none", "--mca", "btl", "self,vader"]);
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        // Processes in a container may not be allowed to read each other's memory, and they share
        // the cores.
        command
            .env("OMPI_MCA_btl_vader_single_copy_mechanism", "none")
            .env("OMPI_MCA_mpi_yield_when_idle", "1");
        command.env("RAYON_NUM_THREADS", "1").stdout(Stdio::piped()).stderr(Stdio::piped());
        Some(command)
    }

    /// Adds a row of Table 3 in `processes` processes, with the settings `config` and its own store
    /// `store`.
    fn table3<'a>(command: &'a mut Command, processes: &str, config: &str, store: &str) -> &'a mut Command {
        row(command.args(["-n", processes, TABLE3]), "cpu", config, store)
    }

    /// Adds the flags for a row of Table 3 on a device.
    fn row<'a>(command: &'a mut Command, device: &str, config: &str, store: &str) -> &'a mut Command {
        command.args(["--device", device, "--data", "synthetic"]);
        command.args(["--only", "mobilenet_v1,a4w4,ours", "--config", config, "--store", store])
    }

    fn run(place: &Place, processes: &str, config: &str, store: &str) -> Option<String> {
        let mut command = mpirun()?;
        command.current_dir(place.root());
        let output = table3(&mut command, processes, config, store).output().unwrap();
        assert!(output.status.success(), "{processes} processes: {}", said(&output));
        Some(said(&output))
    }

    /// Returns the networks of a store, by the names of their stages' folders.
    fn networks(store: &Path) -> BTreeMap<String, Network> {
        let network = |entry: std::io::Result<std::fs::DirEntry>| {
            let entry = entry.unwrap();
            let network = Network::load(&entry.path().join("network.safetensors"), &Device::Cpu).unwrap().0;
            (entry.file_name().into_string().unwrap(), network)
        };
        std::fs::read_dir(store).unwrap().map(network).collect()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Returns the distance between the values of two networks, relative to their norm.
    fn difference(found: &Network, expected: &Network) -> f64 {
        let (mut distance, mut size) = (0.0, 0.0);
        for ((name, found), (_, expected)) in found.tensors().into_iter().zip(expected.tensors()) {
            assert_eq!(found.dims(), expected.dims(), "{name}");
            for (a, b) in values(found).into_iter().zip(values(expected)) {
                distance += f64::from(a - b).powi(2);
                size += f64::from(b).powi(2);
            }
        }
        (distance / size).sqrt()
    }

    /// With statistics of whole batches, two processes with 8 images each pre-train the same
    /// network as one process with 16, except for rounding in sums of another order. After two
    /// steps of 27 layers the difference is 1e-6, or 1e-5 if rounding moves a value across an
    /// activation's bound. (Quantizers have many such bounds; the tests of `train` compare smaller
    /// networks there.) With each process's own statistics the network is another one. Both runs
    /// say what they do.
    #[test]
    fn two_processes_with_half_a_batch_are_as_one() {
        let place = Place::new();
        let common = [("sync_norm", true.into())];
        change(&place, "common.toml", 32, THRESHOLD, &common);
        change(&place, "own.toml", 32, THRESHOLD, &[]);
        let Some(told) = run(&place, "2", "common.toml", "two") else { return };
        assert!(told.contains("2 processes train together: a batch has 16 images, of all of them"), "{told}");
        assert_eq!(told.matches("pre-train seed 0 …").count(), 1, "one process tells what is done: {told}");
        let row = || {
            let rows = report::read_csv(&place.path("results/table3/tiny/table3.csv")).unwrap();
            assert_eq!(rows.len(), 1);
            rows.into_iter().next().unwrap()
        };
        assert!(row().device.ends_with(", 2 processes"), "{}", row().device);
        assert_eq!(row().batch, Some(16), "that of both");
        run(&place, "1", "common.toml", "one");
        assert!(!row().device.contains("processes"), "{}", row().device);
        let (one, two) = (networks(&place.path("one")), networks(&place.path("two")));
        assert!(one.len() == 5 && one.keys().eq(two.keys()), "{:?} and {:?}", one.keys(), two.keys());
        let (one, two) = (pretrained(&place.path("one")), pretrained(&place.path("two")));
        assert!(difference(&two, &one) < 1e-4, "{:.1e}", difference(&two, &one));

        let told = run(&place, "2", "own.toml", "own").unwrap();
        assert!(told.contains("statistics are those of each one's own images"), "{told}");
        let own = pretrained(&place.path("own"));
        assert!(difference(&own, &one) > 1e-3, "{:.1e}", difference(&own, &one));
    }

    /// Returns the pre-trained network of a store.
    fn pretrained(store: &Path) -> Network {
        networks(store).into_iter().find(|(stage, _)| stage.contains("pretrain")).unwrap().1
    }

    /// Waits for the end of a job, which must come in time.
    fn end(mut job: Child) -> Output {
        let started = Instant::now();
        while job.try_wait().unwrap().is_none() {
            if started.elapsed() > MOST {
                job.kill().unwrap();
                panic!("the job has not ended within {MOST:?}: {}", said(&job.wait_with_output().unwrap()));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        job.wait_with_output().unwrap()
    }

    /// Returns the process ID of a rank that mpirun has started.
    fn process(job: &Child, rank: usize) -> String {
        let id = job.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
        let is_the_rank = |child: &&str| {
            let environment = std::fs::read(format!("/proc/{child}/environ")).unwrap_or_default();
            let wanted = format!("OMPI_COMM_WORLD_RANK={rank}");
            environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
        };
        children.split_whitespace().find(is_the_rank).expect("every rank is a child of mpirun").into()
    }

    /// If one of two processes is killed while they train, the job ends in time and names it. The
    /// same command then resumes, to the bits of an undisturbed job.
    #[test]
    fn a_job_of_which_a_process_is_killed_ends_and_is_gone_on_with() {
        let place = Place::new();
        change(&place, "tiny.toml", 64, 0.05, &[]);
        place.pretrain_for(20);
        let store = |name: &str| {
            let folder = place.path(name);
            move |part: &str| {
                let stages = std::fs::read_dir(&folder).into_iter().flatten().flatten();
                stages.map(|stage| stage.path()).find(|path| path.to_str().unwrap().contains(part))
            }
        };
        if run(&place, "2", "tiny.toml", "undisturbed").is_none() {
            return;
        }
        let epochs = || {
            let metrics = store("killed")("pretrain").map(|stage| stage.join("metrics.csv"));
            metrics
                .and_then(|path| std::fs::read_to_string(path).ok())
                .map_or(0, |text| text.lines().count() - 1)
        };
        for rank in [1, 0] {
            let before = epochs();
            let mut command = mpirun().unwrap();
            command.current_dir(place.root());
            let mut job = table3(&mut command, "2", "tiny.toml", "killed").spawn().unwrap();
            while epochs() < before + 3 {
                assert!(job.try_wait().unwrap().is_none(), "{}", said(&job.wait_with_output().unwrap()));
                std::thread::sleep(Duration::from_millis(10));
            }
            let killed = Command::new("kill").args(["-KILL", &process(&job, rank)]).status().unwrap();
            assert!(killed.success());
            let output = end(job);
            let told = format!("{}{}", said(&output), String::from_utf8_lossy(&output.stdout));
            assert!(!output.status.success() && told.contains(&format!("rank {rank}")), "{told}");
            assert!(store("killed")("pretrain").unwrap().join("checkpoint.safetensors").exists());
            assert!(epochs() < 20, "it was killed too late");
        }
        let told = run(&place, "2", "tiny.toml", "killed").unwrap();
        assert!(told.contains("going on from the checkpoint after epoch"), "{told}");
        for stage in ["pretrain", "prune", "finetune"] {
            let [found, expected] = ["killed", "undisturbed"].map(|name| store(name)(stage).unwrap());
            assert_eq!(found.file_name(), expected.file_name());
            let [found, expected] =
                [found, expected].map(|folder| std::fs::read(folder.join("network.safetensors")).unwrap());
            assert!(found == expected, "another network came of {stage}");
        }
    }

    /// At the time limit all processes end together, with the exit code that says that something is
    /// left.
    #[test]
    fn a_time_limit_ends_the_job_after_an_epoch() {
        let place = Place::new();
        place.pretrain_for(2);
        for (code, told) in [(75, "stopped after epoch 1 of 2"), (75, "after epoch 1\n"), (0, "")] {
            let Some(mut command) = mpirun() else { return };
            command.current_dir(place.root());
            let limit = if code == 75 { "0.00001" } else { "60" };
            let output =
                table3(&mut command, "2", "tiny.toml", "runs").args(["--time-limit", limit]).output();
            let output = output.unwrap();
            assert_eq!(output.status.code(), Some(code), "{}", said(&output));
            assert!(said(&output).contains(told), "{}", said(&output));
        }
    }

    /// An error of one process ends the job and names the rank.
    #[test]
    fn an_error_names_its_rank_and_ends_the_job() {
        let place = Place::new();
        change(&place, "other.toml", 48, THRESHOLD, &[]);
        let Some(mut command) = mpirun() else { return };
        command.current_dir(place.root());
        table3(&mut command, "1", "tiny.toml", "runs").arg(":");
        let job = table3(&mut command, "1", "other.toml", "runs").spawn().unwrap();
        let output = end(job);
        let told = said(&output);
        assert!(!output.status.success(), "{told}");
        assert!(told.contains("Error: rank 1 of 2: rank 1 has data of the fingerprint"), "{told}");
    }

    /// Skipped if there are no GPUs.
    #[cfg(feature = "nccl")]
    mod on_gpus {
        use super::*;
        use candle_core::cuda::cudarc::driver::CudaContext;

        /// Returns whether two processes have a GPU each. With the software GPU, every process has
        /// one.
        fn have_gpus() -> bool {
            let in_software = std::env::var("LD_PRELOAD").is_ok_and(|loaded| loaded.contains("software_gpu"));
            let found = CudaContext::device_count().unwrap_or(0) >= if in_software { 1 } else { 2 };
            if !found {
                eprintln!("SKIPPED: there are no two GPUs");
            }
            found
        }

        /// Two processes on GPUs, whose gradients NCCL adds up, pre-train the same network as two
        /// on CPUs, except for the order of sums in their kernels.
        #[test]
        fn two_processes_on_gpus_are_as_two_on_cpus() {
            let place = Place::new();
            change(&place, "tiny.toml", 32, THRESHOLD, &[]);
            let mut plan = Command::new(TABLE3);
            row(&mut plan, "cpu", "tiny.toml", "gpu").arg("--plan");
            let plan = plan.current_dir(place.root()).output().unwrap();
            let plan = String::from_utf8(plan.stdout).unwrap();
            let stage = plan.lines().find(|line| line.contains("pre-train")).unwrap();
            let stage = stage.split_whitespace().next().unwrap();
            for device in ["cpu", "cuda"] {
                let Some(mut command) = mpirun().filter(|_| have_gpus()) else { return };
                command.current_dir(place.root()).args(["-n", "2", TABLE3]);
                let output =
                    row(&mut command, device, "tiny.toml", device).args(["--stage", stage]).output().unwrap();
                assert!(output.status.success(), "{device}: {}", said(&output));
                assert_eq!(said(&output).contains("added up by NCCL"), device == "cuda", "{}", said(&output));
            }
            let (found, expected) = (pretrained(&place.path("cuda")), pretrained(&place.path("cpu")));
            assert!(difference(&found, &expected) < 1e-4, "{:.1e}", difference(&found, &expected));
        }

        /// If NCCL fails in a process, the process ends the job and names its rank and the reason.
        #[test]
        fn a_failure_of_nccl_names_its_rank_and_ends_the_job() {
            let place = Place::new();
            let Some(mut command) = mpirun().filter(|_| have_gpus()) else { return };
            command.current_dir(place.root());
            let libraries = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
            let others =
                libraries.split(':').filter(|folder| !Path::new(folder).join("libnccl.so.2").exists());
            let others = format!("LD_LIBRARY_PATH={}", others.collect::<Vec<_>>().join(":"));
            row(command.args(["-n", "1", TABLE3]), "cuda", "tiny.toml", "runs");
            row(command.args([":", "-n", "1", "env", &others, TABLE3]), "cuda", "tiny.toml", "runs");
            let output = end(command.spawn().unwrap());
            let told = said(&output);
            assert!(!output.status.success(), "{told}");
            assert!(
                told.contains("Error: rank 1 of 2: ") && told.contains("expected libnccl.so.2"),
                "{told}"
            );
        }
    }
}
