//! ImageNet-1000, whose pictures are read and decoded when they are used.
//!
//! [`load`] finds the pictures and their classes in a folder (class folders, the official tar
//! files, or the hub's parquet files) or on the hub. The result stores where each picture is and
//! makes batches: its own threads read, decode, crop and scale pictures in advance.

mod archive;
mod cache;
mod classes;
mod files;
#[doc(hidden)]
pub mod fuzzing;
mod labels;
mod options;
mod table;
mod transform;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor};
use hub::{Hub, MAIN, Repo};
use pictures::Scaler;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use sha2::{Digest, Sha256};

use crate::batches::{Augmentation, Batch, Batches, Epoch, Normalization, Part, order};
use crate::dataset::{Dataset, Skipped};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::from_hub::fetch;
use crate::memory::CHANNELS;
use crate::source::DataSource;
use crate::subset;
use crate::text::counted;

use cache::Cache;
use classes::Classes;
use files::Stored;
use labels::ValidationLabels;
use transform::Transform;

pub use classes::ClassChoice;
pub use options::{Limit, Options};

/// The hub's repository, which is gated.
const REPO: Repo = Repo { owner: "ILSVRC", name: "imagenet-1k" };
/// The folder of the repository's parquet files.
const TABLES: &str = "data";
/// The folder that [`DataSource::Auto`] uses if `PFQ_IMAGENET` is not set.
const FOLDER: &str = "imagenet";
/// The official numbers of training and validation images.
const OFFICIAL: [usize; 2] = [1_281_167, 50_000];
/// The mean and the standard deviation of the channels that are generally used for ImageNet.
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Loads ImageNet: finds every picture and its class, but reads no picture yet.
///
/// [`DataSource::Auto`] is the folder that the environment variable `PFQ_IMAGENET` names, or else
/// `./imagenet`; it is never the hub (150 GB). For training and for validation, a folder can hold
/// the first of:
///
/// 1. `train/<class>/*` and `val/<class>/*`, or flat `val/*` (also under `ILSVRC/Data/CLS-LOC`, and
///    nested in another folder of the same name);
/// 2. `ILSVRC2012_img_train.tar` and `ILSVRC2012_img_val.tar`, which are not changed: `.index`
///    files next to them store the positions of their members;
/// 3. the hub's `train-*.parquet` and `validation-*.parquet`, directly or in `data/`, which are
///    unpacked once into tar files ([`Options::unpacked`]).
///
/// Pictures are files that end in `.jpeg`, `.jpg` or `.png`, in upper or lower case. The classes of
/// flat validation images come from [`Options::labels`], or else from the first of
/// `LOC_val_solution.csv`, `ILSVRC2012_validation_ground_truth.txt` (with `map_clsloc.txt` or
/// `synsets.txt` for the order of its numbers), `imagenet_2012_validation_synset_labels.txt`,
/// `val.txt` and `val_labels.txt`.
///
/// If all class folders are official classes, even if they are few, labels are the official indices
/// 0 to 999, which follow the sorted names. `class_index.tsv` in the folder (lines of an index, a
/// tab, a name) gives other classes. If no folder is an official class, the folders are the
/// classes: in numerical order if their names are 0 to n-1, else sorted by name.
///
/// # Errors
///
/// [`Error::NoImageNet`] if nothing is found, [`Error::Labels`] if a picture has no class or a file
/// of labels is wrong, [`Error::Malformed`] if an archive or a table is malformed, [`Error::Hub`]
/// if the hub does not deliver a file, [`Error::Invalid`] if the options are invalid.
pub fn load(source: &DataSource, options: &Options, on_event: &mut dyn FnMut(Event)) -> Result<ImageNet> {
    match source {
        DataSource::Auto => {
            let named = std::env::var_os("PFQ_IMAGENET").filter(|value| !value.is_empty());
            load_folder(&named.map_or(FOLDER.into(), PathBuf::from), options, on_event)
        }
        DataSource::Folder(folder) => load_folder(folder, options, on_event),
        DataSource::Hub => load_hub(&Hub::from_env(), options, on_event),
        DataSource::Synthetic => Err(Error::Invalid(
            "there is no synthetic stand-in for ImageNet: name a folder that has it, or `hub`".into(),
        )),
    }
}

