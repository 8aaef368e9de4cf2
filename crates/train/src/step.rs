use crate::together::Share;
use crate::{Error, Result, Training};
use candle_core::{DType, Tensor};
use kernels::gpu::{Graph, overwrite};
use kernels::loss::{Loss, softmax_cross_entropy};
use kernels::sgd::{self, Rate, Rule, Update};
use models::{Network, Parameter, Step};
use std::collections::BTreeMap;

/// A network in training, with the momenta of its parameters.
pub struct Trainer {
    network: Network,
    /// The momenta, keyed by the names of the parameters.
    velocities: BTreeMap<String, Tensor>,
    training: Training,
    graphs: Graphs,
}

/// Whether a step is recorded as a CUDA graph, which makes each later step a single launch.
enum Graphs {
    /// Steps are not recorded.
    Off,
    /// A step will be recorded after this many more steps. The first steps load modules and
    /// initialize quantizers, which cannot be recorded.
    After(usize),
    /// A step has been recorded.
    On(Recorded),
    /// Recording failed. The error is taken out when it is reported.
    Failed(Option<Error>),
}

/// The number of steps before a step is recorded.
const STEPS_BEFORE: usize = 2;

/// The results of a step, on its device. The next step may overwrite them.
#[derive(Debug)]
pub struct Found {
    /// The mean loss in nats, `f32`, shape `[1]`.
    pub loss: Tensor,
    /// The number of correctly classified images, `f32`, shape `[1]`.
    pub correct: Tensor,
}

impl Found {
    pub(crate) fn of(loss: &Loss) -> Result<Self> {
        Ok(Self { loss: loss.loss.reshape(1)?, correct: loss.correct.reshape(1)? })
    }
}

impl Trainer {
    /// Creates the state at the start of a training, with momenta of zero.
    ///
    /// With `graphs`, steps on a GPU become launches of a CUDA graph after the first few, with the
    /// same bits. If recording fails, steps are launched operation by operation and
    /// [`Trainer::no_graphs`] returns the reason.
    pub fn new(network: Network, training: &Training, graphs: bool) -> Result<Self> {
        let zeros = |parameter: Parameter| Ok((parameter.name, parameter.tensor.zeros_like()?));
        let velocities = network.parameters().into_iter().map(zeros).collect::<Result<_>>()?;
        Ok(Self::resumed(network, velocities, training, graphs))
    }

    /// Creates the state from a network and its momenta.
    pub(crate) fn resumed(
        network: Network,
        velocities: BTreeMap<String, Tensor>,
        training: &Training,
        graphs: bool,
    ) -> Self {
        let graphs =
            if graphs && network.device().is_cuda() { Graphs::After(STEPS_BEFORE) } else { Graphs::Off };
        Self { network, velocities, training: *training, graphs }
    }

    /// Returns the network in its current state.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Returns the network, so that its values can be changed in place.
    pub(crate) fn network_mut(&mut self) -> &mut Network {
        &mut self.network
    }

    /// Returns the network after the last step.
    pub fn into_network(self) -> Network {
        self.network
    }

    /// Returns the momenta, keyed by the names of their parameters.
    pub(crate) fn velocities(&self) -> &BTreeMap<String, Tensor> {
        &self.velocities
    }

    /// Returns, once, why steps are not launches of a CUDA graph although this was requested.
    pub fn no_graphs(&mut self) -> Option<Error> {
        if let Graphs::Failed(problem) = &mut self.graphs { problem.take() } else { None }
    }

    /// Executes one step on a batch at the given learning rate: forward pass, loss, backward pass,
    /// update.
    pub fn step(&mut self, images: &Tensor, labels: &Tensor, rate: f64) -> Result<Found> {
        match self.graphs {
            // The last batch of an epoch may be smaller.
            _ if labels.elem_count() != self.training.batch => {}
            Graphs::After(0) => match self.record(images, labels) {
                Ok(recorded) => self.graphs = Graphs::On(recorded),
                Err(problem) => self.graphs = Graphs::Failed(Some(problem)),
            },
            Graphs::After(steps) => self.graphs = Graphs::After(steps - 1),
            Graphs::Off | Graphs::On(_) | Graphs::Failed(_) => {}
        }
        match &self.graphs {
            Graphs::On(recorded) if recorded.images.shape() == images.shape() => {
                recorded.step(images, labels, rate)
            }
            _ => self.launch(images, labels, Rate::Number(rate), None),
        }
    }

