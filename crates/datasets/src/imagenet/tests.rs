//! Tests with small data sets in every format, and with their batches.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use image::DynamicImage;

use super::*;
use crate::testing::{Mood, Server, write, write_parquet};

#[path = "../../../pictures/tests/common/mod.rs"]
mod made;
pub(super) use made::{jpeg_of, png_of, scene};

/// Three of the official classes, with the indices 0, 1 and 999.
pub(super) const WNIDS: [&str; 3] = ["n01440764", "n01443537", "n15075141"];

/// Returns the class, file name and contents of each picture of a split.
///
/// There are two pictures per class for training and one for validation. One of the training
/// pictures is a PNG whose name ends in JPEG.
fn pictures(split: usize) -> Vec<(&'static str, String, Vec<u8>)> {
    let mut pictures = Vec::new();
    for (label, wnid) in WNIDS.into_iter().enumerate() {
        for copy in 0..2 - split {
            let number = 2 * label + copy;
            let picture = scene(50 + 3 * number as u32, 44, (10 * split + number) as u32);
            let name = match split {
                TRAIN => format!("{wnid}_{}.JPEG", 7 - copy),
                _ => format!("ILSVRC2012_val_{:08}.JPEG", 3 - label),
            };
            let contents = match number {
                1 => png_of(&DynamicImage::ImageRgb8(picture)),
                _ => jpeg_of(&picture),
            };
            pictures.push((wnid, name, contents));
        }
    }
    pictures
}

/// Writes a folder for each class, with other files next to the pictures.
pub(super) fn write_folders(root: &Path) {
    for (split, folder) in ["train", "val"].into_iter().enumerate() {
        for (wnid, name, contents) in pictures(split) {
            write(&root.join(folder).join(wnid).join(name), &contents);
        }
        write(&root.join(folder).join(WNIDS[0]).join("notes.txt"), b"not a picture");
        write(&root.join(folder).join(".hidden/a.jpg"), b"not a picture");
    }
}

fn tar_of(members: impl IntoIterator<Item = (String, Vec<u8>)>) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, contents) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(contents.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, &contents[..]).unwrap();
    }
    tar.into_inner().unwrap()
}

/// Returns the official training archive, a tar file of tar files.
fn train_tar() -> Vec<u8> {
    let inner = WNIDS.map(|wnid| {
        let own = pictures(TRAIN).into_iter().filter(|(class, ..)| *class == wnid);
        (format!("{wnid}.tar"), tar_of(own.map(|(_, name, contents)| (name, contents))))
    });
    tar_of(inner)
}

fn val_tar(prefix: &str) -> Vec<u8> {
    tar_of(pictures(TEST).into_iter().map(|(_, name, contents)| (format!("{prefix}{name}"), contents)))
}

/// The classes of the validation images, as in `val.txt`.
const VAL: &str = "ILSVRC2012_val_00000003.JPEG n01440764\nILSVRC2012_val_00000002.JPEG 1\n\
                   ILSVRC2012_val_00000001.JPEG 999\n";

/// Returns a parquet file in the hub's format; each row has a path, a label and the contents.
fn parquet(rows: &[(&str, i64, Vec<u8>)]) -> Vec<u8> {
    let schema = "message schema {
        optional group image { optional binary bytes; optional binary path (UTF8); }
        optional int64 label;
    }";
    let contents = rows.iter().map(|(.., contents)| contents.clone()).collect();
    let paths = rows.iter().map(|(path, ..)| path.as_bytes().to_vec()).collect();
    write_parquet(schema, [contents, paths], &[rows.iter().map(|(_, label, _)| *label).collect()])
}