fn load_folder(folder: &Path, options: &Options, on_event: &mut dyn FnMut(Event)) -> Result<ImageNet> {
    options.validate()?;
    on_event(Event::Trying { place: format!("the folder {}", folder.display()) });
    let none = |what: &str| Error::NoImageNet { folder: folder.into(), what: what.into() };
    if !folder.is_dir() {
        return Err(none(match folder.exists() {
            true => "it is a file: name the folder that holds it",
            false => "there is no such folder",
        }));
    }
    let kaggle = folder.join("ILSVRC/Data/CLS-LOC");
    let root = if kaggle.is_dir() { kaggle.as_path() } else { folder };
    let classes = given_classes(folder)?;
    let tabled = classes.clone().unwrap_or_else(Classes::official);
    let mut split = |folders: &[&str], archive: &str, tables: &str| -> Result<Vec<Stored>> {
        // Unpacking by hand can nest a folder in another one of its name.
        for path in folders.iter().flat_map(|name| [root.join(name), root.join(name).join(name)]) {
            let found = Some(path).filter(|path| path.is_dir()).map(|path| files::scan(&path));
            if let Some(found) = found.transpose()?.filter(|found| !found.is_empty()) {
                return Ok(found);
            }
        }
        let archive = root.join(archive);
        if archive.is_file() {
            return archive::pictures(&archive, on_event);
        }
        for inner in [root.to_path_buf(), root.join(TABLES)] {
            let unpacked = options.unpacked.as_deref().unwrap_or(&inner);
            if let Some(archives) = complete(unpacked, tables, options.tables)? {
                return all_pictures(&archives, on_event);
            }
            let names = tables_of(tables, &names(&inner)?, options.tables);
            if !names.is_empty() {
                let mut archives = Vec::new();
                for name in names {
                    archives.push(unpack(&name, unpacked, &tabled, on_event, |_| Ok(inner.join(&name)))?);
                }
                return all_pictures(&archives, on_event);
            }
        }
        Ok(Vec::new())
    };
    let train = split(&["train"], "ILSVRC2012_img_train.tar", "train")?;
    let test = split(&["val", "validation"], "ILSVRC2012_img_val.tar", "validation")?;
    if train.is_empty() && test.is_empty() {
        return Err(none("it has no pictures in train/ or val/, no tar files and no parquet files"));
    }
    let source = folder.display().to_string();
    let labels = [folder, root];
    ImageNet::new(source, classes, [train, test], &labels, options, on_event)
}

/// Reads the classes of the folder's `class_index.tsv`, if it has one.
fn given_classes(folder: &Path) -> Result<Option<Classes>> {
    let path = folder.join(classes::FILE);
    path.is_file().then(|| Classes::read(&path)).transpose()
}

