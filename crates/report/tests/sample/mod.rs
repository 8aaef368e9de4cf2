//! A sample row that tests modify.

use report::Row;

/// Returns a row of Table 3: MobileNetV2, ours at 4 bits, without the paper's figures.
pub fn row() -> Row {
    Row {
        table: "table3".into(),
        profile: "reduced".into(),
        dataset: "cifar100".into(),
        model: "mobilenet_v2".into(),
        width: 1.0,
        activation_bits: 4,
        weight_bits: 4,
        method: "ours".into(),
        seed: 0,
        batch: Some(64),
        top1_percent: 70.0,
        macs: 92_400_000,
        weights_pruned_percent: 0.0,
        float_top1_percent: 75.5,
        paper_top1_percent: None,
        paper_mac_millions: None,
        top1_minus_paper: None,
        settings_hash: "5e77".into(),
        git_commit: "c0de".into(),
        device: "cpu".into(),
        wall_seconds: 83.0,
    }
}
