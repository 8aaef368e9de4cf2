use crate::structure::Structure;
use crate::{Error, Parameter, Quantizer, Result, Role};
use candle_core::{Device, Tensor};
use kernels::convolution::Kernel;
use kernels::{Activation, norm};

/// A convolutional network for images in NHWC and float32: a list of nodes, each of which reads
/// earlier nodes.
#[derive(Debug)]
pub struct Network {
    /// The kind of network, e.g. `mobilenet_v2`. It is a part of every result row.
    pub name: String,
    /// The height, width and channels of an input image.
    pub input: [usize; 3],
    /// The nodes in the order of computation: the image first, the classifier last. A node is
    /// identified by its index here.
    pub nodes: Vec<Node>,
    /// The ε of every batch normalization, which is also the default pruning threshold τ (method
    /// section 2).
    pub epsilon: f64,
}

/// One step of the forward pass.
///
/// Its output is `Q(φ(·))` of its result: the activation and then the quantizer, each if it has
/// one. Other nodes read this quantized output.
#[derive(Debug)]
pub enum Node {
    /// The input image. It is the first node and only that.
    Image(Image),
    /// A convolution with its normalization. The classifier is a unit too: pointwise, with a bias,
    /// after the pooling.
    Unit(Unit),
    /// The addition at the end of a residual.
    Sum(Sum),
    /// Global average pooling to one value for each image and channel.
    Pool(Pool),
}

/// The input image: `Q(x)`.
#[derive(Debug)]
pub struct Image {
    /// The quantizer of the image.
    pub quantizer: Option<Quantizer>,
}

/// One convolution with the operations after it: `Q(min(φ(norm(x ∗ w)), cap))`.
#[derive(Debug)]
pub struct Unit {
    /// The unique name, e.g. `blocks.3.depthwise`. The name of the classifier is [`HEAD`].
    pub name: String,
    /// The node that the unit reads.
    pub input: usize,
    /// The kind of convolution.
    pub kernel: Kernel,
    /// The weights, with the output channels last, in the layout of [`Kernel`].
    pub weight: Tensor,
    /// The quantizer of the weights.
    pub weight_quantizer: Option<Quantizer>,
    /// Batch normalization, or the bias that remains after folding it.
    pub norm: Norm,
    /// The activation φ.
    pub activation: Activation,
    /// Upper bounds `[C]` of φ's output, if there are any besides φ's own bound. They are neither
    /// negative nor infinite, and not learned. Cross-layer equalization turns ReLU6 into ReLU with
    /// caps of 6/s ([`kernels::cap`]).
    pub cap: Option<Tensor>,
    /// The quantizer of the output.
    pub output_quantizer: Option<Quantizer>,
}

/// The sum of two outputs: `Q(φ(a + b))`.
#[derive(Debug)]
pub struct Sum {
    /// The prefix of the names of its quantizer's tensors: in MobileNetV2, the name of the unit
    /// that ends the branch.
    pub name: String,
    /// The nodes that are added: the shortcut, then the branch.
    pub inputs: [usize; 2],
    /// The activation φ.
    pub activation: Activation,
    /// The quantizer of the sum.
    pub quantizer: Option<Quantizer>,
}

/// Global average pooling: `Q(mean over height and width)`.
#[derive(Debug)]
pub struct Pool {
    /// The prefix of the names of its quantizer's tensors: [`HEAD`], because the classifier reads
    /// the pooled features.
    pub name: String,
    /// The node that is pooled.
    pub input: usize,
    /// The quantizer of the pooled features.
    pub quantizer: Option<Quantizer>,
}

/// The largest height and width of an input image.
const MOST_SIDE: usize = 8192;

/// The largest number of channels of a feature map, and so of filters and classes.
pub const MOST_CHANNELS: usize = 1 << 17;

/// The largest side of a kernel.
const MOST_TAPS: usize = 31;

/// The name of the classifier, and of the pooling before it.
pub const HEAD: &str = "head";

