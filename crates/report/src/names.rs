//! How models, data and methods are called in front of people.

/// A method of the paper: its name in the CSV files, its name for people, and its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// The name in the CSV files.
    pub id: &'static str,
    /// The name for people.
    pub label: &'static str,
    /// Its colour in plots, of the palette of Okabe and Ito, which the colour-blind can tell apart.
    pub colour: (u8, u8, u8),
}

/// Every method, in the order of the paper's tables: within a table the proposed one is the last.
pub const METHODS: [Method; 10] = [
    Method { id: "original", label: "No pruning", colour: ORANGE },
    Method { id: "pfq_without_bias_correction", label: "PfQ w/o bias corr.", colour: SKY },
    Method { id: "pfq", label: "PfQ", colour: BLUE },
    Method { id: "fine_tune_once_with_pfq", label: "Tune once w/ PfQ", colour: ORANGE },
    Method { id: "algorithm1", label: "Algorithm 1", colour: BLUE },
    Method { id: "dfq", label: "DFQ", colour: ORANGE },
    Method { id: "dfq_with_fine_tune", label: "DFQ + fine-tune", colour: ORANGE },
    Method { id: "pact", label: "PACT", colour: PURPLE },
    Method { id: "dsq", label: "DSQ", colour: GREEN },
    Method { id: "ours", label: "Ours", colour: BLUE },
];

pub(crate) const ORANGE: (u8, u8, u8) = (230, 159, 0);
pub(crate) const SKY: (u8, u8, u8) = (86, 180, 233);
pub(crate) const GREEN: (u8, u8, u8) = (0, 158, 115);
pub(crate) const BLUE: (u8, u8, u8) = (0, 114, 178);
pub(crate) const PURPLE: (u8, u8, u8) = (204, 121, 167);
pub(crate) const GREY: (u8, u8, u8) = (128, 128, 128);

/// The colours of methods that are not the paper's, one after the other.
const OTHERS: [(u8, u8, u8); 5] = [ORANGE, SKY, GREEN, PURPLE, BLUE];

/// The method's place in [`METHODS`]; methods that are not the paper's come after all of them.
pub(crate) fn rank(method: &str) -> usize {
    METHODS.iter().position(|known| known.id == method).unwrap_or(METHODS.len())
}

pub(crate) fn method_label(method: &str) -> &str {
    METHODS.get(rank(method)).map_or(method, |known| known.label)
}

/// The colour of a method among those of a plot.
pub(crate) fn colour(method: &str, methods: &[&str]) -> (u8, u8, u8) {
    let place = || methods.iter().position(|other| *other == method).unwrap_or(0);
    METHODS.get(rank(method)).map_or_else(|| OTHERS[place() % OTHERS.len()], |known| known.colour)
}

/// "MobileNetV2", and what its width is multiplied by where that is not 1.
pub(crate) fn model_label(model: &str, width: f64) -> String {
    let name = match model {
        "mobilenet_v1" => "MobileNetV1",
        "mobilenet_v2" => "MobileNetV2",
        other => other,
    };
    if width == 1.0 { name.into() } else { format!("{name} ×{width}") }
}

pub(crate) fn dataset_label(dataset: &str) -> &str {
    match dataset {
        "cifar10" => "CIFAR-10",
        "cifar100" => "CIFAR-100",
        "imagenet1000" => "ImageNet-1000",
        "imagenet_part" => "a part of ImageNet",
        "imagenet_holdout" => "ImageNet, training images held out",
        "cifar100_holdout" => "CIFAR-100, training images held out",
        other if is_synthetic(other) => "synthetic data",
        other => other,
    }
}

pub(crate) fn is_synthetic(dataset: &str) -> bool {
    dataset.starts_with("synthetic")
}

/// "A4/W4": bits of activations and of weights.
pub(crate) fn bits_label(activation_bits: u32, weight_bits: u32) -> String {
    format!("A{activation_bits}/W{weight_bits}")
}

/// What to say where weights are of 32 bits.
pub(crate) const FLOAT: &str = "W32: float weights.";

/// "table3" is "Table 3".
pub(crate) fn table_label(table: &str) -> String {
    match table.strip_prefix("table") {
        Some(number) => format!("Table {number}"),
        None => table.into(),
    }
}

/// What a table of the paper compares.
pub(crate) fn table_subject(table: &str) -> &'static str {
    match table {
        "table1" => "quantized activations, without pruning, without bias correction, and with PfQ",
        "table2" => "fine-tuning once after PfQ, and Algorithm 1",
        "table3" => "DFQ with fine-tuning, and ours",
        "table4" => "DFQ with fine-tuning, PACT, DSQ, and ours",
        "table5" => "DFQ and ours, “using accuracy drop”",
        _ => "",
    }
}
