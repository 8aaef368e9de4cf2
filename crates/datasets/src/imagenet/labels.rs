//! The classes of validation images that are not in a folder of their class.
//!
//! Every publisher uses another format. A format takes a few lines here, and no crate reads them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

use super::classes::Classes;

/// The files that can give the classes, in the order in which they are searched. The first existing
/// file is used.
const FILES: [&str; 6] = [
    "LOC_val_solution.csv",
    "ILSVRC2012_validation_ground_truth.txt",
    "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
    "imagenet_2012_validation_synset_labels.txt",
    "val.txt",
    "val_labels.txt",
];

/// The files that can map the development kit's numbers to classes.
const ORDERS: [&str; 2] = ["map_clsloc.txt", "synsets.txt"];

/// The class of each validation image, by its file name without folder and extension.
#[derive(Debug)]
pub(super) struct ValidationLabels {
    /// The file from which the labels were read.
    pub file: PathBuf,
    classes: HashMap<String, u16>,
}

impl ValidationLabels {
    /// Reads the labels from the file `asked`, or else from the first known file in the folders;
    /// `None` if none exists.
    pub fn find(asked: Option<&Path>, folders: &[&Path], classes: &Classes) -> Result<Option<Self>> {
        let known = || folders.iter().flat_map(|folder| FILES.map(|name| folder.join(name)));
        match asked.map(PathBuf::from).or_else(|| known().find(|path| path.is_file())) {
            Some(path) => Self::read(&path, folders, classes).map(Some),
            None => Ok(None),
        }
    }

    /// Reads a file in any of these formats:
    ///
    /// - `image,n01440764 x y x y ...` after a heading, as in `LOC_val_solution.csv`;
    /// - `image.JPEG class`, with the class given by its name, or by its index in `classes`,
    ///   counted from 0;
    /// - only the name of a class: line `i`, counted from 1, is the class of `ILSVRC2012_val_<i>`;
    /// - only the development kit's number of a class, in the same order. This number differs from
    ///   the usual index, so one of the files [`ORDERS`] must exist in the folder of this file or
    ///   in one of the folders.
    fn read(path: &Path, folders: &[&Path], classes: &Classes) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let mut order = None;
        let mut found = HashMap::new();
        for (line, number) in text.lines().zip(1..) {
            let mut words = line.split([',', ' ', '\t', '\r']).filter(|word| !word.is_empty());
            let (image, class) = match (words.next(), words.next()) {
                (None, _) | (Some("ImageId"), _) => continue,
                (Some(image), Some(class)) => (Some(stem(image)), class),
                (Some(class), None) => (None, class),
            };
            let label = match (class.parse::<usize>(), image) {
                (Err(_), _) => classes.number(class),
                (Ok(n), Some(_)) => u16::try_from(n).ok().filter(|_| n < classes.len()),
                (Ok(n), None) => {
                    if order.is_none() {
                        order = Some(read_order(path, folders, classes)?);
                    }
                    order.as_ref().and_then(|order| order.get(&n)).copied()
                }
            };
            let label = label.ok_or_else(|| {
                let what = format!("line {number} names the class {class}, which is not one of them");
                Error::Labels { file: path.into(), what }
            })?;
            let image = image.map_or_else(|| format!("ILSVRC2012_val_{number:08}"), String::from);
            found.insert(image, label);
        }
        Ok(Self { file: path.into(), classes: found })
    }

    /// Returns the class of the image in a file of this name.
    pub fn get(&self, file: &str) -> Option<u16> {
        self.classes.get(stem(file)).copied()
    }
}

/// Reads the class of each number of the development kit.
///
/// The file has lines of a class's name, its number and more, as in `map_clsloc.txt`, or lines that
/// begin with a name without a number, of which line `i`, counted from 1, has number `i`.
fn read_order(labels: &Path, folders: &[&Path], classes: &Classes) -> Result<HashMap<usize, u16>> {
    let beside = labels.parent().into_iter().chain(folders.iter().copied());
    let known = beside.flat_map(|folder| ORDERS.map(|name| folder.join(name)));
    let Some(path) = known.into_iter().find(|path| path.is_file()) else {
        let what = format!(
            "it has the numbers of the development kit, which are not the usual ones of the classes; put {} \
             (lines of `n02119789 1 kit_fox`) or {} (the names in the kit's order) beside it",
            ORDERS[0], ORDERS[1]
        );
        return Err(Error::Labels { file: labels.into(), what });
    };
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let wrong = |what: String| Error::Labels { file: path.clone(), what };
    let mut order = HashMap::new();
    for (line, number) in text.lines().zip(1..) {
        let mut words = line.split_whitespace();
        let Some(name) = words.next() else { continue };
        let label =
            classes.number(name).ok_or_else(|| wrong(format!("line {number}: there is no class {name}")))?;
        order.insert(words.next().and_then(|word| word.parse().ok()).unwrap_or(number), label);
    }
    // The kit's numbers differ from the usual indices, so this list would make every label wrong.
    if order.len() > 1 && order.iter().all(|(&number, &label)| number == usize::from(label) + 1) {
        return Err(wrong(
            "it has the classes in the usual, sorted order, not in the development kit's".into(),
        ));
    }
    Ok(order)
}

