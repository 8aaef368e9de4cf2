use anyhow::{Context, Result, bail};
use baselines::{Calibration, Dfq};
use clap::ValueEnum;
use datasets::imagenet::Options;
use kernels::Activation;
use models::{Fold, Input, Method, MobileNet, Quantization, Version, WeightGrid};
use pfq::PfQ;
use quant_core::Precision;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use train::Training;
use workflow::{Purpose, Recipe, Trainings};

/// All settings of a run. Every value comes from the profile's TOML file, not from a constant in
/// the code.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// The profile's name, which names the results' folder and column.
    pub name: String,
    /// The seeds of the fine-tuning.
    pub seeds: Vec<u64>,
    /// The seed of the one pre-trained network that all seeds share, so that methods are compared
    /// in pairs. If not given, every seed pre-trains its own network.
    pub pretraining_seed: Option<u64>,
    /// The data, and how much of it is used.
    pub data: DataSettings,
    /// The networks, by model.
    pub networks: BTreeMap<ModelName, NetworkSettings>,
    /// The quantization settings that the tables' bit widths leave open.
    pub quantization: QuantizationSettings,
    /// The settings of pruning.
    pub pfq: Pruning,
    /// The settings of the baseline, DFQ.
    pub dfq: Dfq,
    /// The trainings. In a file, a training may be `like = "another"` and give only the settings
    /// that differ.
    #[serde(deserialize_with = "trainings")]
    pub training: Trainings,
}

/// A model of the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ModelName {
    /// MobileNetV1.
    MobilenetV1,
    /// MobileNetV2.
    MobilenetV2,
}

/// The data, and how much of it is used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSettings {
    /// The number of training images, balanced over the classes; all if not given.
    pub train_images: Option<usize>,
    /// The number of test images, balanced over the classes; all if not given.
    pub test_images: Option<usize>,
    /// If given, this number of training images replaces the test set, which is not touched. This
    /// is for choosing settings.
    pub hold_out: Option<usize>,
    /// If given, the data is ImageNet with these options, which replace `train_images` and
    /// `test_images`. If not given, the data is CIFAR-100.
    pub imagenet: Option<Options>,
}

/// The settings of one network.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSettings {
    /// The width multiplier; the paper uses 1.
    pub width: f64,
    /// The activation, `relu6` or `relu`.
    pub activation: Activation,
    /// The weight decay of its pre-training; the one of `training.pretraining` if not given. The
    /// share of filters that get a low variance depends on it, and differs between networks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
}

/// The quantization settings that the tables' bit widths leave open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizationSettings {
    /// The bits of outputs without an activation function, MobileNetV2's bottlenecks and residual
    /// sums; those of the other activations if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linear: Option<Precision>,
    /// The bits of the first layer's weights and of the input image.
    pub first_layer: Precision,
    /// The bits of the classifier's weights and of the pooled features.
    pub last_layer: Precision,
    /// How our method treats batch normalization while weights are quantized. For DFQ,
    /// `dfq.normalization` says this.
    pub fold: Fold,
    /// The grids of uniformly quantized weights: `tensor`, one for each layer, which is the
    /// default, or `channel`, one for each output channel.
    #[serde(default)]
    pub weight_grid: WeightGrid,
    /// Whether the gradients of DSQ's bounds and softness are scaled like the gradient of LSQ's
    /// step. Off by default.
    #[serde(default)]
    pub gradient_scale: bool,
}

/// The settings of pruning.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pruning {
    /// The threshold τ; the ε of batch normalization if not given.
    pub threshold: Option<f64>,
}

/// Checks the seeds of the fine-tuning, each of which makes a row: at least one seed, and no
/// duplicates.
pub(crate) fn check_seeds(seeds: &[u64]) -> Result<()> {
    if seeds.is_empty() {
        bail!("seeds is empty: expected at least one, e.g. [0]");
    }
    let twice = seeds.iter().enumerate().find(|(place, seed)| seeds[..*place].contains(seed));
    twice.map_or(Ok(()), |(_, seed)| bail!("seeds has {seed} twice: expected each seed once"))
}

fn check(ok: bool, key: &str, found: impl std::fmt::Display, expected: &str) -> Result<()> {
    if ok { Ok(()) } else { bail!("{key} = {found}: expected {expected}") }
}

/// Checks that a training on pictures does not pad them.
pub(crate) fn check_padding(purpose: Purpose, training: &Training) -> Result<()> {
    let pad = training.augmentation.pad;
    let key = format!("training.{purpose}.augmentation.pad");
    check(pad == 0, &key, pad, "0 for ImageNet, whose crops are set by data.imagenet.scale and ratio")
}

