use crate::device::Arithmetic;
use crate::profile::Profile;
use anyhow::{Result, bail};
use candle_core::Device;
use clap::{Args, Parser, ValueEnum};
use datasets::imagenet::{ClassChoice, Limit};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// The exit code if the time limit ended the work: EX_TEMPFAIL, "try again", of sysexits.h.
pub const TIME_LIMIT: i32 = 75;

/// Flags of every table's binary.
#[derive(Debug, Clone, Parser)]
#[command(
    version,
    about = "Runs the stages of a table of the PfQ paper, and writes the table next to the published figures"
)]
pub struct Flags {
    /// Settings: quick, reduced, full, paper or imagenet; if not given, paper on a GPU and quick on
    /// a CPU
    ///
    /// quick takes about five minutes on 2 cores; reduced is the real CIFAR-100 with narrow
    /// networks and takes hours; full has the full networks and takes a day; paper has the full
    /// networks with the paper's settings; imagenet is the same on ImageNet-1000, for table4.
    #[arg(long, value_name = "NAME", conflicts_with = "config")]
    pub profile: Option<String>,

    /// A settings file instead of a profile: copy one from experiments/profiles/ and edit it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Images: auto, hub, a folder, or, for CIFAR-100, synthetic
    ///
    /// CIFAR-100: auto ($PFQ_DATA, ./data, the Hugging Face hub, otherwise synthetic), synthetic,
    /// hub, or a folder with the official files. ImageNet, which profile imagenet uses: auto
    /// ($PFQ_IMAGENET, ./imagenet), hub, or a folder with class folders, the official archives or
    /// the hub's tables.
    #[arg(long, value_name = "WHERE", default_value = "auto")]
    pub data: String,

    /// Folder of a cache of decoded and shrunk ImageNet pictures; created if missing
    ///
    /// The pictures are shrunk to a shorter side of 256 (358 GB for all of them), and the cache is
    /// read instead of the pictures. Training crops then show less detail, so this is another data
    /// set.
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,

    /// Use only these classes of ImageNet: N (the first N), or names separated by commas
    #[arg(long, value_name = "CLASSES")]
    pub classes: Option<ClassChoice>,

    /// Use at most this many training and test images of ImageNet, e.g. 1000 or 50/class
    #[arg(long, value_name = "IMAGES")]
    pub limit: Option<Limit>,

    /// Where and how long stages run, and where they are kept.
    #[command(flatten)]
    pub running: Running,

    /// Seeds of the fine-tuning, e.g. 0,1,2; those of the profile if not given
    #[arg(long, value_name = "SEEDS", value_delimiter = ',', value_parser = seed)]
    pub seeds: Option<Vec<u64>>,

    /// Run only these rows, e.g. mobilenet_v2,a4w4,ours
    ///
    /// A term is a model, bits or a method; if the program has several tables, also a table, e.g.
    /// ablation_fold. A row is run if it matches a term of every kind that is given.
    #[arg(long, value_name = "TERMS", value_delimiter = ',')]
    pub only: Vec<String>,

    /// Print the stages, which of them are done, and an estimate of the time left; run nothing
    #[arg(long)]
    pub plan: bool,

    /// Format of the plan: text, or a script that submits the stages to Slurm
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t, requires = "plan")]
    pub format: PlanFormat,

    /// Run only the stage with this key and the stages that it needs, and write no results, as a
    /// job of a cluster does
    ///
    /// --plan shows the keys. A stage whose network is published is run too, and its network is
    /// compared with the published one.
    #[arg(long, value_name = "KEY", conflicts_with = "plan")]
    pub stage: Option<String>,

    /// Copy networks of finished rows to networks/PROFILE/ in the folder for the results, and run
    /// nothing
    ///
    /// For each bit width these are our network and that of the best baseline, together with the
    /// float and the pruned network, which are published even if no row is finished. They come from
    /// the store. Networks of other rows that are there already stay.
    #[arg(long, conflicts_with_all = ["plan", "stage"])]
    pub publish: bool,

    /// Write the tables from the rows that have been run, and run nothing
    ///
    /// The rows come from the store, the published networks and the tables that are there already.
    #[arg(long, conflicts_with_all = ["plan", "stage", "publish"])]
    pub draw: bool,

    /// Folder for the results; stages whose networks are published in networks/PROFILE/ there count
    /// as done
    #[arg(long, value_name = "DIR", default_value = "results")]
    pub out: PathBuf,
}

/// Where and how long stages run, and where they are kept.
#[derive(Debug, Clone, Args)]
pub struct Running {
    /// Device: cpu, cuda, cuda:N, or auto (a GPU if this program can use one and it answers,
    /// otherwise the CPU)
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,

    /// Arithmetic of all trainings (tf32 only on a GPU); if not given, as the profile says for each
    /// training
    #[arg(long, value_enum, value_name = "KIND")]
    pub arithmetic: Option<Arithmetic>,

    /// On a GPU, record a training step as a CUDA graph and launch each later step as a whole: the
    /// same bits with fewer launches
    #[arg(long)]
    pub cuda_graphs: bool,