fn load_hub(hub: &Hub, options: &Options, on_event: &mut dyn FnMut(Event)) -> Result<ImageNet> {
    options.validate()?;
    let folder = match &options.unpacked {
        Some(folder) => folder.clone(),
        None => cache().ok_or_else(|| {
            Error::Invalid("neither XDG_CACHE_HOME nor HOME says where to unpack: give `unpacked`".into())
        })?,
    };
    let classes = Classes::official();
    let mut splits = [Vec::new(), Vec::new()];
    let mut listed = None;
    let mut revision = String::from(MAIN);
    for (split, prefix) in splits.iter_mut().zip(["train", "validation"]) {
        // Unpacked tables need no network.
        let archives = match complete(&folder, prefix, options.tables)? {
            Some(archives) => archives,
            None => {
                if listed.is_none() {
                    on_event(Event::Trying { place: format!("the Hugging Face hub ({REPO})") });
                    listed = Some(hub.list(REPO, TABLES, MAIN)?);
                }
                let paths = listed.iter().flatten();
                let names: Vec<String> =
                    paths.filter_map(|path| Some(path.rsplit_once('/')?.1.to_string())).collect();
                let names = tables_of(prefix, &names, options.tables);
                if names.is_empty() {
                    let what = format!("the hub's {REPO} has no {TABLES}/{prefix}-*.parquet any more");
                    return Err(Error::NoImageNet { folder, what });
                }
                let mut archives = Vec::new();
                for name in names {
                    archives.push(unpack(&name, &folder, &classes, on_event, |on_event| {
                        let table = fetch(hub, REPO, &format!("{TABLES}/{name}"), &revision, on_event)?;
                        // All tables must come from the same commit.
                        revision = hub::commit(&table);
                        Ok(table)
                    })?);
                }
                archives
            }
        };
        *split = all_pictures(&archives, on_event)?;
    }
    let source = format!("hub {REPO}, unpacked in {}", folder.display());
    ImageNet::new(source, Some(classes), splits, &[], options, on_event)
}

/// Returns the default folder to which the hub's tables are unpacked.
fn cache() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(base.join("pfq/imagenet"))
}

/// Returns the names of the files in a folder; none if the folder does not exist.
fn names(folder: &Path) -> Result<Vec<String>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    entries
        .map(|entry| Ok(entry.map_err(Error::io(folder))?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// Returns the names of the split's tables among `names`, sorted, and at most `limit` of them.
fn tables_of(split: &str, names: &[String], limit: Option<usize>) -> Vec<String> {
    let mut tables: Vec<String> = names
        .iter()
        .filter(|name| {
            name.ends_with(".parquet") && name.strip_prefix(split).is_some_and(|n| n.starts_with('-'))
        })
        .cloned()
        .collect();
    tables.sort_unstable();
    tables.truncate(limit.unwrap_or(usize::MAX));
    tables
}

/// Returns the archives of the split in a folder, `<split>-<number>-of-<all>.tar`; `None` unless
/// all of them, or the first `limit`, exist.
fn complete(folder: &Path, split: &str, limit: Option<usize>) -> Result<Option<Vec<PathBuf>>> {
    let names = names(folder)?;
    let all = names.iter().find_map(|name| {
        let numbers = name.strip_prefix(split)?.strip_prefix('-')?.strip_suffix(".tar")?;
        numbers.split_once("-of-")?.1.parse::<usize>().ok()
    });
    let Some(all) = all else { return Ok(None) };
    let wanted =
        (0..all.min(limit.unwrap_or(all))).map(|i| folder.join(format!("{split}-{i:05}-of-{all:05}.tar")));
    // This stops at the first missing file, whatever number the name of another file has.
    Ok(wanted.map(|path| path.is_file().then_some(path)).collect())
}

/// Returns the archive of the table `name` in `folder`. If it does not exist, unpacks the table
/// that `fetch` returns.
fn unpack(
    name: &str,
    folder: &Path,
    classes: &Classes,
    on_event: &mut dyn FnMut(Event),
    fetch: impl FnOnce(&mut dyn FnMut(Event)) -> Result<PathBuf>,
) -> Result<PathBuf> {
    let archive = folder.join(name).with_extension("tar");
    if !archive.is_file() {
        // Links are resolved so that an error names the file to delete, not a link to it.
        let table = fetch(on_event)?;
        table::unpack(&table.canonicalize().unwrap_or(table), &archive, classes, on_event)?;
    }
    Ok(archive)
}

fn all_pictures(archives: &[PathBuf], on_event: &mut dyn FnMut(Event)) -> Result<Vec<Stored>> {
    let mut found = Vec::new();
    for archive in archives {
        found.extend(archive::pictures(archive, on_event)?);
    }
    Ok(found)
}

/// A picture and its class.
#[derive(Clone, Debug)]
struct Item {
    stored: Stored,
    label: u16,
    /// The number of the picture among all that a cache of them has.
    number: usize,
}

/// The indices of the splits. Their names are [`SPLITS`], their usual folders [`FOLDERS`].
const TRAIN: usize = 0;
const TEST: usize = 1;
const SPLITS: [&str; 2] = ["training", "test"];
const FOLDERS: [&str; 2] = ["train", "val"];

/// ImageNet-1000 or a part of it: the locations of the pictures and their classes.
///
/// Clones are cheap and share everything.
///
/// Pictures are decoded as `PIL.Image.open(..).convert("RGB")` does (the orientation in EXIF is
/// ignored). For training they are cropped and scaled as by torchvision's `RandomResizedCrop`, and
/// mirrored if [`Augmentation::flip`]; for evaluation they are scaled and cropped as by its
/// `Resize` and `CenterCrop`. They are normalized with the usual mean and standard deviation.
/// [`Augmentation::pad`] must be 0.
///
/// A picture that cannot be read or decoded is left out, so its batch is smaller, and
/// [`Dataset::skipped`] names it. If more pictures are left out than [`Options::bad_percent`]
/// permits, the epoch ends with [`Error::TooManyBad`].
#[derive(Clone)]
pub struct ImageNet(Arc<Inner>);

struct Inner {
    name: String,
    source: String,
    splits: Arc<[Vec<Item>; 2]>,
    fingerprint: String,
    table: Normalization,
    common: Common,
    /// For each split, the indices of unusable images and the reason for each.
    skipped: Mutex<[BTreeMap<usize, String>; 2]>,
}

/// What a data set has in common with the one that holds out its images.
#[derive(Clone)]
struct Common {
    classes: Classes,
    options: Options,
    /// The names of the classes without training images, unless the classes are ImageNet's.
    untrained: Vec<String>,
    cache: Option<Arc<Cache>>,
    /// The threads that read and decode. They are separate from the threads that compute, so that
    /// neither kind of work waits for the other.
    pool: Arc<ThreadPool>,
}

impl fmt::Debug for ImageNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { source, splits, .. } = &*self.0;
        let [train, test] = &**splits;
        f.debug_struct("ImageNet")
            .field("source", source)
            .field("train", &train.len())
            .field("test", &test.len())
            .finish_non_exhaustive()
    }
}