/// The operation between the convolution and the activation.
#[derive(Debug)]
pub enum Norm {
    /// Batch normalization.
    Batch(BatchNorm),
    /// A bias `[C]`, after batch normalization has been folded into the weights.
    Bias(Tensor),
}

/// Batch normalization. Each tensor is `[C]`.
#[derive(Debug)]
pub struct BatchNorm {
    /// The scale γ, learned.
    pub gamma: Tensor,
    /// The shift β, learned.
    pub beta: Tensor,
    /// The running mean μ: a moving average with momentum 0.1.
    pub mean: Tensor,
    /// The running variance V: a moving average with momentum 0.1 of the unbiased batch variance
    /// (N/(N−1)), as in PyTorch. The threshold τ applies to this value.
    pub variance: Tensor,
}

impl Node {
    /// Returns the prefix of the names of the node's tensors.
    pub fn name(&self) -> &str {
        match self {
            Self::Image(_) => "input",
            Self::Unit(Unit { name, .. }) | Self::Sum(Sum { name, .. }) | Self::Pool(Pool { name, .. }) => {
                name
            }
        }
    }

    /// Returns the nodes that this node reads.
    pub fn inputs(&self) -> &[usize] {
        match self {
            Self::Image(_) => &[],
            Self::Unit(Unit { input, .. }) | Self::Pool(Pool { input, .. }) => std::slice::from_ref(input),
            Self::Sum(Sum { inputs, .. }) => inputs,
        }
    }

    /// Returns φ.
    pub fn activation(&self) -> Activation {
        match self {
            Self::Unit(Unit { activation, .. }) | Self::Sum(Sum { activation, .. }) => *activation,
            Self::Image(_) | Self::Pool(_) => Activation::Identity,
        }
    }

    /// Returns the quantizer of the node's output.
    pub fn quantizer(&self) -> Option<&Quantizer> {
        match self {
            Self::Unit(Unit { output_quantizer: quantizer, .. })
            | Self::Image(Image { quantizer })
            | Self::Sum(Sum { quantizer, .. })
            | Self::Pool(Pool { quantizer, .. }) => quantizer.as_ref(),
        }
    }

    /// Returns the slot of [`Node::quantizer`].
    pub fn quantizer_mut(&mut self) -> &mut Option<Quantizer> {
        match self {
            Self::Unit(Unit { output_quantizer: quantizer, .. })
            | Self::Image(Image { quantizer })
            | Self::Sum(Sum { quantizer, .. })
            | Self::Pool(Pool { quantizer, .. }) => quantizer,
        }
    }

    /// Returns the convolution, if the node is one.
    pub fn unit(&self) -> Option<&Unit> {
        if let Self::Unit(unit) = self { Some(unit) } else { None }
    }

    /// Returns the convolution for changes, if the node is one.
    pub fn unit_mut(&mut self) -> Option<&mut Unit> {
        if let Self::Unit(unit) = self { Some(unit) } else { None }
    }

    /// Returns the quantizer if the kernel that computes the output applies it.
    pub(crate) fn fused(&self) -> Option<kernels::Quantizer<'_>> {
        match self {
            Self::Unit(Unit { cap: Some(_), .. }) => None,
            Self::Unit(_) | Self::Sum(_) => self.quantizer()?.grid(),
            Self::Image(_) | Self::Pool(_) => None,
        }
    }
}

impl Unit {
    /// Returns the number of filters (output channels).
    pub fn filters(&self) -> usize {
        self.kernel.filters(&self.weight)
    }

    /// Returns the number of input channels.
    pub fn input_channels(&self) -> usize {
        self.kernel.input_channels(&self.weight)
    }

    /// Returns the batch normalization, unless it has been folded.
    pub fn batch_norm(&self) -> Option<&BatchNorm> {
        match &self.norm {
            Norm::Batch(norm) => Some(norm),
            Norm::Bias(_) => None,
        }
    }

