//! Channel groups: nodes whose outputs share their channels.

use models::{Network, Node};

/// Nodes whose outputs have the same channels, so that a channel is removed from all of them or
/// from none.
///
/// A depthwise layer and pooling share the channels of their input, a sum those of its summands. In
/// both MobileNets a group is pointwise (or stem) → depthwise; residuals tie several such producers
/// together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The indices of the nodes, ascending.
    pub nodes: Vec<usize>,
    /// The members of `nodes` whose output is read by a layer outside of the group: a pointwise
    /// layer or the classifier. A channel may be removed if it is constant in all of these outputs.
    pub read: Vec<usize>,
    /// Whether a sum ties several producers together.
    pub tied: bool,
}

/// Returns the groups of channels that may be removed, ordered by their first node.
///
/// These are all groups except those of the image and of the logits.
pub fn groups(network: &Network) -> Vec<Group> {
    let count = network.nodes.len();
    // Whether a node has the channels of its input.
    let shares = |i: usize| network.nodes[i].unit().is_none_or(|unit| unit.kernel.is_depthwise());
    // root[i] is the smallest node known to share i's channels.
    let mut root: Vec<usize> = (0..count).collect();
    for i in (0..count).filter(|&i| shares(i)) {
        for &input in network.nodes[i].inputs() {
            let (a, b) = (root[i].min(root[input]), root[i].max(root[input]));
            root.iter_mut().filter(|root| **root == b).for_each(|root| *root = a);
        }
    }
    let readers = network.readers();
    let group = |first: usize| {
        let nodes: Vec<usize> = (first..count).filter(|&i| root[i] == first).collect();
        let outside = |i: &usize| readers[*i].iter().any(|&reader| !shares(reader));
        Group {
            read: nodes.iter().copied().filter(outside).collect(),
            tied: nodes.iter().any(|&i| matches!(network.nodes[i], Node::Sum(_))),
            nodes,
        }
    };
    let last = root[network.last()];
    (1..count).filter(|&i| root[i] == i && i != last).map(group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use models::{Input, MobileNet, Version};

    /// Checks the first groups as lists of names. `+` marks sums, and `*` nodes that are read from
    /// outside.
    fn check(config: MobileNet, first: &[&[&str]]) {
        let network = config.init(0, &Device::Cpu).unwrap();
        let named: Vec<Vec<String>> = groups(&network)
            .iter()
            .map(|g| {
                let name = |&i: &usize| {
                    let node = &network.nodes[i];
                    let sum = if matches!(node, Node::Sum(_)) { "+" } else { "" };
                    let mark = if g.read.contains(&i) { "*" } else { "" };
                    format!("{sum}{}{mark}", node.name())
                };
                g.nodes.iter().map(name).collect()
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
                &["blocks.1.project*", "blocks.2.project", "+blocks.2.project*"],
                &["blocks.2.expand", "blocks.2.depthwise*"],
                &["blocks.3.expand", "blocks.3.depthwise*"],
                &[
                    "blocks.3.project*",
                    "blocks.4.project",
                    "+blocks.4.project*",
                    "blocks.5.project",
                    "+blocks.5.project*",
                ],
            ],
        );
    }
}
