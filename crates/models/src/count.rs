//! Counts of multiply–accumulates and weights, as in the paper (method section 5).

use crate::{Kernel, Network, Node};

/// The counts of one convolution or of the classifier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The name of the unit, or `head`.
    pub name: String,
    /// The kind of convolution: `full`, `depthwise` or `pointwise`.
    pub kind: &'static str,
    /// The number of filters (output channels).
    pub filters: usize,
    /// The number of weights, without biases and normalization.
    pub weights: u64,
    /// The number of multiply–accumulates for one image.
    pub macs: u64,
}

impl Network {
    /// Returns the counts of every convolution and of the classifier, in order.
    pub fn layers(&self) -> Vec<Layer> {
        let count = |(node, [h, w, _]): (&Node, [usize; 3])| {
            let unit = node.unit()?;
            // Every weight is used once for each position of the output.
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

    /// Returns the multiply–accumulates of the convolutions and the classifier for one image.
    pub fn macs(&self) -> u64 {
        self.layers().iter().map(|l| l.macs).sum()
    }

    /// Returns the number of weights of the convolutions and the classifier. Percentages of pruned
    /// weights refer to this number.
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

    /// The paper gives these figures in millions, truncated: 147.2, 510, 313.
    #[test]
    fn macs_of_the_papers_networks_to_the_unit() {
        check(MobileNet::new(Version::V2, Input::Cifar, 100), 147_240_960);
        check(MobileNet::new(Version::V1, Input::Cifar, 100), 510_840_832);
        let v2 = MobileNet::new(Version::V2, Input::Imagenet, 1000);
        check(v2, 313_619_328);
        check(MobileNet { first_expansion: false, ..v2 }, 300_774_272);
    }
}
