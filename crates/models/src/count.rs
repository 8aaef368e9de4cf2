//! Multiply–accumulates and weights, counted as the paper counts them (method section 5).

use crate::{Kernel, Network, Node};

/// Counts of one convolution or of the classifier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Name of the unit, or `head`.
    pub name: String,
    /// What kind of convolution it is: `full`, `depthwise` or `pointwise`.
    pub kind: &'static str,
    /// Filters (output channels).
    pub filters: usize,
    /// Weights, without biases and normalization.
    pub weights: u64,
    /// Multiply–accumulates for one image.
    pub macs: u64,
}

impl Network {
    /// Counts of every convolution and of the classifier, in order.
    pub fn layers(&self) -> Vec<Layer> {
        let count = |(node, [h, w, _]): (&Node, [usize; 3])| {
            let unit = node.unit()?;
            // Every weight is used once for every position of the output.
            let weights = unit.weight.elem_count() as u64;
            let macs = weights * (h * w) as u64;
            let kind = match unit.kernel {
                Kernel::Full { .. } => "full",
                Kernel::Depthwise { .. } => "depthwise",
                Kernel::Pointwise => "pointwise",
            };
            Some(Layer { name: unit.name.clone(), kind, filters: unit.filters(), weights, macs })
        };
        self.nodes.iter().zip(self.shapes()).filter_map(count).collect()
    }

    /// Multiply–accumulates of the convolutions and the classifier for one image.
    pub fn macs(&self) -> u64 {
        self.layers().iter().map(|l| l.macs).sum()
    }

    /// Weights of the convolutions and the classifier: what "weights pruned %" is a share of.
    pub fn weights(&self) -> u64 {
        self.layers().iter().map(|l| l.weights).sum()
    }
}

#[cfg(test)]
mod tests {
    use crate::{Input, MobileNet, Version};

    fn check(config: MobileNet, macs: u64) {
        assert_eq!(config.macs().unwrap(), macs, "{config:?}");
    }

    /// The paper's figures, cut to whole or tenth millions there: 147.2, 510, 313.
    #[test]
    fn macs_of_the_papers_networks_to_the_unit() {
        check(MobileNet::new(Version::V2, Input::Cifar, 100), 147_240_960);
        check(MobileNet::new(Version::V1, Input::Cifar, 100), 510_840_832);
        let v2 = MobileNet::new(Version::V2, Input::Imagenet, 1000);
        check(v2, 313_619_328);
        check(MobileNet { first_expansion: false, ..v2 }, 300_774_272);
    }
}