/// Returns two tables for training and one for validation.
fn tables() -> Vec<(String, Vec<u8>)> {
    let table = |split: usize, rows: std::ops::Range<usize>| {
        let all = pictures(split);
        let label = |wnid: &str| i64::from(Classes::official().number(wnid).unwrap());
        // As in the hub's tables, the names end with the class.
        let row = |(wnid, name, contents): &(&str, String, Vec<u8>)| {
            (name.replace(".JPEG", &format!("_{wnid}.JPEG")), label(wnid), contents.clone())
        };
        let rows: Vec<(String, i64, Vec<u8>)> = all[rows].iter().map(row).collect();
        let rows: Vec<(&str, i64, Vec<u8>)> =
            rows.iter().map(|(name, label, contents)| (name.as_str(), *label, contents.clone())).collect();
        parquet(&rows)
    };
    vec![
        ("train-00000-of-00002.parquet".into(), table(TRAIN, 0..4)),
        ("train-00001-of-00002.parquet".into(), table(TRAIN, 4..6)),
        ("validation-00000-of-00001.parquet".into(), table(TEST, 0..3)),
    ]
}

/// Returns options that fit the small pictures of these tests.
pub(super) fn small() -> Options {
    Options { side: 16, resize: 20, threads: Some(2), ..Options::default() }
}

pub(super) fn open(root: &Path, options: &Options) -> Result<ImageNet> {
    load(&DataSource::Folder(root.into()), options, &mut |_| {})
}

/// Returns the labels and the bit patterns of the pixels of all batches.
pub(super) fn collect(batches: Batches) -> (Vec<u32>, Vec<u32>) {
    let (mut labels, mut pixels) = (Vec::new(), Vec::new());
    for batch in batches {
        let Batch { images, labels: found } = batch.unwrap();
        assert_eq!(images.dims(), [found.elem_count(), 16, 16, 3]);
        labels.extend(found.to_vec1::<u32>().unwrap());
        pixels.extend(images.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()));
    }
    (labels, pixels)
}

pub(super) const FLIP: Augmentation = Augmentation { pad: 0, flip: true };

/// Checks that `data` is the data set of these tests and gives the same batches as `expected`.
fn check(data: &ImageNet, expected: &ImageNet) {
    assert_eq!((data.name(), data.classes(), data.side()), ("imagenet_part", 1000, (16, 16)));
    assert_eq!((data.train_images(), data.test_images()), (6, 3));
    assert_eq!(data.fingerprint(), expected.fingerprint());
    let test = collect(data.test_batches(2));
    assert_eq!(test.0, [0, 1, 999]);
    assert_eq!(test, collect(expected.test_batches(2)));
    let train = collect(data.train_batches(4, FLIP, 1, 0));
    assert_eq!(train, collect(expected.train_batches(4, FLIP, 1, 0)));
    let mut labels = train.0;
    labels.sort_unstable();
    assert_eq!(labels, [0, 0, 1, 1, 999, 999]);
    assert!(data.skipped().is_empty());
}

#[test]
fn every_form_gives_the_same_data() {
    let folders = tempfile::tempdir().unwrap();
    write_folders(folders.path());
    let expected = open(folders.path(), &small()).unwrap();
    check(&expected, &expected);

    let root = |fill: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        fill(dir.path());
        check(&open(dir.path(), &small()).unwrap(), &expected);
        dir
    };
    let flat = |root: &Path, folder: &str| {
        pictures(TEST).iter().for_each(|(_, name, contents)| write(&root.join(folder).join(name), contents));
    };
    root(&|root| {
        write_folders(root);
        fs::remove_dir_all(root.join("val")).unwrap();
        flat(root, "val");
        write(&root.join("val.txt"), VAL.as_bytes());
    });
    root(&|root| {
        write_folders(root);
        fs::rename(root.join("val"), root.join("once")).unwrap();
        fs::create_dir(root.join("val")).unwrap();
        fs::rename(root.join("once"), root.join("val/val")).unwrap();
    });
    root(&|root| {
        write_folders(&root.join("ILSVRC/Data/CLS-LOC"));
        fs::remove_dir_all(root.join("ILSVRC/Data/CLS-LOC/val")).unwrap();
        flat(root, "ILSVRC/Data/CLS-LOC/val");
        let csv = "ImageId,PredictionString\nILSVRC2012_val_00000003,n01440764 1 2 3 4\n\
                   ILSVRC2012_val_00000001,n15075141 1 2 3 4\nILSVRC2012_val_00000002,n01443537 1 2 3 4\n";
        write(&root.join("LOC_val_solution.csv"), csv.as_bytes());
    });
    root(&|root| {
        write(&root.join("ILSVRC2012_img_train.tar"), &train_tar());
        write(&root.join("ILSVRC2012_img_val.tar"), &val_tar(""));
        write(&root.join("val.txt"), VAL.as_bytes());
    });
    root(&|root| {
        let members = pictures(TRAIN).into_iter();
        let members = members.map(|(wnid, name, contents)| (format!("./train/{wnid}/{name}"), contents));
        write(&root.join("ILSVRC2012_img_train.tar"), &tar_of(members));
        write(&root.join("ILSVRC2012_img_val.tar"), &val_tar("val/"));
        write(&root.join("val.txt"), VAL.as_bytes());
    });
    for inner in ["", "data"] {
        let dir = root(&|root| {
            tables().iter().for_each(|(name, contents)| write(&root.join(inner).join(name), contents));
        });
        // Once unpacked, the tables are not needed any more.
        for (name, _) in tables() {
            fs::remove_file(dir.path().join(inner).join(name)).unwrap();
        }
        check(&open(dir.path(), &small()).unwrap(), &expected);
    }
}