    /// Returns why the unit can't be computed for this number of input channels, if so.
    fn problem(&self, channels: usize) -> Option<String> {
        let is_possible = match self.kernel {
            Kernel::Full { size, stride } => size % 2 == 1 && size <= MOST_TAPS && stride > 0,
            Kernel::Depthwise { stride } => (1..=2).contains(&stride),
            Kernel::Pointwise => true,
        };
        if !is_possible {
            return Some(format!(
                "is of the kind {:?}: expected an odd size up to {MOST_TAPS} and a stride of at least 1, of depthwise \
                 ones at most 2",
                self.kernel
            ));
        }
        let dims = self.weight.dims();
        let filters = dims.last().copied().unwrap_or(0);
        let expected = self.kernel.weight_dims(channels, filters);
        if dims.len() == expected.len() && self.input_channels() != channels {
            return Some(format!("reads {} channels, but {channels} come in", self.input_channels()));
        }
        if dims != expected || !(1..=MOST_CHANNELS).contains(&filters) {
            return Some(format!(
                "has weights of the shape {dims:?}: expected {expected:?}, with 1 to {MOST_CHANNELS} filters"
            ));
        }
        let mut of_filters = match &self.norm {
            Norm::Batch(BatchNorm { gamma, beta, mean, variance }) => {
                vec![("gamma", gamma), ("beta", beta), ("mean", mean), ("variance", variance)]
            }
            Norm::Bias(bias) => vec![("bias", bias)],
        };
        of_filters.extend(self.cap.as_ref().map(|cap| ("cap", cap)));
        let misfit = of_filters.into_iter().find(|(_, tensor)| tensor.dims() != [filters]);
        let misfit = misfit.map(|(name, tensor)| {
            format!("has a {name} of the shape {:?}: expected [{filters}]", tensor.dims())
        });
        misfit.or_else(|| self.weight_quantizer.as_ref()?.problem())
    }
}

impl BatchNorm {
    /// Returns a new normalization: γ = 1, β = 0, μ = 0, V = 1.
    pub fn init(channels: usize, device: &Device) -> Result<Self> {
        let ones = || Tensor::ones(channels, candle_core::DType::F32, device);
        let zeros = || Tensor::zeros(channels, candle_core::DType::F32, device);
        Ok(Self { gamma: ones()?, beta: zeros()?, mean: zeros()?, variance: ones()? })
    }

    /// Returns the affine map of the running statistics, `(γ/√(V+ε), β − μγ/√(V+ε))`, each `[C]`.
    pub fn affine(&self, epsilon: f64) -> Result<(Tensor, Tensor)> {
        let inv_std = norm::inv_std(&self.variance, epsilon)?;
        Ok(norm::affine(&self.gamma, &self.beta, &self.mean, &inv_std)?)
    }

    /// Returns `γ/√(V+ε)` of the running variance.
    pub fn scale(&self, epsilon: f64) -> Result<Tensor> {
        Ok((&self.gamma * norm::inv_std(&self.variance, epsilon)?)?)
    }
}