impl ImageNet {
    /// Makes a data set of `found`. Searches `folders` for the labels of flat validation images.
    fn new(
        source: String,
        given: Option<Classes>,
        found: [Vec<Stored>; 2],
        folders: &[&Path],
        options: &Options,
        on_event: &mut dyn FnMut(Event),
    ) -> Result<ImageNet> {
        let classes = match given {
            Some(classes) => classes,
            None => classes_of(&found)?,
        };
        let [train, test] = found;
        let train = label(train, &classes, None)?;
        let flat = test.iter().any(|stored| stored.folder().and_then(|name| classes.number(name)).is_none());
        let labels = match flat {
            true => ValidationLabels::find(options.labels.as_deref(), folders, &classes)?,
            false => None,
        };
        let splits = [train, label(test, &classes, labels.as_ref())?];
        if classes.are_official() && options.tables.is_none() {
            for (split, (items, official)) in SPLITS.iter().zip(splits.iter().zip(OFFICIAL)) {
                if !items.is_empty() && items.len() != official {
                    let found = counted(items.len(), &format!("{split} image"));
                    let why = format!("{found} instead of {official}");
                    on_event(Event::Unverified { why });
                }
            }
        }
        let taken = options.classes.as_ref().map(|choice| choice.taken(&classes)).transpose()?;
        let mut source = source;
        if let Some(choice) = &options.classes {
            source += &format!("; classes {choice}");
        }
        let mut splits = splits.map(|mut items| {
            if let Some(taken) = &taken {
                items.retain(|item| taken[usize::from(item.label)]);
            }
            items
        });
        let [untrained, untested] = unused(&splits, &classes, taken.as_deref());
        if !untested.is_empty() {
            on_event(Event::Untested { classes: listed(&untested) });
        }
        let limits = [options.train_limit, options.test_limit];
        for ((items, limit), split) in splits.iter_mut().zip(limits).zip(SPLITS) {
            let Some(limit) = limit else { continue };
            let images = |n: usize| counted(n, &format!("{split} image"));
            source += &match limit {
                Limit::Total(n) => format!("; limited to {}", images(n)),
                Limit::PerClass(n) => format!("; limited to {} a class", images(n)),
            };
            let labels = labels_of(items);
            let kept = match limit {
                Limit::Total(n) => subset::first(&labels, classes.len(), n),
                // The items are sorted by class, so an image is one of the first n of its class if
                // the item n places before it has another class.
                Limit::PerClass(n) => {
                    (0..labels.len()).filter(|&i| i < n || labels[i - n] != labels[i]).collect()
                }
            };
            *items = kept.into_iter().map(|i| items[i].clone()).collect();
        }
        splits.iter_mut().flatten().enumerate().for_each(|(number, item)| item.number = number);
        let splits = Arc::new(splits);
        let threads = options.threads.or_else(|| std::thread::available_parallelism().ok().map(usize::from));
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads.unwrap_or(1))
            .thread_name(|i| format!("decode-{i}"))
            .build()
            .map_err(|error| Error::Loader(error.to_string()))?;
        // A result on a part must not be mistaken for a result on the whole set.
        let whole = splits.iter().zip(OFFICIAL).all(|(items, official)| items.len() == official);
        let name = if whole && classes.are_official() { "imagenet1000" } else { "imagenet_part" };
        let cache = match &options.cache {
            None => None,
            Some(folder) => {
                let side = options.resize;
                source += &format!("; shrunk to {side} in {}", folder.display());
                let fingerprint = fingerprint_of(&format!("imagenet cache 1: {side}"), &splits);
                Some(Arc::new(Cache::open(folder, side, cache::PER_PACK, fingerprint, &splits)?))
            }
        };
        let common = Common { classes, options: options.clone(), untrained, cache, pool: Arc::new(pool) };
        Ok(ImageNet::of(name, source, splits, common))
    }

    fn of(name: &str, source: String, splits: Arc<[Vec<Item>; 2]>, common: Common) -> ImageNet {
        // Shrunk pictures are different data, so the name differs.
        let name = format!("{name}{}", if common.options.cache.is_some() { "_shrunk" } else { "" });
        let fingerprint = fingerprint(&common.options, &splits);
        let table = Normalization::of(MEAN, STD);
        let skipped = Mutex::default();
        ImageNet(Arc::new(Inner { name, source, splits, fingerprint, table, common, skipped }))
    }

    /// Holds out training images, to choose settings without looking at the test set.
    ///
    /// `n` training images, drawn with `seed` and spread over the classes as evenly as possible,
    /// become the test images. The other training images stay training images, as in
    /// [`InMemoryDataset::hold_out`](crate::InMemoryDataset::hold_out).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless 0 < `n` < the number of training images.
    pub fn hold_out(&self, n: usize, seed: u64) -> Result<ImageNet> {
        let Inner { source, splits, common, .. } = &*self.0;
        let all = &splits[TRAIN];
        let parts = subset::hold_out(&labels_of(all), common.classes.len(), n, seed)?;
        let splits = parts.map(|part| part.into_iter().map(|i| all[i].clone()).collect());
        let held = counted(n, "training image");
        let source = format!("{source}; {held} held out as test (seed {seed})");
        let whole = self.0.name.starts_with("imagenet1000");
        let name = if whole { "imagenet_holdout" } else { "imagenet_holdout_part" };
        Ok(ImageNet::of(name, source, Arc::new(splits), common.clone()))
    }

    /// Makes the batch of these images; `transform` returns the transform of an index.
    fn assemble(
        &self,
        split: usize,
        indices: &[usize],
        transform: impl Fn(usize) -> Transform + Sync,
    ) -> Result<Batch> {
        let Inner { splits, table, common, .. } = &*self.0;
        let Common { options, cache, pool, .. } = common;
        let packed = cache.as_ref().map(|cache| cache.packed(pool, &mut |_| {})).transpose()?;
        let (side, items) = (options.side, &splits[split]);
        let size = side * side * CHANNELS;
        let mut pixels = vec![0f32; indices.len() * size];
        let prepare = |scaler: &mut Scaler, (target, &index): (&mut [f32], &usize)| {
            let write = |picture| transform(index).write(&picture, options, table, scaler, target);
            let Item { stored, number, .. } = &items[index];
            // The inner error says why the picture cannot be used.
            let picture = packed.map_or_else(|| Ok(stored.picture()), |packed| packed[*number].read())?;
            Ok(picture.and_then(write))
        };
        let prepared: Result<Vec<Result<(), String>>> = pool.install(|| {
            pixels.par_chunks_exact_mut(size).zip(indices).map_init(Scaler::default, prepare).collect()
        });
        let mut labels = Vec::with_capacity(indices.len());
        for (position, (&index, prepared)) in indices.iter().zip(prepared?).enumerate() {
            match prepared {
                Ok(()) => {
                    // This closes the gaps of images that are left out.
                    pixels.copy_within(position * size..(position + 1) * size, labels.len() * size);
                    labels.push(u32::from(items[index].label));
                }
                Err(why) => self.skip(split, index, why)?,
            }
        }
        let n = labels.len();
        pixels.truncate(n * size);
        Ok(Batch {
            images: Tensor::from_vec(pixels, (n, side, side, CHANNELS), &Device::Cpu)?,
            labels: Tensor::from_vec(labels, n, &Device::Cpu)?,
        })
    }

    /// Records that an image is left out. Returns an error if too many images are left out.
    fn skip(&self, split: usize, index: usize, why: String) -> Result<()> {
        let Inner { splits, skipped, common: Common { options, .. }, .. } = &*self.0;
        let mut skipped = skipped.lock().unwrap_or_else(PoisonError::into_inner);
        skipped[split].insert(index, why);
        let (bad, images) = (skipped[split].len(), splits[split].len());
        if bad as f64 <= images as f64 * options.bad_percent / 100.0 {
            return Ok(());
        }
        let first = skipped[split].iter().next();
        let first = first.map_or(String::new(), |(&i, why)| format!("{} ({why})", splits[split][i].stored));
        let (split, limit_percent) = (SPLITS[split], options.bad_percent);
        Err(Error::TooManyBad { split, bad, images, limit_percent, first })
    }

    /// Returns the error that a split has no images.
    fn none(&self, split: usize) -> Error {
        Error::Invalid(format!(
            "there are no {} images in {}: expected pictures in {}/CLASS/*",
            SPLITS[split], self.0.source, FOLDERS[split]
        ))
    }
}

