use super::conversion::Conversion;
use super::data::{self, Wanted};
use super::text::{millions, table};
use super::values;
use crate::flags::Running;
use crate::profile::{Profile, check_padding};
use crate::progress::Display;
use crate::session::{Machine, Session};
use crate::{output, process, signals};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use models::{Extras, HEAD, Method, Network};
use std::path::PathBuf;
use std::sync::Arc;
use workflow::{Outcome, Purpose, Recipe, Stage, StageKind};

/// Quantizes a trained network by training on your own images, with Algorithm 1 or another method
#[derive(Debug, Args)]
#[command(
    after_help = "Example: pfq tune mobilenet_v2.pth a4w4.safetensors --bits a4w4 --data my/pictures\n\n\
                  Each finished stage is kept in --store, and a checkpoint after each epoch. After an \
                  interruption, the same command continues from there, with the same result."
)]
pub(super) struct Tune {
    #[command(flatten)]
    conversion: Conversion,

    /// Images: a folder with train/CLASS/* and val/CLASS/*, ImageNet or CIFAR-100
    ///
    /// The folder may have any classes. ImageNet may be in any of its forms. A network with an
    /// input of 32×32 also takes CIFAR-100: auto ($PFQ_DATA, ./data, the Hugging Face hub,
    /// otherwise synthetic), synthetic, hub, or a folder with the official files.
    #[arg(long, value_name = "WHERE")]
    data: String,

    /// Method that quantizes the network
    ///
    /// ours is Algorithm 1: prune, tune with quantized activations, prune, tune with quantized
    /// activations and weights. once prunes and tunes with both at once. dfq equalizes and tunes
    /// with both. pact, dsq and lsq learn their quantizers and tune with both.
    #[arg(long, value_enum, default_value = "ours")]
    method: Way,

    /// Epochs of each of Algorithm 1's two trainings, twice as many for other methods; if not
    /// given, as in the settings
    #[arg(long, value_name = "EPOCHS", value_parser = values::epochs)]
    epochs: Option<u16>,

    /// Settings file for trainings, pruning, quantization and DFQ; if not given, profile paper, for
    /// pictures imagenet
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Seed of the order of the images and of their augmentation
    #[arg(long, value_name = "SEED", default_value_t = 0, value_parser = values::seed)]
    seed: u64,

    /// Height and width of the images; those of the network's input if not given
    #[arg(long, value_name = "PIXELS", value_parser = values::pixels)]
    size: Option<usize>,

    /// Use only this many training images, spread over the classes
    #[arg(long, value_name = "IMAGES", value_parser = values::count)]
    train_limit: Option<usize>,

    /// Use only this many test images, spread over the classes
    #[arg(long, value_name = "IMAGES", value_parser = values::count)]
    test_limit: Option<usize>,

    /// Largest share of damaged pictures that are left out; more are an error
    #[arg(long, value_name = "PERCENT", default_value_t = 1.0, value_parser = values::percent)]
    bad_percent: f64,

    /// Where and how long stages run, and where they are kept.
    #[command(flatten)]
    running: Running,
}

/// The method that quantizes a network.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Way {
    Ours,
    Once,
    Dfq,
    Pact,
    Dsq,
    Lsq,
}

impl Way {
    fn workflow(self, recipe: &Recipe, given: &Arc<Stage>) -> workflow::Result<Arc<Stage>> {
        match self {
            Self::Ours => recipe.algorithm1(given),
            Self::Once => recipe.fine_tune_once(given),
            Self::Dfq => recipe.dfq_with_fine_tune(given),
            Self::Pact => recipe.learned(given, Method::Pact),
            Self::Dsq => recipe.learned(given, Method::Dsq),
            Self::Lsq => recipe.learned(given, Method::Lsq),
        }
    }
}