#[test]
fn an_archive_is_gone_through_once() {
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("ILSVRC2012_img_train.tar");
    let index = dir.path().join("ILSVRC2012_img_train.tar.index");
    write(&archive, &train_tar());
    let found = || {
        let mut indexed = 0;
        let found = archive::pictures(&archive, &mut |event| {
            indexed += usize::from(matches!(event, Event::Indexing { .. }));
        });
        (found.unwrap(), indexed)
    };
    let (first, indexed) = found();
    assert_eq!((first.len(), indexed), (6, 1));
    assert_eq!(&*first[0].name, "n01440764.tar/n01440764_7.JPEG");
    assert_eq!(first[0].read().unwrap(), pictures(TRAIN)[0].2);
    assert_eq!(found(), (first.clone(), 0));
    // The index is rebuilt if it is damaged, or if the archive or its modification time changed.
    let whole = fs::read_to_string(&index).unwrap();
    for text in ["", "{}", &whole[..whole.len() / 2]] {
        fs::write(&index, text).unwrap();
        assert_eq!(found(), (first.clone(), 1), "{text}");
    }
    // It is also rebuilt if a picture lies beyond the end of the archive, because reading it would
    // allocate too much memory.
    let end = fs::metadata(&archive).unwrap().len();
    for (position, size) in [(0, end + 1), (end, 1), (u64::MAX, u64::MAX), (512, u64::MAX - 511)] {
        let members = [(position, size, "n01440764.tar/a.JPEG")];
        let mut wrong: serde_json::Value = serde_json::from_str(&whole).unwrap();
        wrong["members"] = serde_json::to_value(members).unwrap();
        fs::write(&index, wrong.to_string()).unwrap();
        assert_eq!(found(), (first.clone(), 1), "{position} {size}");
    }
    let later = fs::metadata(&archive).unwrap().modified().unwrap() + Duration::from_secs(1);
    fs::File::options().append(true).open(&archive).unwrap().set_modified(later).unwrap();
    assert_eq!(found(), (first.clone(), 1));
    write(&archive, &tar_of([("a.jpg".to_string(), b"x".to_vec())]));
    let (changed, indexed) = found();
    assert_eq!((changed.len(), indexed), (1, 1));
    assert_eq!(changed[0].to_string(), format!("{}: a.jpg", archive.display()));

    // If the index cannot be written, this is reported and the archive is still used.
    fs::remove_file(&index).unwrap();
    fs::create_dir(&index).unwrap();
    let mut events = Vec::new();
    archive::pictures(&archive, &mut |event| events.push(event)).unwrap();
    assert!(matches!(&events[..], [Event::Indexing { .. }, Event::NotKept { .. }]), "{events:?}");
}