/// Defines the method that lists every tensor of a network with its name and, if it is learned, its
/// role.
///
/// Files, gradients and copies use this list and its order. It is a macro because it is needed for
/// shared and for `mut` references.
macro_rules! slots {
    ($method:ident, $iter:ident $(, $mutable:tt)?) => {
        pub(crate) fn $method(&$($mutable)? self) -> Vec<(String, Option<Role>, &$($mutable)? Tensor)> {
            let mut all = Vec::new();
            for node in &$($mutable)? self.nodes {
                let mut push = |name: &str, field: &str, role, tensor| {
                    all.push((format!("{name}.{field}"), role, tensor));
                };
                let (name, quantizer) = match node {
                    Node::Image(Image { quantizer }) => ("input", quantizer),
                    Node::Unit(Unit { name, weight, weight_quantizer, norm, cap, output_quantizer, .. }) => {
                        push(name, "weight", Some(Role::Weight), weight);
                        for (field, role, tensor) in weight_quantizer.$iter().flat_map(Quantizer::$method) {
                            push(name, &format!("weight_{field}"), role, tensor);
                        }
                        match norm {
                            Norm::Batch(BatchNorm { gamma, beta, mean, variance }) => {
                                push(name, "gamma", Some(Role::NormOrBias), gamma);
                                push(name, "beta", Some(Role::NormOrBias), beta);
                                push(name, "mean", None, mean);
                                push(name, "variance", None, variance);
                            }
                            Norm::Bias(bias) => push(name, "bias", Some(Role::NormOrBias), bias),
                        }
                        if let Some(cap) = cap {
                            push(name, "cap", None, cap);
                        }
                        (name.as_str(), output_quantizer)
                    }
                    Node::Sum(Sum { name, quantizer, .. }) | Node::Pool(Pool { name, quantizer, .. }) => {
                        (name.as_str(), quantizer)
                    }
                };
                for (field, role, tensor) in quantizer.$iter().flat_map(Quantizer::$method) {
                    push(name, field, role, tensor);
                }
            }
            all
        }
    };
}

impl Network {
    /// Returns a network of only its image `[height, width, channels]`, to be built node by node,
    /// with PyTorch's ε.
    pub fn of_image(name: impl Into<String>, input: [usize; 3]) -> Self {
        let image = Node::Image(Image { quantizer: None });
        Self { name: name.into(), input, nodes: vec![image], epsilon: 1e-5 }
    }

    /// Returns the index of the last node.
    pub fn last(&self) -> usize {
        self.nodes.len() - 1
    }

    /// Adds a convolution that reads the last node, without quantizers.
    pub fn push_unit(
        &mut self,
        name: impl Into<String>,
        kernel: Kernel,
        weight: Tensor,
        norm: Norm,
        activation: Activation,
    ) {
        self.nodes.push(Node::Unit(Unit {
            name: name.into(),
            input: self.last(),
            kernel,
            weight,
            weight_quantizer: None,
            norm,
            activation,
            cap: None,
            output_quantizer: None,
        }));
    }

    /// Adds the sum of node `from` and the last node, named after the last node, which ends a
    /// residual.
    pub fn push_sum(&mut self, from: usize) {
        let (name, inputs) = (self.nodes[self.last()].name().into(), [from, self.last()]);
        self.nodes.push(Node::Sum(Sum { name, inputs, activation: Activation::Identity, quantizer: None }));
    }

    /// Adds global average pooling of the last node, and a classifier with `weight` `[C, classes]`
    /// and `bias` `[classes]`.
    pub fn push_head(&mut self, weight: Tensor, bias: Tensor) {
        self.nodes.push(Node::Pool(Pool { name: HEAD.into(), input: self.last(), quantizer: None }));
        self.push_unit(HEAD, Kernel::Pointwise, weight, Norm::Bias(bias), Activation::Identity);
    }

    /// Returns the convolutions in order, the classifier last.
    pub fn units(&self) -> impl DoubleEndedIterator<Item = &Unit> {
        self.nodes.iter().filter_map(Node::unit)
    }

    /// Returns the convolutions of [`Network::units`] for changes.
    pub fn units_mut(&mut self) -> impl DoubleEndedIterator<Item = &mut Unit> {
        self.nodes.iter_mut().filter_map(Node::unit_mut)
    }

    /// Returns the percentage of the filters with batch normalization whose running variance is
    /// below `threshold`, or `None` if there are no such filters.
    pub fn low_variance_percent(&self, threshold: f64) -> Result<Option<f64>> {
        let (mut low, mut all) = (0, 0);
        for norm in self.units().filter_map(Unit::batch_norm) {
            let variance = norm.variance.to_vec1::<f32>()?;
            low += variance.iter().filter(|variance| f64::from(**variance) < threshold).count();
            all += variance.len();
        }
        Ok((all > 0).then(|| 100.0 * low as f64 / all as f64))
    }

