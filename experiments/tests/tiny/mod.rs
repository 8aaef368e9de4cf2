//! A profile whose tables take seconds.

use std::path::Path;

/// τ: about the median of the variances after one step.
const THRESHOLD: f64 = 0.95;

/// Writes `tiny.toml`, the profile `quick` of one batch: narrower, and as much data as one step takes.
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
    // After one step the variances are little below those at the start, 1: some filters are removed, not all.
    profile["pfq"].as_table_mut().unwrap().insert("threshold".into(), THRESHOLD.into());
    std::fs::write(folder.join("tiny.toml"), profile.to_string()).unwrap();
}