    /// Stop after about this many minutes, at the end of an epoch; at least one epoch is run
    ///
    /// The run stops after the last epoch that ends in time. The same command then continues from
    /// there, on any device. The exit code is 75 if something is left to do.
    #[arg(long, value_name = "MINUTES", value_parser = minutes)]
    pub time_limit: Option<Duration>,

    /// Folder that keeps finished stages and checkpoints
    #[arg(long, value_name = "DIR", default_value = "runs")]
    pub store: PathBuf,

    /// Stop with an error if a file of the store that is read is damaged, instead of setting it
    /// aside and running its stage again
    #[arg(long)]
    pub strict: bool,
}

/// How a plan is printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum PlanFormat {
    /// A line of text for each stage.
    #[default]
    Text,
    /// A Bash script for the workload manager Slurm, with an array of jobs for each set of stages
    /// that can run at once.
    Slurm,
}

/// Parses one of the seeds.
fn seed(text: &str) -> Result<u64, String> {
    text.trim().parse().map_err(|_| "expected whole numbers with commas between them, e.g. 0,1,2".into())
}

/// Parses a number of minutes.
fn minutes(text: &str) -> Result<Duration, String> {
    let minutes = text.parse::<f64>().ok().filter(|minutes| *minutes > 0.0 && *minutes <= 1e6);
    let minutes = minutes.ok_or("expected a number of minutes above 0, e.g. 8 or 0.5")?;
    Ok(Duration::from_secs_f64(60.0 * minutes))
}

impl Flags {
    /// Returns the profile's name, for runs without a settings file.
    pub fn profile(&self, device: &Device) -> &str {
        // The full networks would take weeks on a CPU.
        self.profile.as_deref().unwrap_or(if device.is_cpu() { "quick" } else { "paper" })
    }

    /// Restricts the profile to the part of ImageNet that `--classes` and `--limit` pick, marks
    /// this in its name, and sets the cache that `--cache` names.
    pub fn narrow(&self, profile: &mut Profile) -> Result<()> {
        if self.classes.is_none() && self.limit.is_none() && self.cache.is_none() {
            return Ok(());
        }
        let Some(options) = &mut profile.data.imagenet else {
            bail!(
                "--classes, --limit and --cache are for ImageNet, but profile {} uses CIFAR-100: expected \
                 --profile imagenet, or train_images and test_images in a settings file (--config)",
                profile.name
            );
        };
        options.cache = self.cache.clone().or(options.cache.take());
        if self.classes.is_none() && self.limit.is_none() {
            return Ok(());
        }
        options.classes = self.classes.clone().or(options.classes.take());
        options.train_limit = self.limit.or(options.train_limit);
        options.test_limit = self.limit.or(options.test_limit);
        profile.name += "-part";
        Ok(())
    }
}

/// The rows that `--only` picks: a list of allowed values for every kind of term. An empty list
/// allows all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Only {
    models: Vec<String>,
    bits: Vec<(u32, u32)>,
    methods: Vec<String>,
    tables: Vec<String>,
}

/// The largest number of names that an error lists.
const FEW: usize = 12;

impl Only {
    /// Sorts the terms by kind, ignoring case and space around them. An unknown term is an error
    /// that names what is allowed.
    pub fn parse(terms: &[String], models: &[&str], methods: &[&str], tables: &[&str]) -> Result<Self> {
        let mut only = Self::default();
        for term in terms.iter().map(|term| term.trim()) {
            let among = |names: &[&str]| {
                names.iter().find(|name| name.eq_ignore_ascii_case(term)).map(|name| name.to_string())
            };
            if let Some(model) = among(models) {
                only.models.push(model);
            } else if let Some(method) = among(methods) {
                only.methods.push(method);
            } else if let Some(table) = among(tables) {
                only.tables.push(table);
            } else if let Some(bits) = parse_bits(&term.to_ascii_lowercase()) {
                only.bits.push(bits);
            } else {
                let tables = match tables.len() {
                    0 | 1 => String::new(),
                    2..=FEW => format!(", or a table ({})", tables.join(", ")),
                    _ => ", or a table that --help lists".into(),
                };
                let methods = match methods.len() {
                    0 => String::new(),
                    1..=FEW => format!(", or a method ({})", methods.join(", ")),
                    _ => ", or a method that --plan names".into(),
                };
                bail!(
                    "--only {term} is unknown: expected a model ({}), bits such as a4w4{methods}{tables}",
                    models.join(", "),
                );
            }
        }
        Ok(only)
    }

    /// Returns whether a table is picked. It is then written from all of its rows that have been
    /// run.
    pub fn picks_table(&self, table: &str) -> bool {
        self.tables.is_empty() || self.tables.iter().any(|picked| picked == table)
    }