    /// Executes [`Trainer::step`] on this rank's share of a batch.
    pub(crate) fn shared_step(
        &mut self,
        images: &Tensor,
        labels: &Tensor,
        rate: f64,
        share: Share<'_>,
    ) -> Result<Found> {
        self.launch(images, labels, Rate::Number(rate), Some(share))
    }

    /// Executes a step, operation by operation.
    fn launch(
        &mut self,
        images: &Tensor,
        labels: &Tensor,
        lr: Rate<'_>,
        share: Option<Share<'_>>,
    ) -> Result<Found> {
        let Self { network, velocities, training, .. } = self;
        let together = share.as_ref().map(|share| share.ranks).filter(|_| training.sync_norm);
        let range_momentum = training.range_momentum;
        let (logits, tape) = network.forward_train(images, Step { range_momentum, together })?;
        let loss = softmax_cross_entropy(&logits, labels, training.label_smoothing)?;
        let gradients = match &share {
            None => network.backward(tape, &loss.grad)?,
            Some(share) => network.backward(tape, &share.of(&loss.grad, labels.elem_count())?)?,
        };
        if let Some(Share { ranks, starts: true, .. }) = share {
            network.agree_on_starts(ranks)?;
        }
        let parameters = network.parameters();
        let sums = share.map(|share| share.sums(&parameters, &gradients)).transpose()?;
        let mut updates = Vec::with_capacity(parameters.len());
        for (i, parameter) in parameters.iter().enumerate() {
            let decays = parameter.role.decays(training.decay_norm);
            let missing = || Error::Velocity { parameter: parameter.name.clone() };
            updates.push(Update {
                param: &parameter.tensor,
                grad: sums.as_ref().map_or_else(|| gradients.of(parameter), |sums| Ok(&sums[i]))?,
                velocity: velocities.get(&parameter.name).ok_or_else(missing)?,
                weight_decay: if decays { training.weight_decay } else { 0.0 },
            });
        }
        sgd::step_all(&updates, Rule { lr, momentum: training.momentum })?;
        Found::of(&loss)
    }

    /// Records a step without executing it.
    fn record(&mut self, images: &Tensor, labels: &Tensor) -> Result<Recorded> {
        let device = images.device();
        let [images, labels] = [images, labels].map(Tensor::zeros_like);
        let (images, labels) = (images?, labels?);
        let (rate, found) = (Tensor::zeros(1, DType::F32, device)?, Tensor::zeros(2, DType::F32, device)?);
        let graph = Graph::record(device, || -> Result<()> {
            let Found { loss, correct } = self.launch(&images, &labels, Rate::At(&rate), None)?;
            found.slice_set(&loss, 0, 0)?;
            Ok(found.slice_set(&correct, 0, 1)?)
        })?;
        Ok(Recorded { graph, images, labels, rate, found })
    }
}

/// A recorded step with its inputs and outputs. It also reads and writes the tensors of the network
/// and of its momenta, which training changes in place.
struct Recorded {
    graph: Graph,
    images: Tensor,
    labels: Tensor,
    rate: Tensor,
    /// The loss and the number of correctly classified images, `f32`, shape `[2]`.
    found: Tensor,
}

impl Recorded {
    fn step(&self, images: &Tensor, labels: &Tensor, rate: f64) -> Result<Found> {
        overwrite(&self.images, &images.contiguous()?)?;
        overwrite(&self.labels, &labels.contiguous()?)?;
        self.rate.const_set((rate as f32).into())?;
        self.graph.launch()?;
        Ok(Found { loss: self.found.narrow(0, 0, 1)?, correct: self.found.narrow(0, 1, 1)? })
    }
}
