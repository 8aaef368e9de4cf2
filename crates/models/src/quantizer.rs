//! Quantizers: the bit width and scheme of a network's tensor, and the tensors that the scheme
//! keeps.

mod dsq;
mod lsq;
mod pact;
mod uniform;

use crate::{Fold, Gradients, Lattice, Quantization, Result, Role, WeightGrid};
use candle_core::{DType, Device, Tensor};
use kernels::FeatureMap;
use quant_core::Bits;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fmt::Debug;

/// Defines the enum of the methods from the list of their schemes.
macro_rules! methods {
    ($($(#[$attribute:meta])* $name:ident = $schemes:expr,)*) => {
        /// The method by which the tensors between the first and the last layer are quantized.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Method { $($(#[$attribute])* $name,)* }

        impl Method {
            /// All methods.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            fn schemes(self) -> &'static Schemes {
                match self { $(Self::$name => &$schemes,)* }
            }
        }
    };
}

// To add a method, add a file with its schemes and a line here.
methods! {
    /// Uniform: moving averages of the extremes for activations, the tensor's own extremes for
    /// weights.
    #[default]
    Uniform = uniform::SCHEMES,
    /// PACT: a clip with a learned bound for activations, DoReFa for weights.
    Pact = pact::SCHEMES,
    /// DSQ: soft steps with learned bounds and softness for both.
    Dsq = dsq::SCHEMES,
    /// LSQ: learned steps for both, and a learned offset (LSQ+) for activations of both signs.
    Lsq = lsq::SCHEMES,
}

/// The schemes of a method.
struct Schemes {
    /// The method's name in settings and in the keys of stored stages. It must never change.
    name: &'static str,
    /// The method's name in the literature.
    title: &'static str,
    /// The scheme for activations that are never negative.
    unsigned: &'static dyn Scheme,
    /// The scheme for activations of both signs.
    signed: &'static dyn Scheme,
    /// The schemes for weights. If there are several, the settings choose by [`Scheme::fold`] and
    /// [`Scheme::weight_grid`].
    weights: &'static [&'static dyn Scheme],
}

/// The rule by which a tensor's values become levels.
///
/// Each scheme is a value of a type that implements this trait, in the file of its method. All that
/// networks do with quantizers follows from it. `own` are the tensors that the scheme keeps, in the
/// order of [`Scheme::tensors`].
trait Scheme: Debug + Sync {
    /// Returns the name and settings of the scheme as in a network's file. `null` means uniform.
    fn kind(&self) -> Value;

    /// Returns the tensors that the scheme keeps.
    fn tensors(&self) -> &'static [Slot] {
        &[]
    }

    /// Returns, for weights, whether they are multiplied by the factor of their batch normalization
    /// before they are quantized, and which statistics training uses for it. The scheme is not
    /// concerned with [`Fold::Frozen`].
    fn fold(&self) -> Fold {
        Fold::Unfolded
    }

    /// Returns, for weights, how many grids they have.
    fn weight_grid(&self) -> WeightGrid {
        WeightGrid::Tensor
    }

    /// Returns whether the scheme's tensors keep their values if the bit width changes. If not,
    /// they are initialized again.
    fn spans_any_bits(&self) -> bool {
        true
    }

    /// Initializes the scheme's tensors, in place, from the first tensor that it quantizes. Not
    /// called if [`Scheme::grid`] has a range that is observed.
    fn start(&self, _own: &[Tensor], _x: &Tensor, _bits: Bits) -> Result<()> {
        Ok(())
    }

    /// Projects the scheme's tensors back into their ranges, in place, before a later training
    /// step. A step of the optimizer may have moved them out.
    fn project(&self, _own: &[Tensor]) -> Result<()> {
        Ok(())
    }

    /// Returns the tensors that quantize `x`: the scheme's own, unless they follow from `x`.
    fn by(&self, own: &[Tensor], _x: &Tensor) -> Result<Vec<Tensor>> {
        Ok(own.to_vec())
    }

    /// Returns the quantized values of `x`.
    fn forward(&self, x: &Tensor, by: &[Tensor], bits: Bits) -> Result<Tensor>;

    /// Returns the lattice of the values of [`Scheme::forward`].
    fn lattice(&self, by: &[Tensor], bits: Bits) -> Result<Lattice>;

    /// Returns the gradients, given the gradient of the quantized values of `x`.
    fn backward(&self, x: &Tensor, gy: &Tensor, by: &[Tensor], bits: Bits) -> Result<Slopes>;

    /// Returns the grid for the kernels with built-in uniform quantization, or `None` for any other
    /// scheme.
    fn grid<'a>(&self, _by: &'a [Tensor], _bits: Bits) -> Option<kernels::Quantizer<'a>> {
        None
    }
}

