//! Display names of models, data sets and methods.

use crate::paper::Paper;

/// A colour in plots: red, green and blue.
pub(crate) type Colour = (u8, u8, u8);

pub(crate) const ORANGE: Colour = (230, 159, 0);
pub(crate) const SKY: Colour = (86, 180, 233);
pub(crate) const GREEN: Colour = (0, 158, 115);
pub(crate) const BLUE: Colour = (0, 114, 178);
pub(crate) const PURPLE: Colour = (204, 121, 167);
/// Grey that is dark enough to differ from green and purple for colour-blind readers.
pub(crate) const GREY: Colour = (96, 96, 96);

/// The colours of methods: the palette of Okabe and Ito, which colour-blind readers can
/// distinguish, and grey.
pub(crate) const PALETTE: [Colour; 6] = [ORANGE, SKY, GREEN, PURPLE, BLUE, GREY];

/// How the bars of a method look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Look {
    pub(crate) colour: Colour,
    pub(crate) hatched: bool,
}

impl Look {
    pub(crate) const fn plain(colour: Colour) -> Self {
        Self { colour, hatched: false }
    }
}

/// Returns the display name and the plot colour of a method of the paper's tables.
fn published(method: &str) -> Option<(&'static str, Colour)> {
    Some(match method {
        "original" => ("No pruning", ORANGE),
        "pfq_without_bias_correction" => ("PfQ w/o bias corr.", SKY),
        "pfq" => ("PfQ", BLUE),
        "fine_tune_once_with_pfq" => ("Tune once w/ PfQ", ORANGE),
        "algorithm1" => ("Algorithm 1", BLUE),
        "dfq" => ("DFQ", ORANGE),
        "dfq_with_fine_tune" => ("DFQ + fine-tune", ORANGE),
        "pact" => ("PACT", PURPLE),
        "dsq" => ("DSQ", GREEN),
        "ours" => ("Ours", BLUE),
        _ => return None,
    })
}

/// Returns the method's position in the paper's table. Methods that are not in it come last.
pub(crate) fn rank(table: &str, method: &str) -> usize {
    let methods = Paper::published().methods(table);
    methods.iter().position(|known| *known == method).unwrap_or(methods.len())
}

/// Returns a method's display name. A method that is not the paper's keeps its own name.
pub(crate) fn method_label(method: &str) -> &str {
    published(method).map_or(method, |(label, _)| label)
}

/// Returns the name of the same method without PfQ, if the method's name says that PfQ is used.
pub(crate) fn without_pfq(method: &str) -> Option<String> {
    let after = method.strip_suffix(" after PfQ").map(String::from);
    after.or_else(|| Some(format!("{} without PfQ", method.strip_suffix(" with PfQ")?)))
}

/// Returns a look for each of a plot's methods. The paper's methods have fixed colours.
pub(crate) fn method_looks(methods: &[&str]) -> Vec<Look> {
    looks(methods, |method| Some(published(method)?.1))
}

/// Returns a look for each name, all different for up to twelve names.
///
/// A name has the colour `own` unless an earlier one has it. The other names use the remaining
/// colours in turn, and then the hatched ones.
pub(crate) fn looks(names: &[&str], own: impl Fn(&str) -> Option<Colour>) -> Vec<Look> {
    let mut taken = Vec::new();
    let mut fixed = |name: &&str| {
        let look = own(name).map(Look::plain).filter(|look| !taken.contains(look))?;
        taken.push(look);
        Some(look)
    };
    let fixed: Vec<Option<Look>> = names.iter().map(&mut fixed).collect();
    let all = [false, true].into_iter().flat_map(|hatched| PALETTE.map(|colour| Look { colour, hatched }));
    let mut rest = all.filter(|look| !taken.contains(look)).cycle();
    fixed.into_iter().map(|look| look.or_else(|| rest.next()).unwrap_or(Look::plain(GREY))).collect()
}

/// Returns the display name of a model, as "MobileNetV2", with the width factor if it is not 1.
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
        "imagenet1000_shrunk" => "ImageNet-1000, pictures shrunk",
        "imagenet_part_shrunk" => "a part of ImageNet, pictures shrunk",
        "imagenet_holdout_part" => "a part of ImageNet, training images held out",
        "imagenet_holdout_part_shrunk" => "a part of ImageNet, training images held out, pictures shrunk",
        "imagenet_holdout_shrunk" => "ImageNet, training images held out, pictures shrunk",
        "cifar100_part" => "a part of CIFAR-100",
        "cifar100_holdout" => "CIFAR-100, training images held out",
        "cifar100_holdout_part" => "a part of CIFAR-100, training images held out",
        other if is_synthetic(other) => "synthetic data",
        other => other,
    }
}

/// Returns whether the data set of this name is the synthetic stand-in.
pub fn is_synthetic(dataset: &str) -> bool {
    dataset.starts_with("synthetic")
}

/// Returns the bit widths of activations and weights, as "A4/W4".
pub(crate) fn bits_label(activation_bits: u32, weight_bits: u32) -> String {
    format!("A{activation_bits}/W{weight_bits}")
}

/// The remark that explains weights of 32 bits.
pub(crate) const FLOAT: &str = "W32: float weights.";

/// Returns the display name of a table: "Table 3" for "table3".
pub(crate) fn table_label(table: &str) -> String {
    match table.strip_prefix("table") {
        Some(number) => format!("Table {number}"),
        None => table.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_and_network_of_the_paper_has_a_name_for_people() {
        let paper = Paper::published();
        let methods: Vec<&str> = paper.tables().flat_map(|table| paper.methods(table)).collect();
        assert!(methods.len() > 10);
        for method in methods {
            assert!(published(method).is_some(), "{method}");
        }
        for model in paper.models() {
            assert_ne!(model_label(model, 1.0), model);
        }
    }

    #[test]
    fn methods_of_a_plot_look_different() {
        fn check(methods: &[&str], expect: &[Colour]) {
            let expect: Vec<Look> = expect.iter().copied().map(Look::plain).collect();
            assert_eq!(method_looks(methods), expect, "{methods:?}");
        }
        check(&["dfq_with_fine_tune", "ours"], &[ORANGE, BLUE]);
        check(&["pact", "dsq", "LSQ", "ours"], &[PURPLE, GREEN, ORANGE, BLUE]);
        // Two methods of the paper that have the same colour in different tables.
        check(&["algorithm1", "a", "ours"], &[BLUE, ORANGE, SKY]);
        let twelve = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "ours"];
        let found = method_looks(&twelve);
        assert_eq!(crate::paper::distinct(found.clone()), found);
        assert_eq!(found[11], Look::plain(BLUE));
        assert_eq!(found[5], Look { colour: ORANGE, hatched: true });
    }
}
