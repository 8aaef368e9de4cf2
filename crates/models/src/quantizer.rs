//! Quantizers: how many bits a tensor of a network has, by which scheme, and what the scheme keeps.

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

/// Makes the enum of the methods from the list of their schemes.
macro_rules! methods {
    ($($(#[$attribute:meta])* $name:ident = $schemes:expr,)*) => {
        /// How the tensors between the first and the last layer are quantized.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Method { $($(#[$attribute])* $name,)* }

        impl Method {
            /// Every method.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            fn schemes(self) -> &'static Schemes {
                match self { $(Self::$name => &$schemes,)* }
            }
        }
    };
}

// A new method is a file with its schemes and a line here.
methods! {
    /// Uniform: activations by moving averages of their extremes, weights by their own.
    #[default]
    Uniform = uniform::SCHEMES,
    /// PACT: activations by a clip with a learned bound, weights by DoReFa.
    Pact = pact::SCHEMES,
    /// DSQ: soft steps with learned bounds and softness for both.
    Dsq = dsq::SCHEMES,
    /// LSQ: learned steps for both, and for activations of both signs a learned offset (LSQ+).
    Lsq = lsq::SCHEMES,
}

/// What a method quantizes by.
struct Schemes {
    /// What settings and the keys of stored stages call the method: never to be changed.
    name: &'static str,
    /// The method's name in the literature.
    title: &'static str,
    /// For activations that are never negative.
    unsigned: &'static dyn Scheme,
    /// For activations of both signs.
    signed: &'static dyn Scheme,
    /// For weights; the settings choose by [`Scheme::fold`] and [`Scheme::weight_grid`] where there are several.
    weights: &'static [&'static dyn Scheme],
}

/// How the values of a tensor become levels. Each scheme is a value of a type that implements this, in the file of its
/// method; everything that networks do with quantizers follows from it.
///
/// `own` are the tensors that the scheme keeps, in the order of [`Scheme::tensors`].
trait Scheme: Debug + Sync {
    /// What names the scheme, and what it is set to, in a network's file; nothing (`null`) stands for uniform.
    fn kind(&self) -> Value;

    /// The tensors that the scheme keeps.
    fn tensors(&self) -> &'static [Slot] {
        &[]
    }

    /// For weights: whether they are multiplied by the factor of their batch normalization before they are quantized, and
    /// by which statistics in training. [`Fold::Frozen`] is none of the scheme's business.
    fn fold(&self) -> Fold {
        Fold::Unfolded
    }

    /// For weights: how many grids they have.
    fn weight_grid(&self) -> WeightGrid {
        WeightGrid::Tensor
    }

    /// Whether the scheme's tensors stay what they are at other bits; if not, they are set anew.
    fn spans_any_bits(&self) -> bool {
        true
    }

    /// Sets the scheme's tensors, in place, from the first tensor that it quantizes. Not called where [`Scheme::grid`] has
    /// a range that is observed.
    fn start(&self, _own: &[Tensor], _x: &Tensor, _bits: Bits) -> Result<()> {
        Ok(())
    }

    /// Before a later training step: brings back, in place, what a step of the optimizer took out of its range.
    fn project(&self, _own: &[Tensor]) -> Result<()> {
        Ok(())
    }

    /// The tensors by which `x` is quantized: the scheme's own, unless they follow from `x`.
    fn by(&self, own: &[Tensor], _x: &Tensor) -> Result<Vec<Tensor>> {
        Ok(own.to_vec())
    }

    /// The quantized values of `x`.
    fn forward(&self, x: &Tensor, by: &[Tensor], bits: Bits) -> Result<Tensor>;

    /// The values that [`Scheme::forward`] gives, in numbers.
    fn lattice(&self, by: &[Tensor], bits: Bits) -> Result<Lattice>;

    /// The gradients from that of the quantized values of `x`.
    fn backward(&self, x: &Tensor, gy: &Tensor, by: &[Tensor], bits: Bits) -> Result<Slopes>;

    /// As those kernels take it that have uniform quantization built in; none for any other scheme.
    fn grid<'a>(&self, _by: &'a [Tensor], _bits: Bits) -> Option<kernels::Quantizer<'a>> {
        None
    }
}

/// The gradients of what a scheme was given.
struct Slopes {
    /// Of the tensor that is quantized.
    x: Tensor,
    /// Of the tensors that the scheme learns, which are all that it keeps, in the order of [`Scheme::tensors`].
    own: Vec<Tensor>,
}

/// A tensor that a scheme keeps.
struct Slot {
    /// Its name in files, behind that of its unit; `weight_` stands before it where weights are quantized.
    name: &'static str,
    /// Number of elements.
    len: usize,
    /// What it is if it is learned by its gradient.
    role: Option<Role>,
}