/// The gradients of a scheme's inputs.
struct Slopes {
    /// The gradient of the tensor that is quantized.
    x: Tensor,
    /// The gradients of the tensors that the scheme learns, which are all that it keeps, in the
    /// order of [`Scheme::tensors`].
    own: Vec<Tensor>,
}

/// A tensor that a scheme keeps.
struct Slot {
    /// The name in files, after the unit's name. For weights, it has the prefix `weight_`.
    name: &'static str,
    /// The number of elements.
    len: usize,
    /// The role, if the tensor is learned by its gradient.
    role: Option<Role>,
}

impl Method {
    /// Returns the method's schemes for these settings.
    fn schemes_as(self, settings: &Quantization) -> &'static Schemes {
        if self == Self::Dsq && settings.gradient_scale { &dsq::SCALED } else { self.schemes() }
    }

    /// Returns the method's name in settings and in the keys of stored stages.
    pub fn name(self) -> &'static str {
        self.schemes().name
    }

    /// Returns the methods whose quantizers learn.
    pub fn learned() -> impl Iterator<Item = Self> {
        Self::ALL.iter().copied().filter(|method| *method != Self::Uniform)
    }

    /// Returns the method's name in the literature.
    pub fn title(self) -> &'static str {
        self.schemes().title
    }
}

/// A quantizer of a network's tensor: the bit width, the scheme, and the tensors that the scheme
/// keeps.
#[derive(Debug, Clone)]
pub struct Quantizer {
    /// The bit width.
    pub bits: Bits,
    scheme: &'static dyn Scheme,
    /// The scheme's tensors, in the order of [`Scheme::tensors`].
    tensors: Vec<Tensor>,
    /// Whether the scheme's tensors have been initialized.
    ready: bool,
}

impl Quantizer {
    /// Returns a quantizer of activations, some of which are negative if they are `signed`.
    ///
    /// It is `old` with other bits if the scheme is the same and allows it. Otherwise it is new,
    /// and the first training batch initializes it.
    pub(crate) fn of_activations(
        old: Option<Self>,
        bits: Bits,
        method: Method,
        settings: &Quantization,
        signed: bool,
        device: &Device,
    ) -> Result<Self> {
        let schemes = method.schemes_as(settings);
        Self::carried_over(old, bits, if signed { schemes.signed } else { schemes.unsigned }, device)
    }

    /// Returns a quantizer of `weight`. It is `old` with other bits if the scheme is the same and
    /// allows it. Otherwise it is new and initialized from the current weights.
    ///
    /// With [`Fold::BatchStatistics`], the grid is that of the filters times `γ/√(V+ε)` of the
    /// running variance. So the weights that are deployed, which are folded, lie on one grid, while
    /// batch normalization stays live. With [`Fold::FloatStatistics`], training uses the batch's
    /// variance. Only uniform weights support these folds and the choice of grids.
    pub(crate) fn of_weights(
        old: Option<Self>,
        bits: Bits,
        method: Method,
        settings: &Quantization,
        weight: &Tensor,
    ) -> Result<Self> {
        let scheme = match method.schemes_as(settings).weights {
            [only] => *only,
            all => {
                let fold = if settings.fold == Fold::Frozen { Fold::Unfolded } else { settings.fold };
                let wanted = (fold, settings.weight_grid);
                *all.iter()
                    .find(|scheme| (scheme.fold(), scheme.weight_grid()) == wanted)
                    .expect("all there are")
            }
        };
        let mut quantizer = Self::carried_over(old, bits, scheme, weight.device())?;
        if !quantizer.ready {
            quantizer.settle(weight)?;
        }
        Ok(quantizer)
    }

    fn carried_over(
        old: Option<Self>,
        bits: Bits,
        scheme: &'static dyn Scheme,
        device: &Device,
    ) -> Result<Self> {
        let is_same = |old: &Self| {
            let fits = old.bits == bits || scheme.spans_any_bits();
            fits && (old.kind(), old.scheme.fold()) == (scheme.kind(), scheme.fold())
        };
        if let Some(old) = old.filter(is_same) {
            return Ok(Self { bits, ..old });
        }
        let zeros = |slot: &Slot| Tensor::zeros(slot.len, DType::F32, device);
        let tensors = scheme.tensors().iter().map(zeros).collect::<Result<_, _>>()?;
        Ok(Self { bits, scheme, tensors, ready: false })
    }

    /// Returns the name and settings of the scheme as in a network's file. `null` means uniform.
    pub fn kind(&self) -> Value {
        self.scheme.kind()
    }