impl Dataset for ImageNet {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn source(&self) -> &str {
        &self.0.source
    }

    fn title(&self) -> String {
        let Inner { name, source, common, .. } = &*self.0;
        match common.classes.are_official() {
            true => format!("{name} from {source}"),
            // A user's own pictures are not ImageNet, though they are read as it is.
            false => format!("pictures in {source}"),
        }
    }

    fn prepare(&self, on_event: &mut dyn FnMut(Event)) -> Result<()> {
        let Inner { source, splits, common, .. } = &*self.0;
        let Common { untrained, cache, pool, .. } = common;
        if let Some(split) = splits.iter().position(Vec::is_empty) {
            return Err(self.none(split));
        }
        if let Some(first) = untrained.first() {
            return Err(Error::Invalid(format!(
                "there are no training images of {} in {source}: expected pictures in {}/{first}/*",
                listed(untrained),
                FOLDERS[TRAIN]
            )));
        }
        if let Some(cache) = cache {
            cache.packed(pool, on_event)?;
        }
        Ok(())
    }

    fn classes(&self) -> usize {
        self.0.common.classes.len()
    }

    fn train_images(&self) -> usize {
        self.0.splits[TRAIN].len()
    }

    fn test_images(&self) -> usize {
        self.0.splits[TEST].len()
    }