fn positive(number: f64) -> bool {
    number > 0.0 && number.is_finite()
}

/// Reads trainings, each of which may be `like = "another"` and give only the settings that differ.
fn trainings<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Trainings, D::Error> {
    let given = BTreeMap::deserialize(deserializer)?;
    let whole = given.keys().map(|purpose| Ok((*purpose, training(*purpose, &given)?)));
    whole.collect::<Result<_>>().map(Trainings).map_err(|error| D::Error::custom(format!("{error:#}")))
}

/// Returns a complete training: its own settings, and the rest from the training that it is like.
fn training(purpose: Purpose, given: &BTreeMap<Purpose, toml::Table>) -> Result<Training> {
    let mut whole = toml::Table::new();
    let mut seen = Vec::new();
    let mut next = Some(purpose);
    while let Some(name) = next {
        if seen.contains(&name) {
            bail!(
                "training.{purpose} is like itself: expected a training in its chain that gives all of its \
                 settings"
            );
        }
        seen.push(name);
        let Some(mut settings) = given.get(&name).cloned() else {
            bail!("training.{purpose} is like {name}, but there is no [training.{name}]");
        };
        let like = settings.remove("like").map(toml::Value::try_into);
        next = like.transpose().with_context(|| format!("training.{name}.like"))?;
        for (key, value) in settings {
            whole.entry(key).or_insert(value);
        }
    }
    whole.try_into().with_context(|| format!("training.{purpose}"))
}

/// The height and width of the images for the ImageNet networks.
const IMAGENET_SIDE: usize = 224;

const QUICK: &str = include_str!("../profiles/quick.toml");
const REDUCED: &str = include_str!("../profiles/reduced.toml");
const FULL: &str = include_str!("../profiles/full.toml");
const PAPER: &str = include_str!("../profiles/paper.toml");
const IMAGENET: &str = include_str!("../profiles/imagenet.toml");

impl Profile {
    /// Returns the built-in profile of that name.
    pub fn named(name: &str) -> Result<Self> {
        let text = match name {
            "quick" => QUICK,
            "reduced" => REDUCED,
            "full" => FULL,
            "paper" => PAPER,
            "imagenet" => IMAGENET,
            _ => bail!(
                "--profile {name} is unknown: expected quick, reduced, full, paper or imagenet (or --config FILE)"
            ),
        };
        Self::parse(text).with_context(|| format!("profile {name}"))
    }