/// Returns the name of a file without folders and extension.
fn stem(name: &str) -> &str {
    let name = name.rsplit('/').next().unwrap_or(name);
    name.rsplit_once('.').map_or(name, |(stem, _)| stem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::write;

    /// Returns the classes that the first file gives to validation images 1 and 2, if the other
    /// files exist next to it.
    fn check(files: &[(&str, &str)]) -> Result<[Option<u16>; 2]> {
        let dir = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, text)| write(&dir.path().join(name), text.as_bytes()));
        let labels = ValidationLabels::find(None, &[dir.path()], &Classes::official())?.unwrap();
        assert_eq!(labels.file, dir.path().join(files[0].0));
        Ok(["ILSVRC2012_val_00000001.JPEG", "val/ILSVRC2012_val_00000002.jpg"].map(|name| labels.get(name)))
    }

    #[test]
    fn every_form_is_read() {
        let both = [Some(65), Some(970)];
        let csv = "ImageId,PredictionString\nILSVRC2012_val_00000002,n09193705 1 2 3 4 n09193705 5 6 7 8\r\n\
                   ILSVRC2012_val_00000001,n01751748 111 108 441 193 \n";
        assert_eq!(check(&[("LOC_val_solution.csv", csv)]).unwrap(), both);
        let numbers = "ILSVRC2012_val_00000001.JPEG 65\nILSVRC2012_val_00000002.JPEG 970\n";
        assert_eq!(check(&[("val.txt", numbers)]).unwrap(), both);
        let names = "val/ILSVRC2012_val_00000001.JPEG\tn01751748\n";
        assert_eq!(check(&[("val_labels.txt", names)]).unwrap(), [Some(65), None]);
        let alone = "n01751748\nn09193705\n";
        assert_eq!(check(&[("imagenet_2012_validation_synset_labels.txt", alone)]).unwrap(), both);
        let kit = ("ILSVRC2012_validation_ground_truth.txt", "490\n361\n");
        let order = ("map_clsloc.txt", "n09193705 361 alp\nn01751748 490 sea_snake\n");
        assert_eq!(check(&[kit, order]).unwrap(), both);
        let folder = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt";
        let order = ("synsets.txt", "n09193705 alp\nn01751748 sea snake\n");
        assert_eq!(check(&[(folder, "2\n1\n"), order]).unwrap(), both);
    }

    #[test]
    fn wrong_labels_are_refused() {
        let refused = |files: &[(&str, &str)], expected: &str| {
            let error = check(files).unwrap_err();
            assert!(matches!(error, Error::Labels { .. }) && error.to_string().contains(expected), "{error}");
        };
        refused(&[("val.txt", "ILSVRC2012_val_00000001.JPEG 1000")], "line 1 names the class 1000");
        refused(&[("val.txt", "\na.JPEG n00000000")], "line 2 names the class n00000000");
        let kit = ("ILSVRC2012_validation_ground_truth.txt", "1\n");
        refused(&[kit], "put map_clsloc.txt");
        refused(
            &[kit, ("synsets.txt", "n01440764 tench\nn01443537 goldfish\n")],
            "not in the development kit's",
        );
        refused(&[kit, ("synsets.txt", "kit_fox\n")], "no class kit_fox");
        refused(&[kit, ("map_clsloc.txt", "n02119789 2 kit_fox")], "line 1 names the class 1,");
    }

    #[test]
    fn a_file_that_is_asked_for_must_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let classes = Classes::official();
        assert!(ValidationLabels::find(None, &[dir.path()], &classes).unwrap().is_none());
        let absent = dir.path().join("absent.txt");
        let error = ValidationLabels::find(Some(&absent), &[dir.path()], &classes).unwrap_err();
        assert!(matches!(error, Error::Io { path, .. } if path == absent));
    }
}