    fn side(&self) -> (usize, usize) {
        let side = self.0.common.options.side;
        (side, side)
    }

    fn mean(&self) -> [f32; 3] {
        MEAN
    }

    fn std(&self) -> [f32; 3] {
        STD
    }

    fn fingerprint(&self) -> &str {
        &self.0.fingerprint
    }

    fn train_parts(&self, batch: usize, part: Part, epoch: Epoch) -> Batches {
        let Epoch { augmentation: Augmentation { pad, flip }, seed, epoch } = epoch;
        if pad != 0 {
            return Batches::failed(Error::Invalid(format!(
                "augmentation.pad = {pad} is impossible for pictures: expected 0, as they are cropped at random \
                 anyway"
            )));
        }
        let order = order(self.train_images(), seed, epoch);
        if order.is_empty() {
            return Batches::failed(self.none(TRAIN));
        }
        let data = self.clone();
        Batches::start(order.len(), batch, part, move |range| {
            data.assemble(TRAIN, &order[range], |index| Transform::Train { seed, epoch, index, flip })
        })
    }

    fn test_parts(&self, batch: usize, part: Part) -> Batches {
        let order: Vec<usize> = (0..self.test_images()).collect();
        if order.is_empty() {
            return Batches::failed(self.none(TEST));
        }
        let data = self.clone();
        Batches::start(order.len(), batch, part, move |range| {
            data.assemble(TEST, &order[range], |_| Transform::Test)
        })
    }