    /// Reads the settings from a file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("settings file {} could not be read", path.display()))?;
        Self::parse(&text).with_context(|| format!("settings file {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let profile: Self = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count()) + 1;
            anyhow::anyhow!("line {line}: {}", error.message().trim_end())
        })?;
        profile.validate()?;
        Ok(profile)
    }

    fn validate(&self) -> Result<()> {
        check_seeds(&self.seeds)?;
        let name_ok = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if self.name.is_empty() || !self.name.chars().all(name_ok) {
            bail!("name = {:?}: expected letters, digits, - and _, because it names a folder", self.name);
        }
        for (model, network) in &self.networks {
            let NetworkSettings { width, weight_decay, activation } = *network;
            let key = |of: &str| format!("networks.{}.{of}", model.version().name());
            check(width > 0.0 && width <= 4.0, &key("width"), width, "more than 0, at most 4")?;
            let decay = weight_decay.unwrap_or_default();
            check((0.0..1.0).contains(&decay), &key("weight_decay"), decay, "0 up to, not including, 1")?;
            if activation == Activation::Identity {
                bail!("{} = \"identity\": expected relu6 or relu", key("activation"));
            }
        }
        let DataSettings { train_images, test_images, hold_out, imagenet } = &self.data;
        for (key, images) in
            [("train_images", train_images), ("test_images", test_images), ("hold_out", hold_out)]
        {
            check(
                images.is_none_or(|images| images > 0),
                &format!("data.{key}"),
                images.unwrap_or(0),
                "at least 1",
            )?;
        }
        if let Some(threshold) = self.pfq.threshold {
            check(positive(threshold), "pfq.threshold", threshold, "a number above 0, e.g. 1e-5")?;
        }
        let Dfq {
            range_sigmas,
            absorb_sigmas,
            tolerance,
            max_sweeps,
            equalize: _,
            absorb: _,
            correct_bias: _,
            cap: _,
            normalization: _,
            calibration,
        } = self.dfq;
        check(positive(range_sigmas), "dfq.range_sigmas", range_sigmas, "a number above 0")?;
        let absorbs = absorb_sigmas >= 0.0 && absorb_sigmas.is_finite();
        check(absorbs, "dfq.absorb_sigmas", absorb_sigmas, "a number, at least 0")?;
        check(
            positive(tolerance) && tolerance < 1.0,
            "dfq.tolerance",
            tolerance,
            "more than 0, less than 1",
        )?;
        check((1..=100_000).contains(&max_sweeps), "dfq.max_sweeps", max_sweeps, "1 to 100000")?;
        if let Some(Calibration { batches, batch, momentum }) = calibration {
            check(batches > 0, "dfq.calibration.batches", batches, "at least 1")?;
            check((1..=65_536).contains(&batch), "dfq.calibration.batch", batch, "1 to 65536")?;
            let moves = momentum > 0.0 && momentum <= 1.0;
            check(moves, "dfq.calibration.momentum", momentum, "more than 0, at most 1")?;
        }
        if let Some(options) = imagenet {
            options.validate().context("data.imagenet")?;
            if self.data.train_images.or(self.data.test_images).is_some() {
                bail!(
                    "data.train_images and data.test_images are for CIFAR-100: expected \
                     data.imagenet.train_limit and test_limit"
                );
            }
            if options.side != IMAGENET_SIDE {
                bail!(
                    "data.imagenet.side = {}: expected {IMAGENET_SIDE}, the input side of the networks",
                    options.side
                );
            }
        }
        for (purpose, training) in &self.training.0 {
            training.validate().with_context(|| format!("training.{purpose}"))?;
            if imagenet.is_some() {
                check_padding(*purpose, training)?;
            }
        }
        Ok(())
    }

    /// Returns the network to pre-train for a model; an error if the profile has none.
    pub fn network(&self, model: ModelName, classes: usize) -> Result<MobileNet> {
        let Some(settings) = self.networks.get(&model) else {
            bail!("the settings have no [networks.{}]", model.version().name());
        };
        let NetworkSettings { width, activation, weight_decay: _ } = *settings;
        let input = if self.data.imagenet.is_some() { Input::Imagenet } else { Input::Cifar };
        Ok(MobileNet { width, activation, ..MobileNet::new(model.version(), input, classes) })
    }

    /// Returns the settings of a model's pre-training.
    pub fn pretraining(&self, model: ModelName) -> Result<Training> {
        let training = self.training.get(Purpose::Pretraining)?;
        let own = self.networks.get(&model).and_then(|network| network.weight_decay);
        Ok(Training { weight_decay: own.unwrap_or(training.weight_decay), ..training })
    }

    /// Returns the settings for the workflows of one table cell.
    pub fn recipe(&self, activations: Precision, weights: Precision, seed: u64) -> Recipe {
        let QuantizationSettings { linear, first_layer, last_layer, fold, weight_grid, gradient_scale } =
            self.quantization;
        // Recipes that need another method set it.
        let method = Method::Uniform;
        Recipe {
            quantization: Quantization {
                activations,
                linear,
                weights,
                first_layer,
                last_layer,
                fold,
                method,
                weight_grid,
                gradient_scale,
            },
            pfq: PfQ { threshold: self.pfq.threshold, ..PfQ::default() },
            dfq: self.dfq,
            trainings: self.training.clone(),
            seed,
        }
    }
}