    /// Returns, for weights, whether the grid is that of the folded filters. It has no effect if
    /// batch normalization has been folded already.
    pub fn folded(&self) -> bool {
        self.fold() != Fold::Unfolded
    }

    /// Returns how the grid is folded, and which statistics training uses.
    pub(crate) fn fold(&self) -> Fold {
        self.scheme.fold()
    }

    /// Returns the range `[2]` of a uniform quantizer of activations, the lowest and the highest
    /// value, or `None` if no training batch has set it.
    pub fn range(&self) -> Option<&Tensor> {
        self.grid().map(|grid| grid.range)
    }

    /// Sets the range of a uniform quantizer of activations. Leaves a quantizer that learns its
    /// bounds unchanged.
    pub fn set_range(&mut self, lo: f32, hi: f32) -> Result<()> {
        if self.scheme.grid(&self.tensors, self.bits).is_some() {
            self.tensors[0] = Tensor::new(&[lo, hi], self.tensors[0].device())?;
            self.ready = true;
        }
        Ok(())
    }

    /// Returns the quantized values of `x`, or `x` itself if no training batch has initialized the
    /// scheme's tensors.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        if self.ready { Ok(self.forward(x)?.0) } else { Ok(x.clone()) }
    }

    /// Returns the lattice of [`Quantizer::apply`] for `x`, or `None` if no training batch has
    /// initialized the quantizer. For activations, it is the same for every `x`.
    pub fn lattice(&self, x: &Tensor) -> Result<Option<Lattice>> {
        if !self.ready {
            return Ok(None);
        }
        self.scheme.lattice(&self.scheme.by(&self.tensors, x)?, self.bits).map(Some)
    }

    /// Returns [`Quantizer::lattice`] of a quantizer of activations, which needs no tensor.
    pub fn output_lattice(&self) -> Result<Option<Lattice>> {
        let device = self.tensors.first().map_or(&Device::Cpu, Tensor::device);
        self.lattice(&Tensor::zeros(1, DType::F32, device)?)
    }

    /// Returns whether any tensor of the quantizer has a gradient.
    pub(crate) fn learns(&self) -> bool {
        self.scheme.tensors().iter().any(|slot| slot.role.is_some())
    }

    /// Returns the names, roles and tensors of what the scheme keeps.
    pub fn slots(&self) -> impl Iterator<Item = (&'static str, Option<Role>, &Tensor)> {
        self.scheme.tensors().iter().zip(&self.tensors).map(|(slot, tensor)| (slot.name, slot.role, tensor))
    }

    /// Describes the first tensor whose shape is not the scheme's, if there is one.
    pub(crate) fn problem(&self) -> Option<String> {
        let mut slots = self.scheme.tensors().iter().zip(&self.tensors);
        let (slot, tensor) = slots.find(|(slot, tensor)| tensor.dims() != [slot.len])?;
        Some(format!("has a {} of the shape {:?}: expected [{}]", slot.name, tensor.dims(), slot.len))
    }

    /// Returns [`Quantizer::slots`] with mutable tensors.
    pub(crate) fn slots_mut(&mut self) -> impl Iterator<Item = (&'static str, Option<Role>, &mut Tensor)> {
        let slots = self.scheme.tensors().iter().zip(&mut self.tensors);
        slots.map(|(slot, tensor)| (slot.name, slot.role, tensor))
    }

    /// Returns the grid for the kernels with built-in uniform quantization. It is `None` if the
    /// range has not been set, and for any other scheme.
    pub(crate) fn grid(&self) -> Option<kernels::Quantizer<'_>> {
        self.scheme.grid(&self.tensors, self.bits).filter(|_| self.ready)
    }

    /// Returns whether the scheme's range follows the extremes of the tensors that it quantizes, so
    /// that [`Quantizer::observe`] sets it.
    pub(crate) fn tracks_extremes(&self) -> bool {
        self.scheme.grid(&self.tensors, self.bits).is_some()
    }

    /// Moves the range by `momentum` of the distance to the extremes `[2]` of the batch, before a
    /// training step in which a kernel quantizes.
    ///
    /// The first batch sets the range. Does nothing for schemes that are not built into kernels.
    pub(crate) fn observe(&mut self, extremes: impl FnOnce() -> Result<Tensor>, momentum: f64) -> Result<()> {
        if let Some(grid) = self.scheme.grid(&self.tensors, self.bits) {
            let momentum = if self.ready { momentum } else { 1.0 };
            kernels::quantize::update_range(grid.range, &extremes()?, momentum)?;
            self.ready = true;
        }
        Ok(())
    }

    /// Prepares the scheme's tensors before a training step quantizes `x`.
    ///
    /// It initializes them the first time, and later projects them back into their ranges. Ranges
    /// that follow extremes are observed instead.
    pub(crate) fn settle(&mut self, x: &Tensor) -> Result<()> {
        match self.ready {
            true => self.scheme.project(&self.tensors)?,
            false => self.scheme.start(&self.tensors, x, self.bits)?,
        }
        self.ready = true;
        Ok(())
    }

    /// Returns the levels of `x` and the data that their gradient needs, if kernels have the scheme
    /// built in.
    pub(crate) fn levels(&self, x: &Tensor) -> Result<Option<(FeatureMap, Quantized)>> {
        let Some(grid) = self.grid() else { return Ok(None) };
        let &Self { bits, scheme, .. } = self;
        let quantized = Quantized { x: x.clone(), by: self.tensors.clone(), bits, scheme };
        Ok(Some((FeatureMap::quantize(x, Some(grid))?, quantized)))
    }

    /// Returns the quantized values of `x` and the data that their gradient needs.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<(Tensor, Quantized)> {
        let &Self { bits, scheme, .. } = self;
        let by = scheme.by(&self.tensors, x)?;
        Ok((scheme.forward(x, &by, bits)?, Quantized { x: x.clone(), by, bits, scheme }))
    }
}