#[test]
fn broken_archives_and_tables_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("ILSVRC2012_img_train.tar");
    let whole = train_tar();
    let refused = |contents: &[u8]| {
        write(&archive, contents);
        let error = open(dir.path(), &small()).unwrap_err();
        assert!(matches!(&error, Error::Malformed { file, .. } if file.contains("img_train.tar")), "{error}");
        error.to_string()
    };
    assert!(
        refused(&whole[..whole.len() - 5000]).contains("truncated: its member n15075141.tar ends at byte")
    );
    assert!(refused(&whole[..700]).contains("truncated"));
    assert!(refused(&[b'x'; 2000]).contains("not a complete tar file"));
    fs::remove_file(&archive).unwrap();

    let table = dir.path().join("train-00000-of-00001.parquet");
    let refused = |contents: &[u8]| {
        write(&table, contents);
        let error = open(dir.path(), &small()).unwrap_err();
        assert!(matches!(&error, Error::Malformed { file, .. } if file.contains("train-00000")), "{error}");
        // No incomplete archive remains.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        error.to_string()
    };
    let good = &tables()[0].1;
    assert!(refused(&good[..good.len() - 9]).contains("not a complete parquet file"));
    assert!(refused(&parquet(&[("a.JPEG", 1000, vec![1])])).contains("row 0 has the label 1000 of 1000"));
    assert!(refused(&parquet(&[("a.JPEG", -1, vec![1])])).contains("row 0 has the label -1"));
}

/// Returns the label of the picture in the folder `name`, if each of `names` is such a folder.
fn class_of(names: &[&str], name: &str) -> u16 {
    let dir = tempfile::tempdir().unwrap();
    names.iter().for_each(|name| write(&dir.path().join("train").join(name).join("a.png"), b""));
    let data = open(dir.path(), &small()).unwrap();
    data.0.splits[TRAIN].iter().find(|item| item.stored.folder() == Some(name)).unwrap().label
}

#[test]
fn labels_are_official_wherever_a_class_is() {
    let labels = |names: &[&str], given: Option<&str>| {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            write(&dir.path().join("val").join(name).join("a.JPG"), &jpeg_of(&scene(30, 30, 0)));
        }
        if let Some(given) = given {
            write(&dir.path().join("class_index.tsv"), given.as_bytes());
        }
        let data = open(dir.path(), &small())?;
        Ok::<_, Error>((data.classes(), collect(data.test_batches(8)).0))
    };
    // A validation set of only three official classes still has labels among 1000.
    assert_eq!(labels(&["n15075141", "n01443537", "n02085620"], None).unwrap(), (1000, vec![1, 151, 999]));
    assert_eq!(labels(&["dogs", "cats"], None).unwrap(), (2, vec![0, 1]));
    // Folders whose names are numbers are sorted as numbers: 10 does not follow 1.
    let numbers: Vec<String> = (0..12).map(|number| number.to_string()).collect();
    let numbers: Vec<&str> = numbers.iter().map(String::as_str).collect();
    assert_eq!(class_of(&numbers, "10"), 10);
    assert_eq!(
        class_of(&["000", "001", "010", "002", "003", "004", "005", "006", "007", "008", "009"], "010"),
        10
    );
    for (names, expected) in [
        (&["1", "2"][..], "1 stands where 0"),
        (&["0", "1", "3"], "3 stands where 2"),
        (&["0", "00"], "stands where 1"),
    ] {
        let error = labels(names, None).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("class_index.tsv"), "{error}");
    }
    assert_eq!(labels(&["1", "2"], Some("0\t2\n1\t1\n")).unwrap(), (2, vec![0, 1]));
    let given = "0\tn15075141\n1\tn01443537\n2\tn02085620\n";
    assert_eq!(labels(&["n15075141", "n01443537"], Some(given)).unwrap(), (3, vec![0, 1]));
    let error = labels(&["n15075141", "dogs"], None).unwrap_err();
    assert!(matches!(&error, Error::Labels { file, .. } if file.ends_with("val/dogs/a.JPG")), "{error}");
    let error = labels(&["n02085620", "n01440764"], Some(given)).unwrap_err();
    assert!(error.to_string().contains("n01440764"), "{error}");
}

