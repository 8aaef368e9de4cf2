//! Options that select a part of ImageNet and set how its pictures are prepared.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

use super::classes::ClassChoice;

/// Options that select a part of the data set and set how its pictures are prepared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// The number of rows and columns of a network's input. Default: 224.
    pub side: usize,
    /// The length of a picture's shorter side in evaluation, before the center is cut out; at least
    /// `side`. Default: 256.
    pub resize: usize,
    /// The smallest and the largest share of a picture's area for a training crop, from 0 to 1.
    /// Default: 0.08 and 1.
    pub scale: [f64; 2],
    /// The smallest and the largest width/height of a training crop. Default: 3/4 and 4/3.
    pub ratio: [f64; 2],
    /// The classes whose images are used; `None` uses all. Labels and class count do not change.
    pub classes: Option<ClassChoice>,
    /// The number of training images that are used; `None` uses all.
    pub train_limit: Option<Limit>,
    /// The number of test images that are used; `None` uses all.
    pub test_limit: Option<Limit>,
    /// The file with the classes of the validation images; `None` searches the folder for one.
    pub labels: Option<PathBuf>,
    /// The number of parquet files of each split that are used; `None` uses all.
    pub tables: Option<usize>,
    /// The folder to which parquet files are unpacked. `None` is the folder of the files, or for
    /// the hub's files `pfq/imagenet` in `XDG_CACHE_HOME` or `~/.cache`.
    pub unpacked: Option<PathBuf>,
    /// The folder of a cache of the decoded pictures, with their shorter sides shrunk to `resize`.
    ///
    /// The cache is made if it does not exist, when pictures are needed: by
    /// [`Dataset::prepare`](crate::Dataset::prepare), or else with the first batch. `None` reads and
    /// decodes the original pictures each time. With a cache, evaluation sees the same pixels, and
    /// training sees less detail.
    pub cache: Option<PathBuf>,
    /// The number of threads that read and decode; `None` is one thread per core.
    pub threads: Option<usize>,
    /// The largest percentage of a split's images that may be left out because they cannot be used.
    /// A higher percentage is an error. Default: 1.
    pub bad_percent: f64,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            side: 224,
            resize: 256,
            scale: [0.08, 1.0],
            ratio: [3.0 / 4.0, 4.0 / 3.0],
            classes: None,
            train_limit: None,
            test_limit: None,
            labels: None,
            tables: None,
            unpacked: None,
            cache: None,
            threads: None,
            bad_percent: 1.0,
        }
    }
}

impl Options {
    /// Checks that the options are valid.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], which names the first invalid option.
    pub fn validate(&self) -> Result<()> {
        let check = |ok: bool, key: &str, found: &dyn fmt::Debug, expected: &str| match ok {
            true => Ok(()),
            false => Err(Error::Invalid(format!("{key} = {found:?} is impossible: expected {expected}"))),
        };
        let ordered = |[low, high]: [f64; 2]| low > 0.0 && low <= high && high.is_finite();
        check((1..=4096).contains(&self.side), "side", &self.side, "1 to 4096")?;
        check((self.side..=8192).contains(&self.resize), "resize", &self.resize, "`side` up to 8192")?;
        check(
            ordered(self.scale) && self.scale[1] <= 1.0,
            "scale",
            &self.scale,
            "two shares above 0, the smaller first, at most 1",
        )?;
        check(ordered(self.ratio), "ratio", &self.ratio, "two ratios above 0, the smaller first")?;
        check(self.tables != Some(0), "tables", &self.tables, "at least 1")?;
        check(self.threads.is_none_or(|n| (1..=1024).contains(&n)), "threads", &self.threads, "1 to 1024")?;
        check((0.0..=100.0).contains(&self.bad_percent), "bad_percent", &self.bad_percent, "0 to 100")
    }
}

/// A limit on the number of images. As text it is `500` or `50/class`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Limit {
    /// This number in all, taken from the classes in turn, so that the classes stay balanced.
    Total(usize),
    /// The first images of every class, up to this number each.
    PerClass(usize),
}

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Limit, String> {
        let (number, make): (&str, fn(usize) -> Limit) = match text.strip_suffix("/class") {
            Some(number) => (number, Limit::PerClass),
            None => (text, Limit::Total),
        };
        match number.trim().parse() {
            Ok(n) if n > 0 => Ok(make(n)),
            _ => Err(format!("{text:?} limits nothing: expected a number above 0, alone or with /class")),
        }
    }
}

impl TryFrom<String> for Limit {
    type Error = String;

    fn try_from(text: String) -> Result<Limit, String> {
        text.parse()
    }
}

impl From<Limit> for String {
    fn from(limit: Limit) -> String {
        limit.to_string()
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Limit::Total(n) => write!(f, "{n}"),
            Limit::PerClass(n) => write!(f, "{n}/class"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_and_written() {
        let text = r#"{"classes":"100","train_limit":"50/class","test_limit":"7"}"#;
        let options: Options = serde_json::from_str(text).unwrap();
        assert_eq!(options.classes, Some(ClassChoice::First(100)));
        assert_eq!(
            (options.train_limit, options.test_limit),
            (Some(Limit::PerClass(50)), Some(Limit::Total(7)))
        );
        assert_eq!((options.side, options.resize, options.scale), (224, 256, [0.08, 1.0]));
        let again = serde_json::to_string(&options).unwrap();
        assert_eq!(serde_json::from_str::<Options>(&again).unwrap(), options);
        assert!(serde_json::from_str::<Options>(r#"{"sides":1}"#).is_err());
        for text in ["0", "0/class", "ten", "5/klass"] {
            assert!(text.parse::<Limit>().is_err(), "{text}");
        }
    }

    #[test]
    fn impossible_options_are_named() {
        let check = |change: fn(&mut Options), key: &str| {
            let mut options = Options::default();
            options.validate().unwrap();
            change(&mut options);
            let error = options.validate().unwrap_err().to_string();
            assert!(error.starts_with(key) && error.contains("expected"), "{error}");
        };
        check(|options| options.side = 0, "side = 0");
        check(|options| options.resize = 223, "resize = 223");
        check(|options| options.scale = [0.5, 0.4], "scale");
        check(|options| options.scale = [0.5, 1.1], "scale");
        check(|options| options.ratio = [0.0, 1.0], "ratio");
        check(|options| options.tables = Some(0), "tables");
        check(|options| options.threads = Some(0), "threads");
        check(|options| options.bad_percent = f64::NAN, "bad_percent");
    }
}