    /// Returns whether a row is picked.
    pub fn picks(&self, table: &str, model: &str, bits: (u32, u32), method: &str) -> bool {
        let fits = |list: &[String], value: &str| list.is_empty() || list.iter().any(|x| x == value);
        fits(&self.models, model)
            && self.picks_table(table)
            && fits(&self.methods, method)
            && (self.bits.is_empty() || self.bits.contains(&bits))
    }
}

/// Parses bits: `a4w4` gives (4, 4), as does `a4/w4`, which tables show.
pub(crate) fn parse_bits(term: &str) -> Option<(u32, u32)> {
    let (a, w) = term.strip_prefix('a')?.split_once('w')?;
    let a = a.strip_suffix('/').unwrap_or(a);
    Some((u32::from_str(a).ok()?, u32::from_str(w).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(terms: &[&str], picked: &[(&str, (u32, u32), &str)], left: &[(&str, (u32, u32), &str)]) {
        let terms: Vec<String> = terms.iter().map(|t| t.to_string()).collect();
        let only = Only::parse(
            &terms,
            &["mobilenet_v1", "mobilenet_v2"],
            &["ours", "dfq_with_fine_tune"],
            &["table3", "table4"],
        )
        .unwrap();
        for row in picked {
            assert!(only.picks("table3", row.0, row.1, row.2), "{terms:?} should pick {row:?}");
        }
        for row in left {
            assert!(!only.picks("table3", row.0, row.1, row.2), "{terms:?} should leave {row:?}");
        }
    }

    #[test]
    fn time_limits_are_minutes() {
        let parse = |words: &[&str]| Flags::try_parse_from([&["table"], words].concat());
        let limit = |text: &str| parse(&["--time-limit", text]).map(|flags| flags.running.time_limit);
        assert_eq!(limit("8").unwrap(), Some(Duration::from_secs(480)));
        assert_eq!(limit("0.5").unwrap(), Some(Duration::from_secs(30)));
        assert_eq!(parse(&[]).unwrap().running.time_limit, None);
        for text in ["0", "-1", "NaN", "inf", "soon"] {
            let error = limit(text).unwrap_err().to_string();
            assert!(error.contains("minutes") || error.contains("unexpected argument"), "{error}");
        }
    }

    #[test]
    fn the_default_profile_is_that_of_the_device() {
        let flags = Flags::try_parse_from(["table"]).unwrap();
        assert_eq!(flags.profile(&Device::Cpu), "quick");
        let flags = Flags::try_parse_from(["table", "--profile", "reduced"]).unwrap();
        assert_eq!(flags.profile(&Device::Cpu), "reduced");
    }

    #[test]
    fn a_part_of_imagenet_names_its_profile() {
        let flags = Flags::try_parse_from(["table4", "--classes", "10", "--limit", "5/class"]).unwrap();
        let mut profile = Profile::named("imagenet").unwrap();
        flags.narrow(&mut profile).unwrap();
        let options = profile.data.imagenet.as_ref().unwrap();
        assert_eq!(
            (options.classes.clone(), options.train_limit),
            ("10".parse().ok(), "5/class".parse().ok())
        );
        assert_eq!(profile.name, "imagenet-part");
        let error = flags.narrow(&mut Profile::named("quick").unwrap()).unwrap_err().to_string();
        assert!(error.contains("CIFAR-100") && error.contains("--profile imagenet"), "{error}");
        assert!(Flags::try_parse_from(["table4", "--limit", "0"]).is_err());
    }

    #[test]
    fn terms_of_different_kinds_narrow_down() {
        check(&[], &[("mobilenet_v1", (4, 4), "ours")], &[]);
        check(
            &["mobilenet_v2", "a4w4", "a3w3", "ours"],
            &[("mobilenet_v2", (4, 4), "ours"), ("mobilenet_v2", (3, 3), "ours")],
            &[("mobilenet_v1", (4, 4), "ours"), ("mobilenet_v2", (4, 4), "dfq_with_fine_tune")],
        );
    }

    #[test]
    fn tables_narrow_down_too() {
        let row = ("mobilenet_v1", (4, 4), "ours");
        check(&["table3", "ours"], &[row], &[("mobilenet_v1", (4, 4), "dfq_with_fine_tune")]);
        check(&["table4", "ours"], &[], &[row]);
        check(&["table3", "table4"], &[row], &[]);
        check(&["Table3", "OURS", "A4W4"], &[row], &[("mobilenet_v1", (3, 3), "ours")]);
        check(&["table3", " ours", " A4/W4 "], &[row], &[("mobilenet_v1", (3, 3), "ours")]);
    }

    #[test]
    fn unknown_terms_name_what_is_allowed() {
        let error = Only::parse(&["resnet".into()], &["mobilenet_v2"], &["ours"], &["table3", "table4"])
            .unwrap_err()
            .to_string();
        assert!(
            ["resnet", "mobilenet_v2", "ours", "table4"].iter().all(|part| error.contains(part)),
            "{error}"
        );
        let error = Only::parse(&["resnet".into()], &["mobilenet_v2"], &["ours"; 20], &["table3"; 20]);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("that --plan names, or a table that --help lists"), "{error}");
    }
}
