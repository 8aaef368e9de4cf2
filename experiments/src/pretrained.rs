//! What Figure 3 and the premise share: both show the pre-trained networks that the tables start
//! from, which come from the same store.

use crate::flags::Flags;
use crate::output;
use crate::profile::ModelName;
use crate::results::PROFILE;
use crate::session::{Done, Session};
use anyhow::{Context as _, Result, bail};
use datasets::Batch;
use models::{MobileNet, Network};
use report::histogram::Caption;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use workflow::{Outcome, Stage};

/// The number of test images on which outputs are observed: the first ones.
pub(crate) const IMAGES: usize = 250;

const MODELS: [ModelName; 2] = [ModelName::MobilenetV1, ModelName::MobilenetV2];

/// A pre-trained network.
pub(crate) struct Subject {
    pub config: MobileNet,
    /// The outcome of its pre-training.
    pub outcome: Outcome,
    pub network: Network,
    /// The threshold τ of its pruning.
    pub threshold: f64,
}

impl Subject {
    /// Returns the caption of a picture that shows `what` of the network. `more` ends its second
    /// line.
    pub fn caption(&self, what: &str, session: &Session, more: &[&str]) -> Caption {
        let profile = format!("profile {}", session.profile.name);
        let top1 = format!("pre-trained, top-1 {:.2} %", self.outcome.evaluation.top1_percent);
        let more = [&[profile.as_str(), &top1], more].concat();
        let model = (self.config.version.name(), self.config.width);
        Caption::of_network(what, model, session.data.name(), &more, self.threshold)
    }
}

/// What is drawn of the networks.
pub(crate) struct Drawn {
    folder: PathBuf,
    /// The description, in Markdown.
    pub text: String,
    /// What the terminal shows of it.
    pub short: String,
    /// The names of the CSV files.
    sheets: Vec<String>,
    /// The names of the pictures.
    pictures: Vec<String>,
}

impl Drawn {
    /// Returns the path of a CSV file, which will be written.
    pub fn sheet(&mut self, name: impl Into<String>) -> PathBuf {
        let name = name.into();
        let path = self.folder.join(&name);
        self.sheets.push(name);
        path
    }

    /// Returns the paths of a picture of a network, which will be written as SVG and as PNG.
    pub fn picture(&mut self, what: &str, subject: &Subject) -> [PathBuf; 2] {
        let model = subject.config.version.name();
        let names = ["svg", "png"].map(|extension| format!("{what}_{model}.{extension}"));
        let paths = names.each_ref().map(|name| self.folder.join(name));
        self.pictures.extend(names);
        paths
    }
}

/// Returns the networks that `--only` picks.
pub(crate) fn models(flags: &Flags) -> Result<Vec<ModelName>> {
    let names = MODELS.map(|model| model.version().name());
    let terms: Vec<String> = flags.only.iter().map(|term| term.trim().to_lowercase()).collect();
    if let Some(term) = terms.iter().find(|term| !names.contains(&term.as_str())) {
        bail!("--only {term}: expected a network, {}", names.join(" or "));
    }
    let picks =
        |model: &ModelName| terms.is_empty() || terms.iter().any(|term| term == model.version().name());
    Ok(MODELS.into_iter().filter(picks).collect())
}

/// Returns the first test images, at most [`IMAGES`], on the data's device.
pub(crate) fn first_images(session: &Session) -> Result<Batch> {
    Ok(session.data.test_batches(IMAGES).next().context("there are no test images")??)
}

/// Pre-trains missing networks, lets `draw` write pictures and CSV files of them into the folder of
/// `name`, and adds a description, the settings and the stages.
pub(crate) fn run(
    name: &str,
    models: &[ModelName],
    session: &mut Session,
    flags: &Flags,
    draw: impl FnOnce(&[Subject], &Session, &mut Drawn) -> Result<()>,
) -> Result<Done> {
    let stage = |model: &ModelName| session.pretraining(*model, session.seeds[0]);
    let ends = models.iter().map(stage).collect::<Result<Vec<Arc<Stage>>>>()?;
    if let Some(done) = session.part(&ends, &BTreeMap::new(), name, flags)? {
        return Ok(done);
    }
    session.claim_whole(name, &ends)?;
    if session.run_all(&ends)? == Done::InTime {
        return Ok(Done::InTime);
    }
    let mut subjects = Vec::new();
    for (model, stage) in models.iter().zip(&ends) {
        let config = session.profile.network(*model, session.data.classes())?;
        let (outcome, network) = session.produce(stage)?;
        let threshold = session.profile.pfq.threshold.unwrap_or(network.epsilon);
        subjects.push(Subject { config, outcome, network, threshold });
    }
    let folder = session.folder(name);
    let mut drawn = Drawn {
        folder: folder.clone(),
        text: String::new(),
        short: String::new(),
        sheets: Vec::new(),
        pictures: Vec::new(),
    };
    draw(&subjects, session, &mut drawn)?;
    let Session { profile, data, provenance, .. } = &*session;
    let sheets: Vec<String> = drawn.sheets.iter().map(|sheet| format!("`{sheet}`")).collect();
    let text = format!(
        "{}\n- Command: `{}`\n- Commit: {}\n- Device: {}\n- Data: {}, {} ({} training, {} test images)\n- Data behind the \
         pictures: {}; settings: `{PROFILE}`; training of the networks: `stages.json`\n",
        drawn.text,
        provenance.command,
        provenance.git_commit,
        provenance.device,
        data.name(),
        data.source(),
        data.train_images(),
        data.test_images(),
        sheets.join(", ")
    );
    let description = format!("{name}.md");
    report::write_text(&text, &folder.join(&description))?;
    report::write_text(&toml::to_string(profile)?, &folder.join(PROFILE))?;
    let names = [drawn.sheets, drawn.pictures, vec![description, PROFILE.into()]].concat();
    let stages: Vec<&Outcome> = subjects.iter().map(|subject| &subject.outcome).collect();
    report::write_stages(&stages, &folder, &names)?;
    output::print(&format!("{}\nWritten to {}.", drawn.short, folder.display()));
    Ok(Done::All)
}