/// The data that the gradient of a quantized tensor needs.
pub(crate) struct Quantized {
    x: Tensor,
    by: Vec<Tensor>,
    bits: Bits,
    scheme: &'static dyn Scheme,
}

impl Quantized {
    /// Returns the tensor before quantization and its grid, if the scheme is built into kernels.
    pub(crate) fn on_grid(&self) -> Option<(&Tensor, kernels::Quantizer<'_>)> {
        self.scheme.grid(&self.by, self.bits).map(|grid| (&self.x, grid))
    }

    /// Returns the gradient of the tensor, given that of its quantized values, and stores the
    /// gradients of the scheme's learned tensors.
    pub(crate) fn backward(&self, gy: &Tensor, gradients: &mut Gradients) -> Result<Tensor> {
        let Slopes { x, own } = self.scheme.backward(&self.x, gy, &self.by, self.bits)?;
        let learned = self.scheme.tensors().iter().filter(|slot| slot.role.is_some()).count();
        assert_eq!(own.len(), learned, "{:?} has a gradient for each tensor that it learns", self.scheme);
        self.by.iter().zip(own).for_each(|(tensor, gradient)| gradients.set(tensor, gradient));
        Ok(x)
    }
}

/// The entry of a quantizer in a file, apart from its tensors. Activations have `ready`, weights
/// have `folded`.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Entry {
    bits: Bits,
    #[serde(skip_serializing_if = "Option::is_none")]
    ready: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    folded: Option<bool>,
    /// Not written for uniform quantization, as in files from before other schemes existed.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    kind: Value,
}

impl Entry {
    pub(crate) fn of_activations(quantizer: &Quantizer) -> Self {
        let &Quantizer { bits, ready, .. } = quantizer;
        Self { bits, ready: Some(ready), folded: None, kind: quantizer.kind() }
    }

    pub(crate) fn of_weights(quantizer: &Quantizer) -> Self {
        let folded = Some(quantizer.folded());
        Self { bits: quantizer.bits, ready: None, folded, kind: quantizer.kind() }
    }

    /// Returns the quantizer of weights or of activations with `empty` in place of each of its
    /// tensors.
    pub(crate) fn quantizer(self, of_weights: bool, empty: &Tensor) -> Result<Quantizer, String> {
        let Self { bits, ready, folded, kind } = self;
        if (ready.is_some(), folded.is_some()) != (!of_weights, of_weights) {
            let [of, field] = if of_weights { ["weights", "folded"] } else { ["activations", "ready"] };
            return Err(format!(
                "a quantizer of {of} needs the field {field:?}, and not that of the other kind"
            ));
        }
        let all = Method::ALL.iter().map(|method| method.schemes()).chain([&dsq::SCALED]);
        let scheme = match folded {
            None => all.flat_map(|all| [all.unsigned, all.signed]).find(|scheme| scheme.kind() == kind),
            Some(folded) => {
                let mut weights = all.flat_map(|all| all.weights).copied();
                weights
                    .find(|scheme| (scheme.kind(), scheme.fold() != Fold::Unfolded) == (kind.clone(), folded))
            }
        };
        let scheme = scheme.ok_or_else(|| format!("there is no quantizer of kind {kind} here"))?;
        let tensors = scheme.tensors().iter().map(|_| empty.clone()).collect();
        Ok(Quantizer { bits, scheme, tensors, ready: ready.unwrap_or(true) })
    }
}