impl Method {
    /// The schemes that settings ask for.
    fn schemes_as(self, settings: &Quantization) -> &'static Schemes {
        if self == Self::Dsq && settings.gradient_scale { &dsq::SCALED } else { self.schemes() }
    }

    /// What settings and the keys of stored stages call the method.
    pub fn name(self) -> &'static str {
        self.schemes().name
    }

    /// The methods whose quantizers learn.
    pub fn learned() -> impl Iterator<Item = Self> {
        Self::ALL.iter().copied().filter(|method| *method != Self::Uniform)
    }

    /// The method's name in the literature.
    pub fn title(self) -> &'static str {
        self.schemes().title
    }
}

/// A quantizer of one tensor of a network: how many bits, by which scheme, and the tensors that the scheme keeps.
#[derive(Debug, Clone)]
pub struct Quantizer {
    /// Bit width.
    pub bits: Bits,
    scheme: &'static dyn Scheme,
    /// In the order of [`Scheme::tensors`].
    tensors: Vec<Tensor>,
    /// Whether the scheme's tensors have been set.
    ready: bool,
}

impl Quantizer {
    /// A quantizer of activations, of which some are negative if they are `signed`. It is `old` with other bits where
    /// the scheme is the same and allows it, else a new one, to be set by the first training batch.
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

    /// A quantizer of `weight`, likewise; a new one is set by the weights as they are. With
    /// [`Fold::BatchStatistics`] the grid is that of the filters times `γ/√(V+ε)` of the
    /// running variance, so that what is deployed, the folded weights, lies on one grid while batch normalization stays
    /// live; with [`Fold::FloatStatistics`] training takes the batch's variance. Only uniform weights have that, and the choice of grids.
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

    /// What names the scheme, and what it is set to, in a network's file; nothing (`null`) stands for uniform.
    pub fn kind(&self) -> Value {
        self.scheme.kind()
    }

    /// For weights: whether the grid is that of the folded filters. Without effect where batch normalization has been
    /// folded already.
    pub fn folded(&self) -> bool {
        self.fold() != Fold::Unfolded
    }

    /// How, and by which statistics in training.
    pub(crate) fn fold(&self) -> Fold {
        self.scheme.fold()
    }

    /// The range `[2]`, the lowest and the highest value, of a uniform quantizer of activations; none while no
    /// training batch has set it.
    pub fn range(&self) -> Option<&Tensor> {
        self.grid().map(|grid| grid.range)
    }

    /// Sets the range of a uniform quantizer of activations; one that learns its bounds is left as it is.
    pub fn set_range(&mut self, lo: f32, hi: f32) -> Result<()> {
        if self.scheme.grid(&self.tensors, self.bits).is_some() {
            self.tensors[0] = Tensor::new(&[lo, hi], self.tensors[0].device())?;
            self.ready = true;
        }
        Ok(())
    }