    /// Returns the convolution that computes the logits.
    pub fn classifier(&self) -> &Unit {
        self.units().next_back().expect("a network has a classifier")
    }

    /// Returns the device that holds the network.
    pub fn device(&self) -> &Device {
        self.classifier().weight.device()
    }

    /// Returns the number of classes.
    pub fn classes(&self) -> usize {
        self.classifier().filters()
    }

    /// Returns the readers of every node: `readers()[i]` are the nodes that read node `i`,
    /// ascending.
    pub fn readers(&self) -> Vec<Vec<usize>> {
        let mut readers = vec![Vec::new(); self.nodes.len()];
        for (i, node) in self.nodes.iter().enumerate() {
            for &input in node.inputs() {
                readers[input].push(i);
            }
        }
        readers
    }

    /// Returns the height, width and channels of each node's output.
    pub fn shapes(&self) -> Vec<[usize; 3]> {
        let mut shapes = Vec::with_capacity(self.nodes.len());
        for node in &self.nodes {
            shapes.push(self.shape(node, &shapes));
        }
        shapes
    }

    /// Returns the shape of a node's output, given the shapes of the nodes before it.
    fn shape(&self, node: &Node, before: &[[usize; 3]]) -> [usize; 3] {
        match node {
            Node::Image(_) => self.input,
            Node::Unit(unit) => {
                let [h, w] = [0, 1].map(|side| unit.kernel.output_size(before[unit.input][side]));
                [h, w, unit.filters()]
            }
            Node::Sum(sum) => before[sum.inputs[0]],
            Node::Pool(pool) => [1, 1, before[pool.input][2]],
        }
    }

    /// Returns an error about a place in this network.
    pub(crate) fn structure_error(&self, place: impl Into<String>, problem: impl Into<String>) -> Error {
        Error::Structure { network: self.name.clone(), place: place.into(), problem: problem.into() }
    }

