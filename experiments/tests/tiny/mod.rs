//! A profile whose tables take seconds, and places to run them.

#![allow(dead_code, reason = "not every test uses all of it")]

use image::{Rgb, RgbImage};
use report::Row;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub const TABLE3: &str = env!("CARGO_BIN_EXE_table3");

/// τ: about the median of the variances after one step.
const THRESHOLD: f64 = 0.95;

/// Writes `tiny.toml`: the profile `quick` with narrower networks and with data for one step per
/// epoch.
pub fn write_profile(folder: &Path) {
    let text = include_str!("../../profiles/quick.toml");
    let mut profile: toml::Table = text.parse().unwrap();
    let mut set = |path: &[&str], value: toml::Value| {
        let (name, tables) = path.split_last().unwrap();
        let table = tables.iter().fold(&mut profile, |table, name| table[*name].as_table_mut().unwrap());
        table.insert(name.to_string(), value);
    };
    set(&["name"], "tiny".into());
    set(&["data", "train_images"], 16.into());
    set(&["data", "test_images"], 12.into());
    for network in ["mobilenet_v1", "mobilenet_v2"] {
        set(&["networks", network, "width"], 0.1.into());
    }
    let trainings = profile["training"].as_table_mut().unwrap();
    for training in trainings.iter_mut().map(|(_, training)| training.as_table_mut().unwrap()) {
        training.extend(
            [("warmup_epochs", 0), ("cosine_epochs", 1), ("batch", 16)]
                .map(|(key, value)| (key.to_string(), value.into())),
        );
    }
    // After one step the variances are slightly below their initial value 1, so some filters are
    // removed, but not all.
    profile["pfq"].as_table_mut().unwrap().insert("threshold".into(), THRESHOLD.into());
    std::fs::write(folder.join("tiny.toml"), profile.to_string()).unwrap();
}

/// Writes pictures of `classes`, each class with its own colour, to `train/` and `val/`.
pub fn write_pictures(folder: &Path, classes: &[&str]) {
    for (split, count) in [("train", 12), ("val", 6)] {
        for (class, name) in classes.iter().enumerate() {
            let place = folder.join(split).join(name);
            std::fs::create_dir_all(&place).unwrap();
            for number in 0..count {
                let picture = RgbImage::from_fn(44, 38, |x, y| {
                    let mut pixel = [(x * 5) as u8, (y * 6) as u8, (number * 20) as u8];
                    pixel[class % 3] = 255;
                    Rgb(pixel)
                });
                picture.save(place.join(format!("{number}.png"))).unwrap();
            }
        }
    }
}

/// A folder with the tiny profile, in which programs run.
pub struct Place(tempfile::TempDir);

impl Place {
    /// Creates a place.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_profile(folder.path());
        Self(folder)
    }

    /// Returns the folder.
    pub fn root(&self) -> &Path {
        self.0.path()
    }

    /// Returns the path of a file or folder in the place.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs Table 3 with these flags; returns its output.
    pub fn table3(&self, flags: &[&str]) -> Output {
        let device: &[&str] = if flags.contains(&"--device") { &[] } else { &["--device", "cpu"] };
        let mut command = Command::new(TABLE3);
        command.current_dir(self.0.path()).args(["--config", "tiny.toml"]).args(device).args(flags);
        command.output().unwrap()
    }

    /// Sets the number of epochs of pre-training.
    pub fn pretrain_for(&self, epochs: usize) {
        self.change(|profile| {
            profile["training"]["pretraining"]["cosine_epochs"] = toml::Value::Integer(epochs as i64);
        });
    }

    /// Changes the settings.
    pub fn change(&self, change: impl Fn(&mut toml::Table)) {
        let path = self.path("tiny.toml");
        let mut profile: toml::Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
        change(&mut profile);
        std::fs::write(path, profile.to_string()).unwrap();
    }

    /// Runs Table 3 on synthetic data, which must succeed; returns what it printed on standard
    /// error.
    #[track_caller]
    pub fn run(&self, flags: &[&str]) -> String {
        let output = self.table3(&[&["--data", "synthetic"], flags].concat());
        assert!(output.status.success(), "{flags:?}: {}", said(&output));
        said(&output)
    }

    /// Checks that Table 3 with these flags fails with a message that contains all of `parts`.
    #[track_caller]
    pub fn check_refused(&self, flags: &[&str], parts: &[&str]) {
        let output = self.table3(flags);
        let error = said(&output);
        assert!(!output.status.success(), "{flags:?} was accepted: {error}");
        for part in parts {
            assert!(error.contains(part), "{flags:?}: {error:?} lacks {part:?}");
        }
    }

    /// Returns the rows of Table 3 without their times.
    pub fn rows(&self) -> Vec<Row> {
        let rows = report::read_csv(&self.path("results/table3/tiny/table3.csv")).unwrap();
        rows.into_iter().map(|row| Row { wall_seconds: 0.0, ..row }).collect()
    }

    /// Returns the folder of the only stage whose name contains `part`.
    #[track_caller]
    pub fn stage(&self, part: &str) -> PathBuf {
        let names = std::fs::read_dir(self.path("runs")).unwrap().map(|entry| entry.unwrap().path());
        let found: Vec<PathBuf> = names.filter(|path| path.to_str().unwrap().contains(part)).collect();
        assert_eq!(found.len(), 1, "{part}: {found:?}");
        found[0].clone()
    }

    /// Returns the number of stages that have a folder in the store.
    pub fn stages(&self) -> usize {
        std::fs::read_dir(self.path("runs")).map_or(0, |entries| entries.count())
    }
}

/// Returns what a program printed on standard error.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
