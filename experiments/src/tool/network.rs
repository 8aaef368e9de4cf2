//! The network that a command works on.

use super::text::millions;
use super::values;
use crate::output;
use crate::profile::ModelName;
use anyhow::{Result, anyhow, bail};
use candle_core::Device;
use clap::{Args, ValueEnum};
use kernels::Activation;
use models::{Import, Input, Network, Origin};
use std::path::{Path, PathBuf};

/// A file with a network, and what its tensors don't tell.
#[derive(Debug, Args)]
pub(super) struct NetworkFile {
    /// The network: .safetensors, or .pth and .pt as torch.save writes them
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// Architecture of public weights; derived from the names of the tensors if not given
    #[arg(long, value_enum, help_heading = "Public weights")]
    arch: Option<ModelName>,

    /// Width multiplier of public weights; derived from the shapes of the tensors if not given
    #[arg(long, value_name = "FACTOR", value_parser = values::width, help_heading = "Public weights")]
    width: Option<f64>,

    /// Number of classes of public weights; derived from the classifier if not given
    #[arg(long, value_name = "N", value_parser = values::count, help_heading = "Public weights")]
    classes: Option<usize>,

    /// Strides of public weights, which no tensor tells: imagenet (if not given), cifar, or numbers
    ///
    /// imagenet are the usual strides for 224×224 images, cifar are this project's strides for
    /// 32×32. Numbers are, for a V2, the strides of the stem and of the seven stages, such as
    /// 1,1,1,2,2,1,2,1; for a V1, those of the stem and of the 13 blocks.
    #[arg(long, value_name = "STRIDES", value_parser = strides, help_heading = "Public weights")]
    strides: Option<Input>,

    /// Activation of public weights, which no tensor tells; relu6 if not given
    #[arg(long, value_enum, help_heading = "Public weights")]
    activation: Option<Phi>,

    /// ε of the batch normalization of public weights, which no tensor tells; 1e-5 if not given
    #[arg(long, value_name = "ε", value_parser = values::epsilon, help_heading = "Public weights")]
    epsilon: Option<f64>,
}

fn strides(text: &str) -> Result<Input, String> {
    match text {
        "imagenet" => Ok(Input::Imagenet),
        "cifar" => Ok(Input::Cifar),
        numbers => numbers.parse().map(Input::Other).map_err(|what| format!("{what}, imagenet, or cifar")),
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Phi {
    Relu6,
    Relu,
}

impl NetworkFile {
    /// Reads the network; also returns a line that describes it.
    pub fn open(&self) -> Result<(Network, String)> {
        let default = Import::default();
        let import = Import {
            version: self.arch.map(ModelName::version),
            width: self.width,
            classes: self.classes,
            input: self.strides.unwrap_or(default.input),
            activation: match self.activation {
                Some(Phi::Relu) => Activation::Relu,
                Some(Phi::Relu6) => Activation::Relu6,
                None => default.activation,
            },
            epsilon: self.epsilon.unwrap_or(default.epsilon),
        };
        let (network, origin) = Network::open(&self.file, &import, &Device::Cpu)?;
        let what = match origin {
            Origin::Own => {
                self.refuse_description()?;
                network.name.clone()
            }
            Origin::Public { naming, config } => {
                let activation = if config.activation == Activation::Relu { "relu" } else { "relu6" };
                // The tensors don't contain these.
                let told = [
                    (
                        format!("strides {}", config.input.strides(config.version)),
                        "--strides",
                        self.strides.is_some(),
                    ),
                    (activation.into(), "--activation", self.activation.is_some()),
                    (format!("ε {:e}", network.epsilon), "--epsilon", self.epsilon.is_some()),
                ];
                let told = told.map(|(what, flag, given)| match given {
                    true => what,
                    false => format!("{what} (assumed; {flag} says others)"),
                });
                format!(
                    "{}, width {}, named as in {}, {}",
                    network.name,
                    config.width,
                    naming.name(),
                    told.join(", ")
                )
            }
        };
        let [height, width, _] = network.input;
        let line = format!(
            "{}: {what}; {}, {height}×{width} images, {} M MACs, {} M weights\n",
            self.file.display(),
            report::counted(network.classes(), "class"),
            millions(network.macs()),
            millions(network.weights()),
        );
        Ok((network, line))
    }

    /// Reads the network for a command that writes files, each with the extension of its format;
    /// also returns a line that describes the network. Work should not fail at its end because of
    /// a file, so it is checked here that all of them can be written.
    pub fn open_for(&self, written: &[(&Path, &str)]) -> Result<(Network, String)> {
        let outs: Vec<&Path> = written.iter().map(|(out, _)| *out).collect();
        self.refuse_to_overwrite(&outs)?;
        written.iter().try_for_each(|(out, extension)| output::check_extension(out, extension))?;
        let opened = self.open()?;
        outs.into_iter().try_for_each(check_writable)?;
        Ok(opened)
    }

    /// Checks that no output file is the network or another output file.
    fn refuse_to_overwrite(&self, written: &[&Path]) -> Result<()> {
        let place = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.into());
        for (index, path) in written.iter().enumerate() {
            if place(path) == place(&self.file) {
                bail!("{} is the file that is read: give another name, to keep the network", path.display());
            }
            if written[..index].iter().any(|other| place(other) == place(path)) {
                bail!("{} would be written twice: give different names", path.display());
            }
        }
        Ok(())
    }

    /// Refuses flags that describe the network, because a file of our own contains all of this.
    fn refuse_description(&self) -> Result<()> {
        let given = [
            ("--arch", self.arch.is_some()),
            ("--width", self.width.is_some()),
            ("--classes", self.classes.is_some()),
            ("--strides", self.strides.is_some()),
            ("--activation", self.activation.is_some()),
            ("--epsilon", self.epsilon.is_some()),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((flag, _)) => bail!(
                "{flag} is for public weights, but {} already contains this information: leave {flag} out",
                self.file.display()
            ),
            None => Ok(()),
        }
    }
}

/// Checks that a file can be written, so that the error names it and no temporary file.
fn check_writable(out: &Path) -> Result<()> {
    if out.is_dir() {
        bail!("{} could not be written: there is a folder of this name", out.display());
    }
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(".".as_ref());
    whole_file::check(folder)
        .map_err(|error| anyhow!("{} could not be written: {}", out.display(), error.kind()))
}