#[test]
fn subsets_are_the_first_of_their_classes() {
    let dir = tempfile::tempdir().unwrap();
    write_folders(dir.path());
    let all = open(dir.path(), &small()).unwrap();
    let check = |change: &dyn Fn(&mut Options), train: &[u16], test: &[u16]| {
        let mut options = small();
        change(&mut options);
        let data = open(dir.path(), &options).unwrap();
        let labels =
            data.0.splits.each_ref().map(|items| items.iter().map(|item| item.label).collect::<Vec<_>>());
        assert_eq!((&labels[0][..], &labels[1][..]), (train, test), "{options:?}");
        assert_eq!(data.classes(), 1000);
        assert_eq!(data.fingerprint() == all.fingerprint(), train.len() == 6 && test.len() == 3);
        data
    };
    check(&|_| {}, &[0, 0, 1, 1, 999, 999], &[0, 1, 999]);
    check(&|options| options.classes = Some(ClassChoice::First(2)), &[0, 0, 1, 1], &[0, 1]);
    check(&|options| options.classes = Some("n15075141".parse().unwrap()), &[999, 999], &[999]);
    check(&|options| options.test_limit = Some(Limit::Total(2)), &[0, 0, 1, 1, 999, 999], &[0, 1]);
    check(&|options| options.train_limit = Some(Limit::Total(4)), &[0, 0, 1, 999], &[0, 1, 999]);
    check(&|options| options.train_limit = Some(Limit::PerClass(9)), &[0, 0, 1, 1, 999, 999], &[0, 1, 999]);
    let data = check(&|options| options.train_limit = Some(Limit::PerClass(1)), &[0, 1, 999], &[0, 1, 999]);
    assert!(data.source().ends_with("; limited to 1 training image a class"), "{}", data.source());
    let names: Vec<&str> = data.0.splits[TRAIN].iter().map(|item| item.stored.file_name()).collect();
    assert_eq!(names, ["n01440764_6.JPEG", "n01443537_6.JPEG", "n15075141_6.JPEG"]);

    let held = all.hold_out(3, 5).unwrap();
    assert_eq!((held.train_images(), collect(held.test_batches(9)).0), (3, vec![0, 1, 999]));
    let names = |data: &ImageNet| -> BTreeSet<String> {
        data.0.splits.iter().flatten().map(|item| item.stored.to_string()).collect()
    };
    assert!(names(&held).is_subset(&names(&all)) && names(&held).len() == 6);
    assert_eq!(held.fingerprint(), all.hold_out(3, 5).unwrap().fingerprint());
    for n in [0, 6] {
        assert!(all.hold_out(n, 0).unwrap_err().to_string().contains("expected hold_out from 1 to 5"));
    }
    let error =
        open(dir.path(), &Options { classes: Some(ClassChoice::First(1001)), ..small() }).unwrap_err();
    assert!(error.to_string().contains("there are 1000"), "{error}");
    let changed = open(dir.path(), &Options { resize: 21, ..small() }).unwrap();
    assert_ne!(changed.fingerprint(), all.fingerprint());
}

/// A class may have the name of a split. A part of which images are held out is still a part.
#[test]
fn classes_may_be_called_as_splits() {
    let dir = tempfile::tempdir().unwrap();
    for split in ["train", "val"] {
        for (class, seed) in [("boat", 1), ("train", 2)] {
            for picture in ["1.jpg", "2.jpg"] {
                write(&dir.path().join(split).join(class).join(picture), &jpeg_of(&scene(50, 44, seed)));
            }
        }
    }
    let data = open(dir.path(), &small()).unwrap();
    assert_eq!((data.classes(), data.train_images(), data.test_images()), (2, 4, 4));
    assert_eq!(collect(data.test_batches(4)).0, [0, 0, 1, 1]);
    assert_eq!(data.hold_out(2, 0).unwrap().name(), "imagenet_holdout_part");
}