impl ModelName {
    /// Returns the network's version.
    pub fn version(self) -> Version {
        match self {
            Self::MobilenetV1 => Version::V1,
            Self::MobilenetV2 => Version::V2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_profiles_are_valid_and_named_as_asked() {
        for name in ["quick", "reduced", "full", "paper", "imagenet"] {
            assert_eq!(Profile::named(name).unwrap().name, name);
        }
    }

    /// The profiles in `profiles/` that are not built in are valid too.
    #[test]
    fn other_profiles_are_valid() {
        assert_eq!(Profile::parse(include_str!("../profiles/short.toml")).unwrap().name, "short");
        let own = Profile::parse(include_str!("../profiles/pretrainings.toml")).unwrap();
        let reduced = Profile::named("reduced").unwrap();
        assert!(own.pretraining_seed.is_none() && own.seeds.len() > 1 && own.name != reduced.name);
        let shared = reduced.pretraining_seed;
        assert_eq!(Profile { name: reduced.name.clone(), pretraining_seed: shared, ..own }, reduced);
        let mut longer = Profile::parse(include_str!("../profiles/longer.toml")).unwrap();
        let full = Profile::named("full").unwrap();
        for (purpose, training) in &mut longer.training.0 {
            if *purpose != Purpose::Pretraining {
                assert_eq!(training.cosine_epochs, full.training.get(*purpose).unwrap().cosine_epochs);
                training.cosine_epochs /= 5.0;
            }
        }
        assert_eq!(longer.name, "longer");
        let (name, seeds) = (reduced.name.clone(), reduced.seeds.clone());
        assert_eq!(Profile { name, seeds, ..longer }, reduced);
    }

    /// The `profile.toml` next to a table holds the settings that the table was made with.
    #[test]
    fn a_profile_survives_being_written() {
        let reduced = Profile::named("reduced").unwrap();
        assert_eq!(Profile::parse(&toml::to_string(&reduced).unwrap()).unwrap(), reduced);
        let recipe = reduced.recipe(Precision::Float, Precision::Float, 0);
        assert!(recipe.quantization.gradient_scale && recipe.dfq.calibration.is_some());
    }

    /// Low-variance filters come from rate × decay, summed over the steps of pre-training on the
    /// 50,000 images of CIFAR-100.
    #[test]
    fn full_networks_decay_as_much_as_the_papers() {
        let sum = |name: &str| {
            let training = Profile::named(name).unwrap().training.get(Purpose::Pretraining).unwrap();
            let steps = 50_000 / training.batch;
            let rate = |step: usize| training.rate((step as f64 + 0.5) / steps as f64, &[]);
            (0..training.epochs() * steps).map(rate).sum::<f64>() * training.weight_decay
        };
        for name in ["paper", "full"] {
            assert!((sum(name) - 1.5).abs() < 0.01, "{name}: {}", sum(name));
        }
    }

    /// `full` differs from `reduced` only in width, length and decay (and in name and seeds).
    #[test]
    fn full_networks_are_trained_as_narrow_ones() {
        let mut full = Profile::named("full").unwrap();
        let mut reduced = Profile::named("reduced").unwrap();
        reduced.networks.values_mut().for_each(|network| network.weight_decay = None);
        full.name = reduced.name.clone();
        full.seeds = reduced.seeds.clone();
        full.networks.values_mut().for_each(|network| network.width = 0.25);
        for (purpose, training) in &mut full.training.0 {
            let narrow = reduced.training.get(*purpose).unwrap();
            assert_eq!(
                training.epochs(),
                if *purpose == Purpose::Pretraining { 40 } else { 5 * narrow.epochs() }
            );
            let Training { warmup_epochs, cosine_epochs, weight_decay, .. } = narrow;
            *training = Training { warmup_epochs, cosine_epochs, weight_decay, ..*training };
        }
        assert_eq!(full, reduced);
    }

    /// A training has the settings of the one that it is like, except for those that it gives
    /// itself.
    #[test]
    fn a_training_may_be_like_another() {
        let trainings = Profile::named("quick").unwrap().training;
        let get = |purpose| trainings.get(purpose).unwrap();
        let dfq = Training { learning_rate: 0.001, batch: 128, ..get(Purpose::Once) };
        assert_eq!(get(Purpose::Dfq), dfq);
        // A method that learns its quantizers needs no training of its own.
        assert_eq!(get(Purpose::Learned(Method::Pact)), get(Purpose::Once));
        // In a chain of trainings, the nearest setting counts.
        let once = Training { cosine_epochs: 2.0, ..get(Purpose::Activations) };
        assert_eq!(get(Purpose::Once), once);
        // Written out and read again, the profile is the same.
        let profile = Profile::named("quick").unwrap();
        assert_eq!(Profile::parse(&toml::to_string(&profile).unwrap()).unwrap(), profile);
    }

    /// Checks that the built-in quick profile with one piece replaced fails with a message that
    /// contains `parts`.
    #[track_caller]
    fn check(from: &str, to: &str, parts: &[&str]) {
        assert!(QUICK.contains(from), "the profile has no {from:?}");
        let error = format!("{:#}", Profile::parse(&QUICK.replacen(from, to, 1)).unwrap_err());
        for part in parts {
            assert!(error.contains(part), "{error:?} lacks {part:?}");
        }
    }

    #[test]
    fn wrong_settings_are_named_with_what_is_allowed() {
        check("[pfq]", "[pfq]\nthreshhold = 1e-5", &["threshhold", "threshold"]);
        check("fold = \"unfolded\"", "fold = \"melted\"", &["melted", "frozen", "batch_statistics"]);
        check("weight_grid = \"tensor\"", "weight_grid = \"row\"", &["row", "tensor", "channel"]);
        check("first_layer = 8", "first_layer = 9", &["9", "2 to 8"]);
        check("\nbatch = ", "\nbatch = 0 # ", &["batch", "1 to 65536"]);
        check("width = ", "width = 0 # ", &["width", "more than 0"]);
        check("like = \"once\"", "like = \"twice\"", &["training.dfq.like", "twice", "once"]);
        check("like = \"activations\"", "like = \"weights\"", &["training.weights is like itself"]);
        check("[training.once]", "[training.onces]", &["onces", "once"]);
        check("seeds = [0]", "seeds = [2, 0, 2]", &["seeds", "2 twice"]);
        check("train_images = 4000", "train_images = 0", &["data.train_images = 0", "at least 1"]);
        for threshold in ["0.0", "-1e-5", "nan", "inf"] {
            check("[pfq]", &format!("[pfq]\nthreshold = {threshold}"), &["pfq.threshold", "above 0"]);
        }
        for (key, values) in [
            ("range_sigmas", ["0.0", "nan", "inf"]),
            ("absorb_sigmas", ["-1.0", "nan", "inf"]),
            ("tolerance", ["0.0", "nan", "1.0"]),
            ("learning_rate", ["0.0", "nan", "inf"]),
            ("weight_decay", ["-1e-4", "nan", "inf"]),
            ("warmup_epochs", ["-1", "nan", "inf"]),
            ("cosine_epochs", ["0", "nan", "inf"]),
            ("momentum", ["1.0", "nan", "-0.5"]),
            ("label_smoothing", ["1.0", "nan", "-0.5"]),
            ("range_momentum", ["0.0", "nan", "1.5"]),
        ] {
            for value in values {
                check(&format!("\n{key} = "), &format!("\n{key} = {value} # "), &[key, "expected"]);
            }
        }
        for (key, values) in
            [("batches", ["0"].as_slice()), ("batch", &["0", "70000"]), ("momentum", &["0.0", "nan", "1.5"])]
        {
            for value in values {
                let given = [("batches", "100"), ("batch", "64"), ("momentum", "0.01")];
                let given = given
                    .map(|(name, usual)| format!("{name} = {}", if name == key { value } else { usual }));
                let calibration = format!("calibration = {{ {} }} #", given.join(", "));
                check("calibration = ", &calibration, &[&format!("dfq.calibration.{key}"), "expected"]);
            }
        }
        check("cap = ", "cap = \"six\" # ", &["six", "none", "per_channel"]);
        check("normalization = ", "normalization = \"folded\" # ", &["folded", "frozen", "live"]);
        for value in ["0", "1000000"] {
            check("max_sweeps = ", &format!("max_sweeps = {value} # "), &["max_sweeps", "expected"]);
        }
        // The TOML reader itself rejects values that are not whole numbers, and names the line.
        for value in ["-1", "nan", "1.5"] {
            check("max_sweeps = ", &format!("max_sweeps = {value} # "), &["line ", "expected usize"]);
        }
        for value in ["-1e-4", "nan", "1.0"] {
            let network = format!("[networks.mobilenet_v1]\nweight_decay = {value}");
            check(
                "[networks.mobilenet_v1]",
                &network,
                &["networks.mobilenet_v1.weight_decay", "0 up to, not including, 1"],
            );
        }
        check("pad = 4", "pad = 32", &["augmentation.pad", "0 to 31"]);
        check("pad = 4", "pad = 4, flop = 3", &["flop", "flip"]);
        check("\"relu6\"", "\"identity\"", &["networks.mobilenet_v1.activation", "relu6 or relu"]);
        let imagenet = QUICK.replacen("train_images = 4000", "", 1).replacen("test_images = 1000", "", 1);
        let imagenet = imagenet.replacen("[data]", "[data]\nimagenet = {}", 1);
        let error = format!("{:#}", Profile::parse(&imagenet).unwrap_err());
        assert!(error.contains("augmentation.pad = 4: expected 0 for ImageNet"), "{error}");
        check("[data]", "[data]\nimagenet = { bad_percent = nan }", &["data.imagenet", "bad_percent"]);
        check("[data]", "[data]\nimagenet = { side = 192 }", &["data.imagenet.train_limit"]);
        check("[data]", "[data]\nimagenet = { sides = 192 }", &["sides", "side"]);
    }
}
