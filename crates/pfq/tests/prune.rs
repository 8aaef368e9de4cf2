//! Pruning planted constant filters leaves the outputs unchanged.

use candle_core::{Device, IndexOp, Tensor};
use kernels::Activation;
use models::{
    BatchNorm, Fold, Input, Kernel, Method, MobileNet, Network, Node, Norm, Quantization, Step, Sum, Version,
};
use pfq::{Corrected, Criterion, PfQ, Report};
use quant_core::Precision;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::OnceLock;

fn random(shape: &[usize], (lo, hi): (f32, f32), seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(lo..hi)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn images() -> Tensor {
    random(&[3, 32, 32, 3], (-2.0, 2.0), 9)
}

/// Returns a network with random γ and β, and with running statistics that fit its activations.
/// Each is made once, as its statistics take many passes.
fn network(version: Version) -> Network {
    static MADE: [OnceLock<Network>; 2] = [const { OnceLock::new() }; 2];
    let made = MADE[usize::from(version == Version::V2)].get_or_init(|| {
        // At half the width, no residual ties V2's stem to the first block.
        let config = MobileNet { width: 0.5, ..MobileNet::new(version, Input::Cifar, 10) };
        settled(config.init(3, &Device::Cpu).unwrap())
    });
    made.duplicate().unwrap()
}

fn settled(mut network: Network) -> Network {
    for (i, unit) in network.units_mut().enumerate() {
        let channels = unit.filters();
        if let Norm::Batch(norm) = &mut unit.norm {
            norm.gamma = random(&[channels], (0.5, 1.5), 100 + i as u64);
            norm.beta = random(&[channels], (-0.5, 1.0), 200 + i as u64);
        }
    }
    for _ in 0..50 {
        network.forward_train(&images(), Step::alone(0.1)).unwrap();
    }
    network
}

/// Returns a network with an activation after a sum, a projection on a shortcut, and an output that
/// three nodes read.
fn branches() -> Network {
    use Activation::{Identity, Relu, Relu6};
    use Kernel::{Depthwise, Full, Pointwise};
    let mut n = Network::of_image("branches", [32, 32, 3]);
    let unit = |n: &mut Network, name: &str, input: usize, kernel: Kernel, filters: usize, act| {
        let dims = kernel.weight_dims(n.shapes()[input][2], filters);
        let norm = Norm::Batch(BatchNorm::init(filters, &Device::Cpu).unwrap());
        n.push_unit(name, kernel, random(&dims, (-0.5, 0.5), input as u64), norm, act);
        let last = n.last();
        n.nodes[last].unit_mut().unwrap().input = input;
        last
    };
    let sum = |n: &mut Network, name: &str, inputs, activation| {
        n.nodes.push(Node::Sum(Sum { name: name.into(), inputs, activation, quantizer: None }));
        n.last()
    };
    let stem = unit(&mut n, "stem", 0, Full { size: 3, stride: 2 }, 8, Relu);
    let expand = unit(&mut n, "a.expand", stem, Pointwise, 12, Relu);
    let project = unit(&mut n, "a.project", expand, Pointwise, 8, Identity);
    let a = sum(&mut n, "a", [stem, project], Relu);
    let project = unit(&mut n, "b.project", a, Pointwise, 16, Identity);
    let shortcut = unit(&mut n, "b.shortcut", a, Pointwise, 16, Identity);
    let b = sum(&mut n, "b", [shortcut, project], Relu);
    let second = unit(&mut n, "c.second", b, Pointwise, 16, Relu);
    let c = sum(&mut n, "c", [b, second], Identity);
    let third = unit(&mut n, "d.third", b, Depthwise { stride: 1 }, 16, Identity);
    sum(&mut n, "d", [c, third], Relu6);
    n.push_head(random(&[16, 5], (-0.5, 0.5), 30), random(&[5], (-0.5, 0.5), 31));
    // The caps are below the planted constants.
    n.nodes[expand].unit_mut().unwrap().cap = Some(random(&[12], (0.3, 0.6), 32));
    n.validate().unwrap();
    settled(n)
}

/// Makes filter `channel` of the named unit constant: zero weights and statistics, output φ(β).
fn plant(network: &mut Network, unit: &str, channel: usize, beta: f32) {
    let unit = network.units_mut().find(|u| u.name == unit).expect("a unit of that name");
    let keep: Vec<f32> = (0..unit.filters()).map(|j| if j == channel { 0.0 } else { 1.0 }).collect();
    let keep = Tensor::new(keep, &Device::Cpu).unwrap();
    unit.weight = unit.weight.broadcast_mul(&keep).unwrap();
    let Norm::Batch(norm) = &mut unit.norm else { panic!("planting needs batch norm") };
    norm.mean = (&norm.mean * &keep).unwrap();
    norm.variance = (&norm.variance * &keep).unwrap();
    let planted = ((1.0 - &keep).unwrap() * f64::from(beta)).unwrap();
    norm.beta = ((&norm.beta * &keep).unwrap() + planted).unwrap();
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn removed(report: &Report) -> Vec<(&str, usize)> {
    report.layers.iter().filter(|l| l.removed > 0).map(|l| (l.name.as_str(), l.removed)).collect()
}

/// Plants filters with the constant φ(β), prunes, and checks that the right filters are removed and
/// the logits are unchanged.
fn check(version: Version, planted: &[(&str, usize)], beta: f32, gone: &[(&str, usize)]) {
    let mut network = network(version);
    for &(unit, channel) in planted {
        plant(&mut network, unit, channel, beta);
    }
    let before = network.forward(&images()).unwrap();
    let (pruned, report) = PfQ::default().apply(&network).unwrap();
    assert_eq!(removed(&report), gone);
    assert_eq!((report.macs_after, report.weights_after), (pruned.macs(), pruned.weights()));
    assert!(report.macs_after < report.macs_before);
    let after = pruned.forward(&images()).unwrap();
    // After a depthwise layer, a zero has become that layer's own constant, which may have any
    // value.
    let feeds_depthwise = |&(name, _): &(&str, usize)| {
        let next = network.units().skip_while(|u| u.name != name).nth(1);
        next.is_some_and(|u| u.kernel.is_depthwise())
    };
    // If the constant is zero, the removed terms are exact zeros, and a product is summed in the
    // order of the depth, so the bits are the same. Otherwise, sums of about 1e3 terms of order 1
    // are rounded in another order.
    let exact = beta <= 0.0 && !planted.iter().any(feeds_depthwise);
    let (error, allowed) = (distance(&before, &after), if exact { 0.0 } else { 1e-5 });
    assert!(error <= allowed, "{planted:?} with β = {beta}: logits differ by {error}");
    if exact {
        // The remaining elements of every mean and of the bias have the same bits, too.
        for (old, new) in network.units().zip(pruned.units()) {
            let shift = |unit: &models::Unit| match &unit.norm {
                Norm::Batch(norm) => values(&norm.mean),
                Norm::Bias(bias) => values(bias),
            };
            let (old, new) = (shift(old), shift(new));
            assert!(new.iter().all(|x| old.iter().any(|y| x.to_bits() == y.to_bits())), "a mean was moved");
        }
    }
    assert_eq!(distance(&before, &network.forward(&images()).unwrap()), 0.0, "the input network was changed");
}

#[test]
fn dead_filters_go_without_a_trace() {
    let v2 = |planted: &[(&str, usize)], gone: &[(&str, usize)]| check(Version::V2, planted, -0.7, gone);
    v2(&[("stem", 2)], &[("stem", 1)]);
    v2(&[("blocks.3.expand", 5)], &[("blocks.3.expand", 1), ("blocks.3.depthwise", 1)]);
    v2(&[("blocks.3.depthwise", 0)], &[("blocks.3.expand", 1), ("blocks.3.depthwise", 1)]);
    v2(&[("last", 7), ("last", 1279)], &[("last", 2)]);
    let v1 = |planted: &[(&str, usize)], gone: &[(&str, usize)]| check(Version::V1, planted, -0.7, gone);
    v1(&[("stem", 3)], &[("stem", 1), ("blocks.0.depthwise", 1)]);
    v1(&[("blocks.4.pointwise", 1)], &[("blocks.4.pointwise", 1), ("blocks.5.depthwise", 1)]);
    v1(&[("blocks.12.pointwise", 9)], &[("blocks.12.pointwise", 1)]);
}

#[test]
fn constant_filters_leave_their_constants() {
    let v2 = |planted: &[(&str, usize)], gone: &[(&str, usize)]| check(Version::V2, planted, 0.8, gone);
    v2(&[("stem", 2)], &[("stem", 1)]);
    v2(&[("blocks.3.depthwise", 1)], &[("blocks.3.expand", 1), ("blocks.3.depthwise", 1)]);
    // If both are low, the constant of the depthwise filter counts.
    v2(
        &[("blocks.3.expand", 1), ("blocks.3.depthwise", 1)],
        &[("blocks.3.expand", 1), ("blocks.3.depthwise", 1)],
    );
    v2(&[("blocks.16.project", 4)], &[("blocks.16.project", 1)]);
    v2(&[("last", 7)], &[("last", 1)]);
    let v1 = |planted: &[(&str, usize)], gone: &[(&str, usize)]| check(Version::V1, planted, 0.8, gone);
    v1(&[("blocks.0.depthwise", 3)], &[("stem", 1), ("blocks.0.depthwise", 1)]);
    v1(&[("blocks.12.pointwise", 9)], &[("blocks.12.pointwise", 1)]);
}

/// A channel tied by residuals is removed only if all of its producers are low.
#[test]
fn residual_channels_need_every_producer() {
    let all = [("blocks.7.project", 2), ("blocks.8.project", 2), ("blocks.9.project", 2)];
    let tied: Vec<(&str, usize)> = std::iter::once(("blocks.6.project", 2)).chain(all).collect();
    let gone: Vec<(&str, usize)> = tied.iter().map(|&(unit, _)| (unit, 1)).collect();
    check(Version::V2, &tied, 0.8, &gone);
    // Projections have no activation, so only β = 0 gives zero.
    check(Version::V2, &tied, 0.0, &gone);

    let mut network = network(Version::V2);
    for (unit, channel) in all {
        plant(&mut network, unit, channel, 0.8);
    }
    let (_, report) = PfQ::default().apply(&network).unwrap();
    assert_eq!(removed(&report), []);
    assert_eq!(report.low_in_part, 1);
}

/// In a network that branches, a channel is removed from all nodes that sums tie together. All
/// readers, including the classifier after the pooling, take up its constant.
#[test]
fn branches_are_pruned_alike() {
    let network = branches();
    let named: Vec<(Vec<&str>, Vec<&str>)> = pfq::groups(&network)
        .iter()
        .map(|group| {
            let names = |nodes: &[usize]| nodes.iter().map(|&i| network.nodes[i].name()).collect();
            (names(&group.nodes), names(&group.read))
        })
        .collect();
    let tied = vec!["b.project", "b.shortcut", "b", "c.second", "c", "d.third", "d", "head"];
    let expected = [
        (vec!["stem", "a.project", "a"], vec!["stem", "a"]),
        (vec!["a.expand"], vec!["a.expand"]),
        (tied, vec!["b", "head"]),
    ];
    assert_eq!(named, expected);

    let check = |planted: &[&str], gone: &[(&str, usize)], low_in_part: usize| {
        let mut network = branches();
        for unit in planted {
            plant(&mut network, unit, 3, 0.8);
        }
        let before = network.forward(&images()).unwrap();
        let (pruned, report) = PfQ::default().apply(&network).unwrap();
        assert_eq!((removed(&report), report.low_in_part), (gone.to_vec(), low_in_part), "{planted:?}");
        let error = distance(&before, &pruned.forward(&images()).unwrap());
        assert!(error < 1e-5, "{planted:?}: logits differ by {error}");
    };
    check(&["stem", "a.project"], &[("stem", 1), ("a.project", 1)], 0);
    check(&["a.project"], &[], 1);
    check(&["a.expand"], &[("a.expand", 1)], 0);
    let four = ["b.project", "b.shortcut", "c.second", "d.third"];
    check(&four, &four.map(|unit| (unit, 1)), 0);
    // A depthwise layer turns a constant into a constant, but the pointwise unit, which is not low,
    // does not.
    check(&["b.project", "b.shortcut", "d.third"], &[], 1);
}

/// A constant c ≠ 0 before a depthwise layer is c·Σk after it, except at the border, where padding
/// reads zeros. Inside, the block's output is unchanged.
#[test]
fn constants_through_depthwise_layers_are_exact_inside_the_border() {
    let mut network = network(Version::V2);
    plant(&mut network, "blocks.4.expand", 5, 0.8);
    let (pruned, report) = PfQ::default().apply(&network).unwrap();
    assert_eq!(removed(&report), [("blocks.4.expand", 1), ("blocks.4.depthwise", 1)]);
    let block = |network: &Network| {
        // The sum has the name of this unit, too, and comes last.
        let project = network.nodes.iter().rposition(|node| node.name() == "blocks.4.project").unwrap();
        let mut output = None;
        let mut observe = |i, _: Option<&Tensor>, y: &Tensor| {
            if i == project {
                output = Some(y.clone());
            }
            Ok(())
        };
        network.forward_observed(&images(), &mut observe).unwrap();
        output.unwrap()
    };
    let (before, after) = (block(&network), block(&pruned));
    let inside = |t: &Tensor| t.i((.., 1..7, 1..7, ..)).unwrap();
    assert_eq!(before.dims()[1..3], [8, 8]);
    let error = distance(&inside(&before), &inside(&after));
    assert!(error < 1e-5, "inside: {error}");
    assert!(distance(&before, &after) > 1e-3, "the border should differ, or the test shows nothing");
}

/// The constants go through the activation quantizers, as in Algorithm 1's second pruning.
#[test]
fn constants_are_those_of_the_quantized_network() {
    let folded = [3u32, 4, 8].map(|bits| (bits, Fold::BatchStatistics, Method::Uniform));
    let folded = folded.into_iter().chain([(4, Fold::FloatStatistics, Method::Uniform)]);
    let learned = Method::learned().map(|method| (4, Fold::Unfolded, method));
    for (bits, fold, method) in folded.chain(learned) {
        let mut network = network(Version::V2);
        let precision = |bits| Precision::try_from(bits).unwrap();
        let settings = Quantization {
            activations: precision(bits),
            first_layer: precision(8),
            last_layer: precision(8),
            fold,
            method,
            ..Quantization::default()
        };
        network.quantize(&settings).unwrap();
        network.forward_train(&images(), Step::alone(0.1)).unwrap();
        for (unit, channel) in [("stem", 1), ("blocks.3.depthwise", 1), ("last", 7)] {
            plant(&mut network, unit, channel, 0.8);
        }
        let before = network.forward(&images()).unwrap();
        let (pruned, _) = PfQ::default().apply(&network).unwrap();
        // A value that rounding moves across the border of a level would show as a whole step.
        let error = distance(&before, &pruned.forward(&images()).unwrap());
        assert!(error < 1e-4, "{method:?}, {bits} bits: {error}");
    }
}

#[test]
fn without_bias_correction_the_constants_are_lost() {
    let mut network = network(Version::V2);
    plant(&mut network, "stem", 2, 0.8);
    let before = network.forward(&images()).unwrap();
    let pfq = PfQ { bias_correction: false, ..PfQ::default() };
    let (pruned, _) = pfq.apply(&network).unwrap();
    let corrected = PfQ::default().apply(&network).unwrap().0;
    assert_eq!(pruned.macs(), corrected.macs());
    assert!(distance(&before, &pruned.forward(&images()).unwrap()) > 1e-3);
}

/// Evaluation is the same whether the mean or the shift takes up the constants.
#[test]
fn shifts_take_constants_up_as_means_do() {
    let mut network = network(Version::V2);
    plant(&mut network, "stem", 2, 0.8);
    plant(&mut network, "blocks.4.expand", 7, 1.7);
    let apply = |corrected| PfQ { corrected, ..PfQ::default() }.apply(&network).unwrap().0;
    let (mean, beta) = (apply(Corrected::Mean), apply(Corrected::Beta));
    let error = distance(&mean.forward(&images()).unwrap(), &beta.forward(&images()).unwrap());
    assert!(error < 1e-5, "logits differ by {error}");
    let moved = |network: &Network, of: fn(&BatchNorm) -> &Tensor| {
        let norms =
            mean.units().zip(network.units()).filter_map(|(a, b)| Some((a.batch_norm()?, b.batch_norm()?)));
        norms.filter(|(a, b)| values(of(a)) != values(of(b))).count()
    };
    // Two units read the two channels: an expansion after the stem, and a projection after the
    // depthwise layer.
    assert_eq!((moved(&beta, |norm| &norm.beta), moved(&beta, |norm| &norm.mean)), (2, 2));
}

/// The other criteria remove as many filters of each layer: random ones, the same for the same
/// seed, or those with the smallest |γ|.
#[test]
fn other_criteria_take_as_many() {
    let mut network = network(Version::V2);
    for (unit, channel) in [("stem", 2), ("blocks.4.expand", 7), ("blocks.4.expand", 9), ("last", 11)] {
        plant(&mut network, unit, channel, 0.8);
    }
    // The smallest |γ| of this layer, and of the depthwise layer after it, which has the same
    // channels.
    for name in ["blocks.4.expand", "blocks.4.depthwise"] {
        let unit = network.units_mut().find(|unit| unit.name == name).unwrap();
        let filters = unit.filters();
        let Norm::Batch(norm) = &mut unit.norm else { panic!("a new network is normalized") };
        let gamma = (0..filters).map(|j| if j == 3 || j == 20 { -1e-3 } else { 1.0 }).collect::<Vec<f32>>();
        norm.gamma = Tensor::new(gamma, &Device::Cpu).unwrap();
    }
    let pfq = |criterion| PfQ { criterion, ..PfQ::default() };
    let (expected, report) = pfq(Criterion::Variance).apply(&network).unwrap();
    let of_layer = |criterion| {
        let node = network.nodes.iter().position(|node| node.name() == "blocks.4.expand").unwrap();
        let kept = &pfq(criterion).kept(&network).unwrap()[node];
        (0..kept.len()).filter(|&j| !kept[j]).collect::<Vec<usize>>()
    };
    assert_eq!(of_layer(Criterion::Variance), [7, 9]);
    assert_eq!(of_layer(Criterion::SmallestGamma), [3, 20]);
    let by_lot = [1, 1, 2].map(|seed| of_layer(Criterion::Random { seed }));
    assert!(by_lot[0] == by_lot[1] && by_lot[0] != by_lot[2], "{by_lot:?}");
    for criterion in [Criterion::SmallestGamma, Criterion::Random { seed: 1 }] {
        let (pruned, other) = pfq(criterion).apply(&network).unwrap();
        assert_eq!(removed(&other), removed(&report));
        assert_eq!((pruned.macs(), pruned.weights()), (expected.macs(), expected.weights()));
        assert!(values(&pruned.forward(&images()).unwrap()).iter().all(|logit| logit.is_finite()));
    }
}

/// After folding, no filter has a running variance that could be low.
#[test]
fn folded_networks_are_refused() {
    let mut network = network(Version::V2);
    for unit in network.units_mut() {
        unit.norm = Norm::Bias(Tensor::zeros(unit.filters(), candle_core::DType::F32, &Device::Cpu).unwrap());
    }
    let error = PfQ::default().apply(&network).unwrap_err().to_string();
    assert!(error.contains("no unit") && error.contains("prune before"), "{error}");
}

#[test]
fn one_channel_always_stays() {
    let mut network = network(Version::V2);
    for channel in 0..16 {
        plant(&mut network, "stem", channel, 0.8);
    }
    let before = network.forward(&images()).unwrap();
    let (pruned, report) = PfQ::default().apply(&network).unwrap();
    assert_eq!((removed(&report), report.kept_as_last), (vec![("stem", 15)], 1));
    assert!(distance(&before, &pruned.forward(&images()).unwrap()) < 1e-5);

    // The channels of a sum are low in both of its summands, so none is low only in part.
    let mut network = self::network(Version::V2);
    let summands = ["blocks.1.project", "blocks.2.project"];
    for unit in summands {
        let filters = network.units().find(|of| of.name == unit).unwrap().filters();
        for channel in 0..filters {
            plant(&mut network, unit, channel, 0.8);
        }
    }
    let (_, report) = PfQ::default().apply(&network).unwrap();
    assert_eq!((report.kept_as_last, report.low_in_part), (1, 0));
}

#[test]
fn impossible_requests_are_errors() {
    let network = network(Version::V1);
    for threshold in [0.0, -1.0, f64::NAN] {
        let pfq = PfQ { threshold: Some(threshold), ..PfQ::default() };
        assert!(pfq.apply(&network).unwrap_err().to_string().contains("τ"));
    }
}