/// A network would be trained without a class of which there are no training pictures.
#[test]
fn classes_without_pictures_are_named() {
    let said = |train: &[&str], val: &[&str], options: &Options| {
        let dir = tempfile::tempdir().unwrap();
        for (split, classes) in [("train", train), ("val", val)] {
            let place = dir.path().join(split);
            classes
                .iter()
                .for_each(|class| write(&place.join(class).join("1.jpg"), &jpeg_of(&scene(30, 30, 0))));
        }
        let mut told = Vec::new();
        let folder = DataSource::Folder(dir.path().into());
        let data = load(&folder, options, &mut |event| told.push(event.to_string())).unwrap();
        assert_eq!(data.title(), format!("pictures in {}", data.source()));
        let held = data.hold_out(1, 0).map(|held| held.prepare(&mut |_| {}).is_ok());
        let prepared = data.prepare(&mut |_| {}).map_err(|error| error.to_string());
        // Held out images stand in for missing test images, not for a class.
        assert!(
            val.is_empty() || held.is_ok_and(|held| held == prepared.is_ok()) || data.train_images() == 1
        );
        (told.into_iter().filter(|line| !line.starts_with("looking")).collect::<String>(), prepared)
    };
    assert_eq!(said(&["cat", "dog"], &["cat", "dog"], &small()), (String::new(), Ok(())));
    let error = said(&["dog", "newt"], &["cat", "dog", "newt"], &small()).1.unwrap_err();
    assert!(error.contains("no training images of class cat in") && error.contains("train/cat/*"), "{error}");
    let error = said(&["a"], &["a", "b", "c", "d", "e"], &small()).1.unwrap_err();
    assert!(error.contains("classes b, c, d and 1 more"), "{error}");
    let (told, prepared) = said(&["cat", "dog", "newt"], &["dog"], &small());
    assert!(told.contains("nothing about classes cat, newt") && prepared.is_ok(), "{told}");
    // Classes that are not taken need no pictures, and taken ones keep theirs if there is a limit.
    let dogs = Options { classes: "dog".parse().ok(), ..small() };
    assert!(said(&["dog"], &["cat", "dog"], &dogs).1.is_ok());
    let one = Options { train_limit: Some(Limit::Total(1)), ..small() };
    assert!(said(&["cat", "dog"], &["cat", "dog"], &one).1.is_ok());
    let error = said(&["cat", "dog"], &[], &small()).1.unwrap_err();
    assert!(error.contains("no test images") && error.contains("val/CLASS/*"), "{error}");
}

#[test]
fn an_epoch_is_a_function_of_seed_and_epoch() {
    let dir = tempfile::tempdir().unwrap();
    write_folders(dir.path());
    let data = open(dir.path(), &small()).unwrap();
    let epoch = |data: &ImageNet, batch, seed, epoch| collect(data.train_batches(batch, FLIP, seed, epoch));
    let first = epoch(&data, 4, 1, 0);
    assert_eq!(first, epoch(&data, 4, 1, 0));
    // The result depends neither on the batch size nor on the number of threads.
    assert_eq!(first, epoch(&data, 1, 1, 0));
    assert_eq!(first, epoch(&open(dir.path(), &Options { threads: Some(1), ..small() }).unwrap(), 4, 1, 0));
    assert_ne!(first, epoch(&data, 4, 1, 1));
    assert_ne!(first, epoch(&data, 4, 2, 0));
    let sizes =
        |batches: Batches| batches.map(|batch| batch.unwrap().labels.elem_count()).collect::<Vec<_>>();
    assert_eq!(sizes(data.train_batches(4, FLIP, 1, 0)), [4, 2]);
    assert_eq!(data.test_batches(2).len(), 2);
    for mut batches in [data.train_batches(0, FLIP, 1, 0), data.test_batches(0)] {
        assert!(matches!(batches.next(), Some(Err(Error::Invalid(_)))) && batches.next().is_none());
    }
    let padded = Augmentation { pad: 4, flip: true };
    let error = data.train_batches(4, padded, 1, 0).next().unwrap().unwrap_err().to_string();
    assert!(error.contains("augmentation.pad = 4"), "{error}");
}