    /// The quantized values of `x`; `x` itself while no training batch has set the scheme's tensors.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        if self.ready { Ok(self.forward(x)?.0) } else { Ok(x.clone()) }
    }

    /// The values that [`Quantizer::apply`] gives for `x`, in numbers; none while no training batch has set them. Those
    /// of activations are the same for every `x`.
    pub fn lattice(&self, x: &Tensor) -> Result<Option<Lattice>> {
        if !self.ready {
            return Ok(None);
        }
        self.scheme.lattice(&self.scheme.by(&self.tensors, x)?, self.bits).map(Some)
    }

    /// [`Quantizer::lattice`] of a quantizer of activations, which needs no tensor.
    pub fn output_lattice(&self) -> Result<Option<Lattice>> {
        let device = self.tensors.first().map_or(&Device::Cpu, Tensor::device);
        self.lattice(&Tensor::zeros(1, DType::F32, device)?)
    }

    /// Whether anything of the quantizer has a gradient.
    pub(crate) fn learns(&self) -> bool {
        self.scheme.tensors().iter().any(|slot| slot.role.is_some())
    }

    /// Names, roles and tensors of what the scheme keeps.
    pub fn slots(&self) -> impl Iterator<Item = (&'static str, Option<Role>, &Tensor)> {
        self.scheme.tensors().iter().zip(&self.tensors).map(|(slot, tensor)| (slot.name, slot.role, tensor))
    }

    /// Which of the tensors has not the shape that the scheme keeps.
    pub(crate) fn problem(&self) -> Option<String> {
        let mut slots = self.scheme.tensors().iter().zip(&self.tensors);
        let (slot, tensor) = slots.find(|(slot, tensor)| tensor.dims() != [slot.len])?;
        Some(format!("has a {} of the shape {:?}: expected [{}]", slot.name, tensor.dims(), slot.len))
    }

    /// [`Quantizer::slots`], to be filled.
    pub(crate) fn slots_mut(&mut self) -> impl Iterator<Item = (&'static str, Option<Role>, &mut Tensor)> {
        let slots = self.scheme.tensors().iter().zip(&mut self.tensors);
        slots.map(|(slot, tensor)| (slot.name, slot.role, tensor))
    }

    /// As those kernels take it that have uniform quantization built in; none while the range has not been set, and
    /// for any other scheme.
    pub(crate) fn grid(&self) -> Option<kernels::Quantizer<'_>> {
        self.scheme.grid(&self.tensors, self.bits).filter(|_| self.ready)
    }

    /// Whether the scheme's range follows from the extremes of what it quantizes, so that [`Quantizer::observe`] sets it.
    pub(crate) fn tracks_extremes(&self) -> bool {
        self.scheme.grid(&self.tensors, self.bits).is_some()
    }

    /// Before a training step in which a kernel quantizes: moves the range by `momentum` of the distance to the extremes
    /// `[2]` of the batch. The first batch sets it. Does nothing for schemes that are not built into kernels.
    pub(crate) fn observe(&mut self, extremes: impl FnOnce() -> Result<Tensor>, momentum: f64) -> Result<()> {
        if let Some(grid) = self.scheme.grid(&self.tensors, self.bits) {
            let momentum = if self.ready { momentum } else { 1.0 };
            kernels::quantize::update_range(grid.range, &extremes()?, momentum)?;
            self.ready = true;
        }
        Ok(())
    }

    /// Before a training step quantizes `x`: sets the scheme's tensors the first time, and from then on brings them back
    /// to where they may be. Ranges that follow extremes are observed instead.
    pub(crate) fn settle(&mut self, x: &Tensor) -> Result<()> {
        match self.ready {
            true => self.scheme.project(&self.tensors)?,
            false => self.scheme.start(&self.tensors, x, self.bits)?,
        }
        self.ready = true;
        Ok(())
    }

    /// The levels of `x`, and what their gradient needs, if kernels have the scheme built in.
    pub(crate) fn levels(&self, x: &Tensor) -> Result<Option<(FeatureMap, Quantized)>> {
        let Some(grid) = self.grid() else { return Ok(None) };
        let &Self { bits, scheme, .. } = self;
        let quantized = Quantized { x: x.clone(), by: self.tensors.clone(), bits, scheme };
        Ok(Some((FeatureMap::quantize(x, Some(grid))?, quantized)))
    }

    /// The quantized values of `x`, and what their gradient needs.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<(Tensor, Quantized)> {
        let &Self { bits, scheme, .. } = self;
        let by = scheme.by(&self.tensors, x)?;
        Ok((scheme.forward(x, &by, bits)?, Quantized { x: x.clone(), by, bits, scheme }))
    }
}

/// What the gradient of a tensor that was quantized needs.
pub(crate) struct Quantized {
    x: Tensor,
    by: Vec<Tensor>,
    bits: Bits,
    scheme: &'static dyn Scheme,
}

impl Quantized {
    /// The tensor as it was, and the grid that it is on, if the scheme is built into kernels.
    pub(crate) fn on_grid(&self) -> Option<(&Tensor, kernels::Quantizer<'_>)> {
        self.scheme.grid(&self.by, self.bits).map(|grid| (&self.x, grid))
    }

    /// The gradient of the tensor from that of its quantized values; files those of the scheme's learned tensors.
    pub(crate) fn backward(&self, gy: &Tensor, gradients: &mut Gradients) -> Result<Tensor> {
        let Slopes { x, own } = self.scheme.backward(&self.x, gy, &self.by, self.bits)?;
        let learned = self.scheme.tensors().iter().filter(|slot| slot.role.is_some()).count();
        assert_eq!(own.len(), learned, "{:?} has a gradient for each tensor that it learns", self.scheme);
        self.by.iter().zip(own).for_each(|(tensor, gradient)| gradients.set(tensor, gradient));
        Ok(x)
    }
}

/// What a file says of a quantizer beside its tensors: of activations `ready`, of weights `folded`.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Entry {
    bits: Bits,
    #[serde(skip_serializing_if = "Option::is_none")]
    ready: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    folded: Option<bool>,
    /// Not written where it is uniform, as in the files from before there was anything else.
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

    /// The quantizer, with `empty` in the place of each of its tensors.
    pub(crate) fn quantizer(self, empty: &Tensor) -> Result<Quantizer, String> {
        let Self { bits, ready, folded, kind } = self;
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
