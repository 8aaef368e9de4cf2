//! Channel groups: the outputs that share their channels.

use models::Network;

/// Units whose outputs have the same channels, so that a channel goes from all of them or from none:
/// a depthwise layer shares the channels of what it reads, a residual addition those of its summands.
/// In both MobileNets this is pointwise (or stem) → depthwise; residual spans tie several such
/// producers together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Indices of the units, ascending.
    pub units: Vec<usize>,
    /// Those of `units` whose output is read by a layer outside of the group (the next pointwise
    /// layer, or the classifier): a channel may go where all of these give constants.
    pub read: Vec<usize>,
    /// Whether a residual ties several producers to the channels.
    pub tied: bool,
}

/// The channel groups of `network`, ordered by their first unit.
pub fn groups(network: &Network) -> Vec<Group> {
    let count = network.units.len();
    // root[i] is the smallest unit known to share i's channels.
    let mut root: Vec<usize> = (0..count).collect();
    let mut join = |a: usize, b: usize| {
        let (a, b) = (root[a].min(root[b]), root[a].max(root[b]));
        for r in &mut root {
            if *r == b {
                *r = a;
            }
        }
    };
    for (i, unit) in network.units.iter().enumerate().skip(1) {
        if unit.kernel.is_depthwise() {
            join(i - 1, i);
        }
    }
    for residual in &network.residuals {
        join(residual.from, residual.to);
    }
    let mut all = Vec::new();
    for first in (0..count).filter(|&i| root[i] == i) {
        let units: Vec<usize> = (first..count).filter(|&i| root[i] == first).collect();
        let outside = |i: usize| network.units.get(i + 1).is_none_or(|next| !next.kernel.is_depthwise());
        let read = units.iter().copied().filter(|&i| outside(i)).collect();
        let tied = network.residuals.iter().any(|r| root[r.to] == first);
        all.push(Group { units, read, tied });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use models::{Input, MobileNet, Version};

    /// The groups as lists of unit names, `*` marking those read from outside.
    fn check(config: MobileNet, first: &[&[&str]]) {
        let network = config.init(0, &Device::Cpu).unwrap();
        let named: Vec<Vec<String>> = groups(&network)
            .iter()
            .map(|g| {
                let name = |&i: &usize| {
                    let mark = if g.read.contains(&i) { "*" } else { "" };
                    format!("{}{mark}", network.units[i].name)
                };
                g.units.iter().map(name).collect()
            })
            .collect();
        assert_eq!(named[..first.len()], *first);
    }

    #[test]
    fn v1_chains() {
        let v1 = MobileNet { width: 0.25, ..MobileNet::new(Version::V1, Input::Cifar, 10) };
        check(v1, &[&["stem", "blocks.0.depthwise*"], &["blocks.0.pointwise", "blocks.1.depthwise*"]]);
    }

    #[test]
    fn v2_residuals_tie_projections() {
        let v2 = MobileNet::new(Version::V2, Input::Cifar, 10);
        check(
            v2,
            &[
                &["stem*"],
                &["blocks.0.expand", "blocks.0.depthwise*"],
                &["blocks.0.project*"],
                &["blocks.1.expand", "blocks.1.depthwise*"],
                &["blocks.1.project*", "blocks.2.project*"],
                &["blocks.2.expand", "blocks.2.depthwise*"],
                &["blocks.3.expand", "blocks.3.depthwise*"],
                &["blocks.3.project*", "blocks.4.project*", "blocks.5.project*"],
            ],
        );
    }
}