impl Tune {
    pub fn run(&self) -> Result<String> {
        signals::watch();
        let (mut network, text) = self.conversion.open()?;
        if network.units().any(|unit| {
            unit.weight_quantizer.is_some() || (unit.batch_norm().is_none() != (unit.name == HEAD))
        }) {
            bail!(
                "{} is quantized, or its batch normalization is folded: expected a float network as it was trained",
                self.conversion.network.file.display()
            );
        }
        if let Some(size) = self.size {
            network.input = [size, size, 3];
        }
        output::print(text.trim_end());

        let machine = Machine::open(&self.running)?;
        let given = self.config.as_deref().map(Profile::read).transpose()?;
        let wanted = Wanted {
            place: &self.data,
            limits: [self.train_limit, self.test_limit],
            bad_percent: self.bad_percent,
            settings: given.as_ref().map(|profile| &profile.data),
        };
        let data = data::load(wanted, &network)?;
        let mut profile = match given {
            Some(profile) => profile,
            // Pictures are cropped at random; CIFAR-100's images are padded.
            None => Profile::named(if data.in_memory().is_none() { "imagenet" } else { "paper" })?,
        };
        if data.in_memory().is_none() {
            // The network is given, so it is not pre-trained.
            let mut run = profile.training.0.iter().filter(|(purpose, _)| **purpose != Purpose::Pretraining);
            run.try_for_each(|(purpose, training)| check_padding(*purpose, training))?;
        }
        if let Some(epochs) = self.epochs {
            set_epochs(&mut profile, f64::from(epochs))?;
        }
        let [activations, weights] = self.conversion.bits;
        let recipe = profile.recipe(activations, weights, self.seed);
        let hash = u128::from_str_radix(&network.sha256()?[..32], 16)?;
        let end = self.method.workflow(&recipe, &Stage::root(StageKind::Given { hash }))?;
        // What is missing should be said before hours of work.
        let mut display = Display::new();
        data.prepare(&mut |event| display.data(&event))?;
        let mut session = Session::given(machine, profile, data, network);
        if session.run(&end)?.is_none() {
            process::end_in_time()?;
        }
        session.tell_skipped();
        let plan = session.plan(std::slice::from_ref(&end))?;
        let outcomes: Vec<Outcome> = plan.into_iter().filter_map(|planned| planned.outcome).collect();
        let mut extras = Extras::default();
        let stages: Vec<&str> = outcomes.iter().map(|outcome| outcome.key.as_str()).collect();
        extras.metadata.insert("stages".into(), stages.join(","));
        let tuned = session.produce(&end)?.1.to_device(&candle_core::Device::Cpu)?;
        let written = self.conversion.save(&tuned, &extras)?;
        Ok(report(&outcomes, &tuned) + &written)
    }
}

/// Sets the number of epochs of each of Algorithm 1's two trainings. Methods with one training get
/// twice as many.
fn set_epochs(profile: &mut Profile, epochs: f64) -> Result<()> {
    for (purpose, training) in &mut profile.training.0 {
        let both = matches!(purpose, Purpose::Once | Purpose::Dfq | Purpose::Learned(_));
        if *purpose != Purpose::Pretraining {
            training.warmup_epochs = 0.0;
            training.cosine_epochs = if both { 2.0 * epochs } else { epochs };
            training.validate().context("--epochs")?;
        }
    }
    Ok(())
}

/// Formats the outcome of each stage.
fn report(outcomes: &[Outcome], tuned: &Network) -> String {
    let removed = |outcome: &Outcome| {
        let report =
            outcome.report.clone().and_then(|report| serde_json::from_value::<pfq::Report>(report).ok());
        report.map_or_else(String::new, |report| {
            report.layers.iter().map(|layer| layer.removed).sum::<usize>().to_string()
        })
    };
    let rows: Vec<Vec<String>> = outcomes
        .iter()
        .map(|outcome| {
            vec![
                outcome.step.clone(),
                format!("{:.2}", outcome.evaluation.top1_percent),
                removed(outcome),
                millions(outcome.macs),
                millions(outcome.weights),
                report::duration(outcome.seconds),
            ]
        })
        .collect();
    let mut text = table(&["stage", "top-1 %", "filters removed", "M MACs", "M weights", "time"], &rows);
    if let (Some(first), Some(last)) = (outcomes.first(), outcomes.last()) {
        text += &format!(
            "top-1 {:.2} % → {:.2} %; MACs reduced by {:.1} %, weights by {:.1} %; {}\n",
            first.evaluation.top1_percent,
            last.evaluation.top1_percent,
            report::pruned_percent(first.macs, last.macs),
            report::pruned_percent(first.weights, last.weights),
            report::counted(tuned.classes(), "class")
        );
    }
    text
}