    fn skipped(&self) -> Vec<Skipped> {
        let Inner { splits, skipped, .. } = &*self.0;
        let skipped = skipped.lock().unwrap_or_else(PoisonError::into_inner);
        let named = |(split, skipped): (usize, &BTreeMap<usize, String>)| -> Vec<Skipped> {
            let item = |(&i, why): (&usize, &String)| Skipped {
                file: splits[split][i].stored.to_string(),
                why: why.clone(),
            };
            skipped.iter().map(item).collect()
        };
        skipped.iter().enumerate().flat_map(named).collect()
    }
}

fn labels_of(items: &[Item]) -> Vec<u16> {
    items.iter().map(|item| item.label).collect()
}

/// Returns the classes of pictures that lie in folders.
///
/// They are the official classes if all folders are official classes. If no folder is, the folders
/// are the classes: in numerical order if their names are 0 to n-1, else sorted by name.
fn classes_of(found: &[Vec<Stored>; 2]) -> Result<Classes> {
    let folders: BTreeSet<&str> = found.iter().flatten().filter_map(Stored::folder).collect();
    let refused = |folder: &str, what: String| {
        let inside = found.iter().flatten().find(|stored| stored.folder() == Some(folder));
        let file = inside.map_or_else(PathBuf::new, |stored| PathBuf::from(stored.to_string()));
        Err(Error::Labels { file, what })
    };
    let official = Classes::official();
    let stray = folders.iter().find(|name| official.number(name).is_none());
    let Some(stray) = stray else { return Ok(official) };
    if folders.iter().any(|name| official.number(name).is_some()) {
        let what = format!(
            "its folder {stray} is none of the official classes, though others are: move it away, or list the \
             classes in {}",
            classes::FILE
        );
        return refused(stray, what);
    }
    let number = |name: &&str| name.parse::<usize>().ok();
    let mut names = Vec::from_iter(&folders);
    if names.iter().all(|name| number(name).is_some()) {
        names.sort_by_key(|name| number(name));
        if let Some((i, name)) = names.iter().enumerate().find(|(i, name)| number(name) != Some(*i)) {
            let what = format!(
                "its folder {name} stands where {i} was expected: if folders are numbers, they must be 0 to {}, or {} \
                 must list the classes",
                names.len() - 1,
                classes::FILE
            );
            return refused(name, what);
        }
    }
    Classes::ordered(names.into_iter().map(|name| name.to_string()).collect())
}