#[test]
fn damaged_pictures_are_left_out_and_named() {
    let dir = tempfile::tempdir().unwrap();
    write_folders(dir.path());
    let whole = collect(open(dir.path(), &small()).unwrap().test_batches(3));
    let cut = dir.path().join("val/n01443537/ILSVRC2012_val_00000002.JPEG");
    let contents = fs::read(&cut).unwrap();
    fs::write(&cut, &contents[..contents.len() / 2]).unwrap();
    fs::write(dir.path().join("train/n01440764/n01440764_6.JPEG"), b"").unwrap();

    let options = Options { bad_percent: 40.0, ..small() };
    let data = open(dir.path(), &options).unwrap();
    let rest = collect(data.test_batches(3));
    assert_eq!(rest.0, [0, 999]);
    // The remaining pictures do not change.
    let size = 16 * 16 * 3;
    assert_eq!(rest.1, [&whole.1[..size], &whole.1[2 * size..]].concat());
    // A batch without a usable picture is skipped.
    assert_eq!(collect(data.test_batches(1)).0, [0, 999]);
    let mut labels = collect(data.train_batches(2, FLIP, 1, 0)).0;
    labels.sort_unstable();
    assert_eq!(labels, [0, 1, 1, 999, 999]);
    let skipped = data.skipped();
    assert_eq!(skipped.len(), 2);
    assert!(skipped[0].file.ends_with("n01440764_6.JPEG") && skipped[0].why.contains("empty"), "{skipped:?}");
    assert!(
        skipped[1].file.ends_with("val_00000002.JPEG") && skipped[1].why.contains("truncated"),
        "{skipped:?}"
    );

    // Above the limit, the epoch ends with an error that names the first unusable picture.
    let data = open(dir.path(), &Options { bad_percent: 20.0, ..small() }).unwrap();
    let error = data.test_batches(1).find_map(Result::err).unwrap().to_string();
    assert!(error.starts_with("1 of 3 test images") && error.contains("val_00000002.JPEG"), "{error}");
    // One picture of six is 16.7 %.
    assert!(data.train_batches(2, FLIP, 1, 0).all(|batch| batch.is_ok()));
}

/// Checks that pipes, which wait for a writer, and devices, which never end, are not read.
#[test]
fn only_regular_files_are_read() {
    let dir = tempfile::tempdir().unwrap();
    write_folders(dir.path());
    let [pipe, endless] = [("n01440764", 3), ("n15075141", 1)].map(|(wnid, number)| {
        let path = dir.path().join(format!("val/{wnid}/ILSVRC2012_val_{number:08}.JPEG"));
        fs::remove_file(&path).unwrap();
        path
    });
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    std::os::unix::fs::symlink("/dev/zero", &endless).unwrap();
    let data = open(dir.path(), &Options { bad_percent: 70.0, ..small() }).unwrap();
    assert_eq!(collect(data.test_batches(3)).0, [1]);
    let skipped = data.skipped();
    assert!(
        skipped.len() == 2 && skipped.iter().all(|skipped| skipped.why.contains("regular file")),
        "{skipped:?}"
    );
}

#[test]
fn a_folder_without_data_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |expected: &str| {
        let error = open(dir.path(), &small()).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        error
    };
    fs::create_dir_all(dir.path().join("train/n01440764")).unwrap();
    assert!(matches!(refused("no pictures in train/ or val/"), Error::NoImageNet { .. }));
    let absent = open(&dir.path().join("absent"), &small()).unwrap_err();
    assert!(matches!(absent, Error::NoImageNet { .. }) && absent.to_string().contains("no such folder"));
    write(&dir.path().join("val/ILSVRC2012_val_00000001.JPEG"), &jpeg_of(&scene(30, 30, 0)));
    assert!(matches!(refused("put LOC_val_solution.csv"), Error::Labels { .. }));
    write(&dir.path().join("val.txt"), b"ILSVRC2012_val_00000002.JPEG 3\n");
    refused("val.txt lacks it");
    write(&dir.path().join("val.txt"), b"ILSVRC2012_val_00000001.JPEG 3\n");
    // Evaluation works without training images.
    let data = open(dir.path(), &small()).unwrap();
    assert_eq!(collect(data.test_batches(5)).0, [3]);
    let error = data.train_batches(5, FLIP, 0, 0).next().unwrap().unwrap_err().to_string();
    assert!(
        error.starts_with("there are no training images in ") && error.ends_with("train/CLASS/*"),
        "{error}"
    );
    assert_eq!(data.prepare(&mut |_| {}).unwrap_err().to_string(), error);
    let error = load(&DataSource::Synthetic, &small(), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("no synthetic stand-in"), "{error}");
}

