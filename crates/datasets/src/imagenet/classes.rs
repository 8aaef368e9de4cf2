//! The classes of a data set and their indices.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::text::counted;

/// The names of ImageNet-1000's classes, sorted. Line `i`, counted from 0, is class `i`.
const OFFICIAL: &str = include_str!("wnids.txt");

/// The name of the file that can give other classes or another order.
pub(super) const FILE: &str = "class_index.tsv";

/// The classes of a data set: WordNet ids such as `n01440764`, in the order of their indices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Classes {
    names: Vec<String>,
    numbers: HashMap<String, u16>,
}

impl Classes {
    /// Returns the 1000 official classes in their usual order, which is that of the sorted names.
    pub fn official() -> Classes {
        Classes::of(OFFICIAL.lines().map(String::from).collect())
    }

    /// Returns the classes with these names, which must be distinct, in this order.
    pub fn ordered(names: Vec<String>) -> Result<Classes> {
        match names.len() <= usize::from(u16::MAX) {
            true => Ok(Classes::of(names)),
            false => Err(Error::Invalid(format!("{} classes are more than {}", names.len(), u16::MAX))),
        }
    }

    fn of(names: Vec<String>) -> Classes {
        let numbers = names.iter().cloned().zip(0..).collect();
        Classes { names, numbers }
    }

    /// Reads lines of an index, a class's name and optional further columns, separated by tabs.
    ///
    /// The first line may be a heading. The indices must be 0 to n-1, in any order.
    pub fn read(path: &Path) -> Result<Classes> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let wrong = |what: String| Error::Labels { file: path.into(), what };
        let mut rows = Vec::new();
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let mut columns = line.split('\t').map(str::trim);
            match (columns.next().unwrap_or_default().parse::<usize>(), columns.next()) {
                (Ok(number), Some(name)) if !name.is_empty() => rows.push((number, name.to_string())),
                _ if i == 0 => {} // the heading
                _ => {
                    let expected = "expected a class's number and its name, divided by a tab";
                    return Err(wrong(format!("line {} is {line:?}: {expected}", i + 1)));
                }
            }
        }
        rows.sort();
        if let Some((i, (number, name))) = rows.iter().enumerate().find(|(i, (number, _))| i != number) {
            return Err(wrong(format!(
                "{name} has the number {number} where {i} was expected: the {} must have the numbers from 0 on, \
                 each once",
                counted(rows.len(), "class")
            )));
        }
        let n = rows.len();
        let classes = Classes::of(rows.into_iter().map(|(_, name)| name).collect());
        match classes.numbers.len() == n && (1..=usize::from(u16::MAX)).contains(&n) {
            true => Ok(classes),
            false => Err(wrong(format!(
                "it has {} with {}; expected 1 to {} classes, each once",
                counted(n, "row"),
                counted(classes.numbers.len(), "different name"),
                u16::MAX
            ))),
        }
    }

    /// Returns whether these are the official classes in their usual order.
    pub fn are_official(&self) -> bool {
        self.names.iter().map(String::as_str).eq(OFFICIAL.lines())
    }

    /// Returns the number of classes.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Returns the index of the class `name`.
    pub fn number(&self, name: &str) -> Option<u16> {
        self.numbers.get(name).copied()
    }

    /// Returns the name of the class with index `number`.
    pub fn name(&self, number: usize) -> Option<&str> {
        self.names.get(number).map(String::as_str)
    }
}

/// The selected classes. As text they are `100` (the first hundred) or `n01440764,n01443537`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ClassChoice {
    /// The classes with indices 0 to n-1.
    First(usize),
    /// The classes with these names.
    Named(Vec<String>),
}

impl ClassChoice {
    /// Returns for each class whether it is selected.
    pub(super) fn taken(&self, classes: &Classes) -> Result<Vec<bool>> {
        let mut taken = vec![false; classes.len()];
        match self {
            ClassChoice::First(n) if *n == 0 || *n > taken.len() => {
                return Err(Error::Invalid(format!(
                    "cannot take the first {n} classes: there are {}",
                    taken.len()
                )));
            }
            ClassChoice::First(n) => taken[..*n].fill(true),
            ClassChoice::Named(names) => {
                for name in names {
                    let number = classes.number(name).ok_or_else(|| {
                        let example = classes.name(0).unwrap_or_default();
                        Error::Invalid(format!("there is no class {name}: classes have names as {example}"))
                    })?;
                    taken[usize::from(number)] = true;
                }
            }
        }
        Ok(taken)
    }
}