/// Gives every picture the class of its folder, or else the class of its name in `labels`.
///
/// The pictures are sorted by class and name, so that every format gives the same order.
fn label(found: Vec<Stored>, classes: &Classes, labels: Option<&ValidationLabels>) -> Result<Vec<Item>> {
    let mut items = Vec::with_capacity(found.len());
    for stored in found {
        let by_folder = stored.folder().and_then(|folder| classes.number(folder));
        let label = by_folder.or_else(|| labels?.get(stored.file_name()));
        let Some(label) = label else {
            let file = PathBuf::from(stored.to_string());
            let what = match labels {
                Some(labels) => format!("it is in no class's folder, and {} lacks it", labels.file.display()),
                None => "it is in no class's folder; for flat validation images put LOC_val_solution.csv, \
                         or val.txt with lines of `file class`, into the data folder"
                    .into(),
            };
            return Err(Error::Labels { file, what });
        };
        items.push(Item { stored, label, number: 0 });
    }
    items.sort_by(|a, b| (a.label, a.stored.file_name()).cmp(&(b.label, b.stored.file_name())));
    Ok(items)
}

/// Returns the names of the taken classes without training images and of those without test images.
///
/// There are none for a split without any image, which may not be needed, and none if the classes
/// are ImageNet's, of which parts are usual.
fn unused(splits: &[Vec<Item>; 2], classes: &Classes, taken: Option<&[bool]>) -> [Vec<String>; 2] {
    splits.each_ref().map(|items| {
        if items.is_empty() || classes.are_official() {
            return Vec::new();
        }
        let mut unused = taken.map_or_else(|| vec![true; classes.len()], <[bool]>::to_vec);
        items.iter().for_each(|item| unused[usize::from(item.label)] = false);
        let names = (0..unused.len()).filter(|&number| unused[number]);
        names.filter_map(|number| classes.name(number).map(String::from)).collect()
    })
}

/// Names the first classes of some, and says how many more there are.
fn listed(classes: &[String]) -> String {
    const SHOWN: usize = 3;
    let shown = classes[..classes.len().min(SHOWN)].join(", ");
    match classes.len() {
        1 => format!("class {shown}"),
        n if n > SHOWN => format!("classes {shown} and {} more", n - SHOWN),
        _ => format!("classes {shown}"),
    }
}

/// Returns the fingerprint of the data set: [`fingerprint_of`] the pictures and of the options that
/// determine their preparation.
fn fingerprint(options: &Options, splits: &[Vec<Item>; 2]) -> String {
    let Options { side, resize, scale, ratio, cache, .. } = options;
    let shrunk = if cache.is_some() { ", shrunk first" } else { "" };
    fingerprint_of(&format!("imagenet 1: {side} {resize} {scale:?} {ratio:?}{shrunk}"), splits)
}

/// Returns a SHA-256 in lower-case hex digits.
///
/// It covers `preparation`, then for each split the number of pictures (u64), and for each picture
/// its label (u16), its file's length (u64), the length of its name (u64) and its name. Integers
/// are little-endian. The contents are left out, because reading them takes minutes.
fn fingerprint_of(preparation: &str, splits: &[Vec<Item>; 2]) -> String {
    let mut hash = Sha256::new();
    hash.update(preparation);
    for items in splits {
        hash.update((items.len() as u64).to_le_bytes());
        for Item { stored, label, .. } in items {
            let name = stored.file_name();
            hash.update(label.to_le_bytes());
            hash.update(stored.size.to_le_bytes());
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name);
        }
    }
    format!("{:x}", hash.finalize())
}

#[cfg(test)]
mod tests;
