//! Networks with learned quantizers: which tensors are quantized, levels, files. `golden.rs`
//! compares their passes with PyTorch.

use candle_core::{Device, Tensor};
use kernels::{loss::softmax_cross_entropy, sgd};
use models::{
    Extras, Fold, Input, Method, MobileNet, Network, Node, Parameter, Quantization, Quantizer, Role, Step,
    Version, WeightGrid,
};
use quant_core::Precision;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;

const STEP: Step = Step::alone(0.1);
const BITS: u32 = 4;

fn settings(method: Method, fold: Fold) -> Quantization {
    let [few, eight] = [BITS, 8].map(|bits| Precision::try_from(bits).unwrap());
    let bits = Quantization {
        activations: few,
        weights: few,
        first_layer: eight,
        last_layer: eight,
        ..Quantization::default()
    };
    Quantization { fold, method, ..bits }
}

fn float() -> Network {
    let config = MobileNet { width: 0.1, ..MobileNet::new(Version::V2, Input::Cifar, 10) };
    config.init(1, &Device::Cpu).unwrap()
}

fn images() -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let values: Vec<f32> = (0..6 * 12 * 12 * 3).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, (6, 12, 12, 3), &Device::Cpu).unwrap()
}

/// Returns a network after some steps of training, in which its quantizers learn.
fn trained(method: Method) -> Network {
    let mut network = float();
    network.quantize(&settings(method, Fold::Unfolded)).unwrap();
    let labels = Tensor::new(&[0u32, 1, 2, 3, 4, 5], &Device::Cpu).unwrap();
    let parameters = network.parameters();
    for _ in 0..4 {
        let (logits, tape) = network.forward_train(&images(), STEP).unwrap();
        let loss = softmax_cross_entropy(&logits, &labels, 0.0).unwrap();
        let gradients = network.backward(tape, &loss.grad).unwrap();
        for parameter in &parameters {
            let gradient = gradients.of(parameter).unwrap();
            let velocity = gradient.zeros_like().unwrap();
            sgd::step(&parameter.tensor, gradient, &velocity, 0.05, 0.0, 0.0).unwrap();
        }
    }
    network
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn distinct(tensor: &Tensor) -> usize {
    bits(&(tensor + 0.0).unwrap()).into_iter().collect::<BTreeSet<_>>().len()
}

/// Returns the quantizers of every node, with the prefixes of their tensors' names.
fn quantizers(network: &Network) -> impl Iterator<Item = (String, &Quantizer)> {
    network.nodes.iter().flat_map(|node| {
        let weights = node.unit().and_then(|unit| unit.weight_quantizer.as_ref());
        let weights = weights.map(|q| (format!("{}.weight_", node.name()), q));
        weights.into_iter().chain(node.quantizer().map(|q| (format!("{}.", node.name()), q)))
    })
}

/// Every tensor that a scheme keeps is one of the network's tensors, and a parameter if it is
/// learned. It changes in training, is saved in files, and is copied with the network.
#[test]
fn every_tensor_of_every_scheme_is_trained_saved_and_copied() {
    for &method in Method::ALL {
        let network = trained(method);
        let mut started = float();
        started.quantize(&settings(method, Fold::Unfolded)).unwrap();
        started.forward_train(&images(), STEP).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("network.safetensors");
        network.save(&path, &Extras::default()).unwrap();
        let (read, copied) = (Network::load(&path, &Device::Cpu).unwrap().0, network.duplicate().unwrap());
        let find = |network: &Network, name: &str| -> Tensor {
            let all = network.tensors();
            let found = all.into_iter().find(|(found, _)| found == name);
            found.unwrap_or_else(|| panic!("{method:?}: no {name}")).1.clone()
        };
        let parameters = network.parameters();
        let (mut kept, mut moved, mut learn) = (0, 0, 0);
        for (prefix, quantizer) in quantizers(&network) {
            for (field, role, tensor) in quantizer.slots() {
                let name = format!("{prefix}{field}");
                assert_eq!(find(&network, &name).id(), tensor.id(), "{method:?}: {name}");
                let is_own = |p: &&Parameter| p.name == name && p.tensor.id() == tensor.id();
                assert_eq!(parameters.iter().find(is_own).map(|p| p.role), role, "{method:?}: {name}");
                assert_eq!(bits(&find(&read, &name)), bits(tensor), "{method:?}: {name} in the file");
                let copy = find(&copied, &name);
                assert!(
                    copy.id() != tensor.id() && bits(&copy) == bits(tensor),
                    "{method:?}: {name}, copied"
                );
                kept += 1;
                learn += usize::from(role.is_some());
                moved += usize::from(bits(&find(&started, &name)) != bits(tensor));
            }
        }
        assert!(kept >= network.nodes.len() / 2 && (learn > 0) == (method != Method::Uniform), "{method:?}");
        assert!(moved as f64 > 0.95 * kept as f64, "{method:?}: {moved} of {kept} tensors moved");
    }
}

#[test]
fn every_layer_but_the_first_and_the_last_learns() {
    for method in Method::learned() {
        let network = trained(method);
        let check = |name: &str, q: Option<&Quantizer>, bits: u32, uniform: bool| {
            let q = q.unwrap_or_else(|| panic!("{method:?}: {name} is not quantized"));
            assert!(q.bits.get() == bits && q.kind().is_null() == uniform, "{method:?}: {name}: {q:?}");
        };
        let readers = network.readers();
        for (i, node) in network.nodes.iter().enumerate() {
            let name = node.name();
            if let Node::Unit(unit) = node {
                let end = i == 1 || i == network.last();
                check(name, unit.weight_quantizer.as_ref(), if end { 8 } else { BITS }, end);
            }
            match node {
                Node::Image(_) | Node::Pool(_) => check(name, node.quantizer(), 8, true),
                // The sum is quantized instead, and logits are never quantized.
                _ if readers[i].iter().all(|&reader| matches!(network.nodes[reader], Node::Sum(_))) => {
                    assert!(node.quantizer().is_none(), "{name}");
                }
                _ => check(name, node.quantizer(), BITS, false),
            }
        }
        let units = network.units().count() - 1;
        let count = |role: Role| network.parameters().iter().filter(|p| p.role == role).count();
        match method {
            Method::Pact => assert_eq!([Role::Clip, Role::Interval].map(count), [units, 0]),
            Method::Dsq => {
                assert_eq!([Role::Clip, Role::Interval].map(count), [0, 2 * units + 2 * (units - 1)]);
            }
            _ => (),
        }
    }
}

/// Files describe quantizers as earlier versions of this program did.
#[test]
fn entries_in_files_stay_what_they_were() {
    let check = |method: Method, fold: Fold, unit: usize, entries: &str| {
        let mut network = float();
        network.quantize(&settings(method, fold)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("network.safetensors");
        network.save(&path, &Extras::default()).unwrap();
        let file = std::fs::read(&path).unwrap();
        let text = String::from_utf8_lossy(&file).replace('\\', "");
        let name = &network.units().nth(unit).unwrap().name;
        let start = text.find(&format!("{{\"name\":\"{name}\"")).unwrap();
        let quantizers = text[start..].find("\"weight_quantizer\"").unwrap();
        assert!(text[start + quantizers..].starts_with(entries), "{}", &text[start + quantizers..][..200]);
    };
    let uniform = |folded: bool| {
        format!(
            r#""weight_quantizer":{{"bits":4,"folded":{folded}}},"output_quantizer":{{"bits":4,"ready":false}}}}"#
        )
    };
    check(Method::Uniform, Fold::Unfolded, 3, &uniform(false));
    check(Method::Uniform, Fold::BatchStatistics, 3, &uniform(true));
    let pact = |signed: bool| {
        format!(
            r#""weight_quantizer":{{"bits":4,"folded":false,"kind":"dorefa"}},"output_quantizer":{{"bits":4,"ready":false,"kind":{{"pact":{{"signed":{signed}}}}}}}}}"#
        )
    };
    check(Method::Pact, Fold::Unfolded, 2, &pact(false));
    // This unit is a projection.
    check(Method::Pact, Fold::Unfolded, 3, &pact(true));
    let dsq = r#""weight_quantizer":{"bits":4,"folded":false,"kind":"dsq"},"output_quantizer":{"bits":4,"ready":false,"kind":"dsq"}}"#;
    check(Method::Dsq, Fold::Unfolded, 3, dsq);
    let lsq = |kind: &str| {
        format!(
            r#""weight_quantizer":{{"bits":4,"folded":false,"kind":"lsq"}},"output_quantizer":{{"bits":4,"ready":false,"kind":"{kind}"}}}}"#
        )
    };
    check(Method::Lsq, Fold::Unfolded, 2, &lsq("lsq"));
    check(Method::Lsq, Fold::Unfolded, 3, &lsq("lsq_plus"));
}

/// With a grid for each output channel, each filter has at most as many values as there are levels,
/// and the channels have different values. A file keeps this, and the network differs from one with
/// a grid for each tensor.
#[test]
fn channels_have_grids_of_their_own() {
    for fold in [Fold::Unfolded, Fold::BatchStatistics, Fold::FloatStatistics] {
        let [tensor, channel] = [WeightGrid::Tensor, WeightGrid::Channel].map(|weight_grid| {
            let mut network = float();
            network.quantize(&Quantization { weight_grid, ..settings(Method::Uniform, fold) }).unwrap();
            network
        });
        for (a, b) in tensor.units().zip(channel.units()) {
            let [of_tensor, of_channel] = [a, b].map(|unit| {
                let quantizer = unit.weight_quantizer.as_ref().unwrap();
                assert_eq!(quantizer.folded(), fold != Fold::Unfolded);
                quantizer.apply(&unit.weight).unwrap()
            });
            let filters = |t: &Tensor| t.flatten_to(t.rank() - 2).unwrap().t().unwrap().contiguous().unwrap();
            let most = 1 << b.weight_quantizer.as_ref().unwrap().bits.get();
            for filter in filters(&of_channel).chunk(b.filters(), 0).unwrap() {
                assert!(distinct(&filter) <= most, "{}: {} levels", b.name, distinct(&filter));
            }
            let values = [&of_tensor, &of_channel].map(distinct);
            assert!(values[0] <= most && values[0] < values[1], "{}: {values:?} values", b.name);
            // The ends of each filter's range are levels.
            let (original, found) = (filters(&b.weight), filters(&of_channel));
            let size = |t: &Tensor| t.abs().unwrap().max(1).unwrap();
            let (size, found) = (size(&original), size(&found));
            let off = ((&found - &size).unwrap().abs().unwrap() / &size).unwrap().max_all().unwrap();
            assert!(off.to_scalar::<f32>().unwrap() < 0.1, "{}: {off}", b.name);
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("network.safetensors");
        channel.save(&path, &Extras::default()).unwrap();
        let (read, _) = Network::load(&path, &Device::Cpu).unwrap();
        let outputs = [&channel, &read].map(|network| bits(&network.forward(&images()).unwrap()));
        assert_eq!(outputs[0], outputs[1]);
        assert_ne!(outputs[0], bits(&tensor.forward(&images()).unwrap()));
    }
}

#[test]
fn outputs_take_no_more_values_than_there_are_levels() {
    for method in Method::learned() {
        let network = trained(method);
        let mut most = 0;
        let mut observe = |i: usize, _: Option<&Tensor>, y: &Tensor| {
            if let Some(quantizer) = network.nodes[i].quantizer().filter(|q| q.bits.get() == BITS) {
                let levels = distinct(y);
                assert!(levels <= 1 << BITS, "{}: {levels} values of {quantizer:?}", network.nodes[i].name());
                most = most.max(levels);
            }
            Ok(())
        };
        let observed = network.forward_observed(&images(), &mut observe).unwrap();
        // The running statistics have not converged, so some levels may be unused. One bit less
        // would not be enough.
        assert!(most > 1 << (BITS - 1), "{method:?}: {most} levels at most");
        assert_eq!(bits(&observed), bits(&network.forward(&images()).unwrap()), "{method:?}: observed");
    }
}

#[test]
fn a_file_gives_the_same_network_back() {
    for method in Method::learned() {
        let mut network = trained(method);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("network.safetensors");
        network.save(&path, &Extras::default()).unwrap();
        let (mut read, _) = Network::load(&path, &Device::Cpu).unwrap();
        for ((name, a), (other, b)) in network.tensors().iter().zip(read.tensors()) {
            assert_eq!((name, bits(a)), (&other, bits(b)));
        }
        // Further training continues from the learned values, also in a new stage of the same
        // method.
        for again in [false, true] {
            if again {
                network.quantize(&settings(method, Fold::Unfolded)).unwrap();
                read.quantize(&settings(method, Fold::Unfolded)).unwrap();
            }
            let [a, b] = [&mut network, &mut read].map(|n| n.forward_train(&images(), STEP).unwrap().0);
            assert_eq!(bits(&a), bits(&b), "{method:?}");
        }
        let found = read.duplicate().unwrap().forward(&images()).unwrap();
        assert_eq!(bits(&found), bits(&read.forward(&images()).unwrap()), "{method:?}: duplicate");
    }
}

/// If a step of the optimizer moves parameters out of their ranges, the next batch brings them
/// back.
#[test]
fn parameters_are_kept_in_their_ranges() {
    let mut network = trained(Method::Dsq);
    let set = |network: &Network, name: &str, values: &[f32]| {
        let parameter = network.parameters().into_iter().find(|p| p.name == name).unwrap();
        parameter.tensor.slice_set(&Tensor::new(values, &Device::Cpu).unwrap(), 0, 0).unwrap();
        parameter.tensor
    };
    let unit = network.units().nth(3).unwrap().name.clone();
    let softness = set(&network, &format!("{unit}.softness"), &[0.8]);
    let weights = set(&network, &format!("{unit}.weight_softness"), &[-0.1]);
    let bounds = set(&network, &format!("{unit}.bounds"), &[3.0, 1.0]);
    network.forward_train(&images(), STEP).unwrap();
    let values = |tensor: &Tensor| tensor.to_vec1::<f32>().unwrap();
    assert_eq!((values(&softness), values(&weights)), (vec![0.5], vec![1e-4]));
    assert_eq!(values(&bounds), [2.0, 2.0]);

    let mut network = trained(Method::Pact);
    let alpha = set(&network, &format!("{unit}.alpha"), &[-2.0]);
    network.forward_train(&images(), STEP).unwrap();
    assert_eq!(values(&alpha), [0.0]);

    let mut network = trained(Method::Lsq);
    let step = set(&network, &format!("{unit}.step"), &[-0.3]);
    let weights = set(&network, &format!("{unit}.weight_step"), &[0.0]);
    network.forward_train(&images(), STEP).unwrap();
    assert_eq!([step, weights].map(|step| values(&step)), [[f32::EPSILON], [f32::EPSILON]]);
}

/// Bounds keep their values if the bits change. Steps do not, because they belong to a number of
/// levels.
#[test]
fn steps_start_anew_at_other_bits() {
    for method in Method::learned() {
        let mut network = trained(method);
        let all = |network: &Network| -> Vec<Vec<u32>> {
            quantizers(network)
                .filter(|(_, q)| !q.kind().is_null())
                .flat_map(|(_, q)| q.slots().map(|slot| bits(slot.2)).collect::<Vec<_>>())
                .collect()
        };
        let before = all(&network);
        let three = Precision::try_from(3).unwrap();
        let settings = settings(method, Fold::Unfolded);
        network.quantize(&Quantization { activations: three, weights: three, ..settings }).unwrap();
        let kept = before.iter().zip(all(&network)).filter(|(a, b)| **a == *b).count();
        assert_eq!(kept, if method == Method::Lsq { 0 } else { before.len() }, "{method:?}");
    }
}

#[test]
fn learned_methods_refuse_folded_normalization() {
    for method in Method::learned() {
        for fold in [Fold::Frozen, Fold::BatchStatistics] {
            let message = float().quantize(&settings(method, fold)).unwrap_err().to_string();
            assert!(message.contains("unfolded") && message.contains(&format!("{method:?}")), "{message}");
        }
    }
}

#[test]
fn a_learned_quantizer_of_the_image_is_an_error() {
    let mut network = trained(Method::Pact);
    *network.nodes[0].quantizer_mut() = network.nodes[1].quantizer().cloned();
    let message = network.validate().unwrap_err().to_string();
    assert!(message.contains("input") && message.contains("uniform"), "{message}");
}

/// The pooling and the classifier are ordinary nodes, so their quantizers may learn too.
#[test]
fn the_head_takes_learned_quantizers() {
    let mut network = trained(Method::Pact);
    let [activations, weights] =
        [network.nodes[2].quantizer(), network.nodes[2].unit().unwrap().weight_quantizer.as_ref()]
            .map(|quantizer| quantizer.cloned());
    let last = network.last();
    *network.nodes[last - 1].quantizer_mut() = activations;
    network.nodes[last].unit_mut().unwrap().weight_quantizer = weights;
    network = network.duplicate().unwrap();
    network.validate().unwrap();
    let (logits, tape) = network.forward_train(&images(), STEP).unwrap();
    let gradients = network.backward(tape, &logits).unwrap();
    let alpha = network.parameters().into_iter().find(|p| p.name == "head.alpha").unwrap();
    assert_eq!(gradients.of(&alpha).unwrap().dims(), [1]);
}