impl FromStr for ClassChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<ClassChoice, String> {
        if let Ok(n) = text.trim().parse() {
            return Ok(ClassChoice::First(n));
        }
        let names: Vec<String> = text.split(',').map(|name| name.trim().to_string()).collect();
        match names.iter().any(String::is_empty) {
            false => Ok(ClassChoice::Named(names)),
            true => Err(format!("{text:?} chooses no classes: expected a number or names divided by commas")),
        }
    }
}

impl TryFrom<String> for ClassChoice {
    type Error = String;

    fn try_from(text: String) -> Result<ClassChoice, String> {
        text.parse()
    }
}

impl From<ClassChoice> for String {
    fn from(choice: ClassChoice) -> String {
        choice.to_string()
    }
}

impl fmt::Display for ClassChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClassChoice::First(n) => write!(f, "{n}"),
            ClassChoice::Named(names) => f.write_str(&names.join(",")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_official_classes_are_a_thousand_in_sorted_order() {
        let classes = Classes::official();
        assert!(classes.are_official() && classes.len() == 1000);
        assert!(classes.names.is_sorted() && classes.numbers.len() == 1000);
        assert!(classes.names.iter().all(|name| name.len() == 9 && name.starts_with('n')));
        // Tench, Chihuahua and toilet paper have these indices in many published networks.
        for (number, name) in [(0, "n01440764"), (151, "n02085620"), (999, "n15075141")] {
            assert_eq!(
                (classes.name(number.into()), classes.number(name)),
                (Some(name), Some(number)),
                "{number}"
            );
        }
        assert_eq!((classes.number("n00000000"), classes.name(1000)), (None, None));
    }

    #[test]
    fn other_names_are_numbered_in_their_order() {
        let classes = Classes::ordered(["dog", "cat"].map(String::from).to_vec()).unwrap();
        assert_eq!((classes.len(), classes.number("cat"), classes.number("dog")), (2, Some(1), Some(0)));
        assert!(!classes.are_official());
    }

    #[test]
    fn a_file_of_classes_is_read_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Classes::read(&path)
        };
        let classes = read("index\twnid\tname\n1\tn02\ta cat\n0\tn03\tdog\n\n").unwrap();
        assert_eq!((classes.len(), classes.number("n03"), classes.number("n02")), (2, Some(0), Some(1)));
        let refused = |text: &str, expected: &str| {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(FILE), "{error}");
        };
        refused("0\tn01\n2\tn02\n", "n02 has the number 2 where 1 was expected");
        refused("0\tn01\n0\tn02\n", "n02 has the number 0 where 1 was expected");
        refused("0\tn01\n1\tn01\n", "2 rows with 1 different name;");
        refused("index\twnid\n", "0 rows");
        refused("0\tn01\n1 n02\n", "line 2 is \"1 n02\"");
    }

    #[test]
    fn choices_are_read_written_and_checked() {
        let classes = Classes::ordered(["a", "b", "c"].map(String::from).to_vec()).unwrap();
        let check = |text: &str, expected: [bool; 3]| {
            let choice: ClassChoice = text.parse().unwrap();
            assert_eq!(choice.to_string(), text);
            let json = serde_json::to_string(&choice).unwrap();
            assert_eq!(serde_json::from_str::<ClassChoice>(&json).unwrap(), choice);
            assert_eq!(choice.taken(&classes).unwrap(), expected, "{text}");
        };
        check("2", [true, true, false]);
        check("c,a", [true, false, true]);
        let refused = |text: &str| text.parse::<ClassChoice>().unwrap().taken(&classes).unwrap_err();
        assert!(refused("4").to_string().contains("there are 3"));
        assert!(refused("0").to_string().contains("there are 3"));
        assert!(refused("a,d").to_string().contains("no class d"));
        assert!("a,,b".parse::<ClassChoice>().is_err() && "".parse::<ClassChoice>().is_err());
    }
}