    /// Checks the properties that the passes rely on, so that the passes can run whatever a file
    /// says:
    ///
    /// * The sizes, strides and ε are usable.
    /// * The image is the first node, and all nodes follow from it. The last node is a classifier,
    ///   and all nodes lead to it.
    /// * The shapes of the tensors match their inputs.
    /// * A map is pooled once. What reads it is pointwise, or a sum of pooled maps.
    /// * A full convolution reads only the image, and the image's quantizer learns nothing, because
    ///   no such gradients are computed.
    /// * Each tensor has a unique name.
    ///
    /// The numbers in the tensors are not read.
    ///
    /// # Errors
    /// An error that names the place, what was found and what was expected.
    pub fn validate(&self) -> Result<()> {
        let fail = |place: &str, problem: String| Err(self.structure_error(place, problem));
        let [height, width, channels] = self.input;
        if [height, width].iter().any(|side| !(1..=MOST_SIDE).contains(side))
            || !(1..=MOST_CHANNELS).contains(&channels)
        {
            let problem = format!(
                "has the shape {:?}: expected sides from 1 to {MOST_SIDE} and 1 to {MOST_CHANNELS} channels",
                self.input
            );
            return fail("input", problem);
        }
        let least = f64::from(f32::MIN_POSITIVE);
        if !(least..=1.0).contains(&self.epsilon) {
            return fail("epsilon", format!("is {}: expected a number from {least:e} to 1", self.epsilon));
        }
        for (i, node) in self.nodes.iter().enumerate() {
            if matches!(node, Node::Image(_)) != (i == 0) {
                return fail(node.name(), "the first node must be the image, and no other".into());
            }
            if let Some(input) = node.inputs().iter().find(|&&input| input >= i) {
                return fail(node.name(), format!("is node {i} and reads node {input}, which comes later"));
            }
        }
        let readers = self.readers();
        let mut shapes = Vec::with_capacity(self.nodes.len());
        // Whether each node's output has no positions left.
        let mut pooled: Vec<bool> = Vec::with_capacity(self.nodes.len());
        for (i, node) in self.nodes.iter().enumerate() {
            if readers[i].is_empty() != (i == self.last()) {
                return fail(
                    node.name(),
                    "the last node, and no other, must be one that nothing reads".into(),
                );
            }
            match node {
                Node::Image(Image { quantizer }) if quantizer.as_ref().is_some_and(Quantizer::learns) => {
                    let problem =
                        "has a learned quantizer, but nothing computes its gradient; take a uniform one";
                    return fail(node.name(), problem.into());
                }
                Node::Image(_) => (),
                Node::Pool(pool) if pooled[pool.input] => {
                    return fail(node.name(), "pools a map that was pooled before".into());
                }
                Node::Pool(_) => (),
                Node::Unit(unit) => {
                    let input: [usize; 3] = shapes[unit.input];
                    unit.problem(input[2]).map_or(Ok(()), |problem| fail(&unit.name, problem))?;
                    if pooled[unit.input] && unit.kernel != Kernel::Pointwise {
                        return fail(&unit.name, "only a pointwise convolution may read a pooled map".into());
                    }
                    if matches!(unit.kernel, Kernel::Full { .. }) && unit.input != 0 {
                        return fail(&unit.name, "only a convolution of the image may be a full one".into());
                    }
                }
                Node::Sum(sum) => {
                    let [a, b] = sum.inputs.map(|input| shapes[input]);
                    if a != b {
                        return fail(&sum.name, format!("adds maps of other sizes: {a:?} and {b:?}"));
                    }
                    if pooled[sum.inputs[0]] != pooled[sum.inputs[1]] {
                        return fail(&sum.name, "adds a pooled map to one that was not pooled".into());
                    }
                }
            }
            if let Some(problem) = node.quantizer().and_then(Quantizer::problem) {
                return fail(node.name(), problem);
            }
            shapes.push(self.shape(node, &shapes));
            pooled.push(matches!(node, Node::Pool(_)) || node.inputs().iter().any(|&input| pooled[input]));
        }
        if self.nodes[self.last()].unit().is_none() || !pooled[self.last()] {
            let problem = "must be a convolution that classifies, behind global average pooling";
            return fail(self.nodes[self.last()].name(), problem.into());
        }
        let mut names: Vec<String> = self.slots().into_iter().map(|(name, ..)| name).collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => fail(&pair[0], "is the name of two tensors".into()),
            None => Ok(()),
        }
    }

    /// Returns every learned tensor, in a fixed order.
    pub fn parameters(&self) -> Vec<Parameter> {
        let parameter = |(name, role, tensor): (_, Option<Role>, &Tensor)| {
            role.map(|role| Parameter { name, tensor: tensor.clone(), role })
        };
        self.slots().into_iter().filter_map(parameter).collect()
    }

    /// Returns every tensor with its name: parameters, running statistics, caps and quantizer
    /// ranges.
    pub fn tensors(&self) -> Vec<(String, &Tensor)> {
        self.slots().into_iter().map(|(name, _, tensor)| (name, tensor)).collect()
    }

    slots!(slots, iter);
    slots!(slots_mut, iter_mut, mut);

    /// Returns the same network with `f` applied to every tensor.
    fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let skeleton = Structure::of(self).skeleton();
        let mut copy = skeleton.map_err(|problem| self.structure_error("copy", problem))?;
        for ((_, _, to), (_, _, from)) in copy.slots_mut().into_iter().zip(self.slots()) {
            *to = f(from)?;
        }
        Ok(copy)
    }

    /// Returns a copy that shares no storage with this network.
    ///
    /// An optimizer updates parameters in place, so it would also train a shallow copy.
    pub fn duplicate(&self) -> Result<Self> {
        self.map(|t| Ok(t.copy()?))
    }

    /// Returns a copy on `device`.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.map(|t| Ok(if t.device().same_device(device) { t.copy()? } else { t.to_device(device)? }))
    }
}