/// Returns a hub whose tables need a token, a client, and options that unpack elsewhere.
fn hub(token: Option<&str>) -> (Server, tempfile::TempDir, Hub, Options) {
    let files = tables().into_iter().map(|(name, contents)| (format!("data/{name}"), contents));
    let mut files: HashMap<String, Vec<u8>> = files.collect();
    files.insert("data/test-00000-of-00001.parquet".into(), b"of no interest".to_vec());
    let server = Server::of("ILSVRC/imagenet-1k", Some("hf_right"), files);
    let home = tempfile::tempdir().unwrap();
    let hub = Hub { token: token.map(String::from), ..server.hub(home.path()) };
    let options = Options { unpacked: Some(home.path().join("unpacked")), ..small() };
    (server, home, hub, options)
}

#[test]
fn the_hubs_tables_are_downloaded_and_unpacked_once() {
    let folders = tempfile::tempdir().unwrap();
    write_folders(folders.path());
    let expected = open(folders.path(), &small()).unwrap();
    let (server, home, hub, options) = hub(Some("hf_right"));
    let mut events = Vec::new();
    let data = load_hub(&hub, &options, &mut |event| events.push(event)).unwrap();
    check(&data, &expected);
    assert!(data.source().starts_with("hub ILSVRC/imagenet-1k, unpacked in "), "{}", data.source());
    let unpacked = events.iter().filter(|event| matches!(event, Event::Unpacking { .. })).count();
    assert_eq!(unpacked, 3);
    let requests = server.requests();
    // One request is for the list of files and one for their commit.
    assert_eq!(requests.iter().filter(|request| request.contains("/api/")).count(), 2, "{requests:?}");
    assert_eq!(
        requests.iter().filter(|request| request.starts_with("GET /datasets/")).count(),
        3,
        "{requests:?}"
    );

    // Now neither the network nor the cache is needed.
    server.set(Mood::Failing);
    fs::remove_dir_all(home.path().join("hub")).unwrap();
    check(&load_hub(&Hub { offline: true, ..hub.clone() }, &options, &mut |_| {}).unwrap(), &expected);
    // If an archive is missing, only that archive is made again.
    server.set(Mood::Good);
    server.requests();
    fs::remove_file(home.path().join("unpacked/train-00001-of-00002.tar")).unwrap();
    check(&load_hub(&hub, &options, &mut |_| {}).unwrap(), &expected);
    let fetched = server.requests().iter().filter(|request| request.starts_with("GET /datasets/")).count();
    assert_eq!(fetched, 1);
}

#[test]
fn a_part_of_the_hubs_tables_can_be_taken() {
    let (server, _home, hub, options) = hub(Some("hf_right"));
    let data = load_hub(&hub, &Options { tables: Some(1), ..options }, &mut |_| {}).unwrap();
    assert_eq!((data.train_images(), data.test_images()), (4, 3));
    assert!(!server.requests().iter().any(|request| request.contains("train-00001")));
}

#[test]
fn a_missing_or_refused_token_is_explained() {
    // The token is wrong, not missing: a missing token would be taken from the environment.
    let (server, _home, hub, options) = hub(Some("hf_wrong"));
    let refused = |hub: &Hub| {
        let error = load_hub(hub, &options, &mut |_| {}).unwrap_err();
        assert!(matches!(error, Error::Hub(hub::Error::Gated { .. })), "{error}");
        let text = error.to_string();
        let page = format!("{}/datasets/ILSVRC/imagenet-1k;", server.endpoint);
        for part in [page.as_str(), "HF_TOKEN", "hf auth login", "Access is restricted."] {
            assert!(text.contains(part), "{part}: {text}");
        }
        text
    };
    assert!(refused(&hub).contains("no token was sent, or an invalid one"));
    server.set(Mood::Forbidden);
    let right = Hub { token: Some("hf_right".into()), ..hub.clone() };
    assert!(refused(&right).contains("the token's account has no access"));
    server.set(Mood::Good);
    load_hub(&right, &options, &mut |_| {}).unwrap();

    let elsewhere = tempfile::tempdir().unwrap();
    let options = Options { unpacked: Some(elsewhere.path().into()), ..options.clone() };
    let error = load_hub(&Hub { offline: true, ..hub.clone() }, &options, &mut |_| {}).unwrap_err();
    assert!(matches!(error, Error::Hub(hub::Error::Offline { .. })), "{error}");
}
