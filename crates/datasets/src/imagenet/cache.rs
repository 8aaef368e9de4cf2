//! A cache of decoded and shrunk pictures, stored as raw pixels in a few large files.
//!
//! A pack holds the pixels of [`PER_PACK`] pictures, one after the other. The index next to it has
//! the fingerprint of the original pictures, and the size and the CRC-32 of each picture. The index
//! is sealed and written last, so a pack with an index is complete. If making a cache was
//! interrupted, it resumes at the first incomplete pack.
//!
//! A cache is opened with the data set, which writes nothing, and made when pictures are needed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pictures::{Picture, Scaler};
use rayon::ThreadPool;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use whole_file::seal;

use crate::error::{Error, Result};
use crate::event::Event;
use crate::memory::CHANNELS;

use super::files::decode;
use super::transform::shrink;
use super::{Item, SPLITS};

/// The version of the file format, which each index contains.
const FORMAT: u32 = 1;

/// The number of pictures in a pack. For ImageNet these are 2.6 GB; an interruption loses at most
/// one or two minutes of work.
pub(super) const PER_PACK: usize = 10_000;

/// The number of pictures that are in memory at once while a pack is made.
const AT_ONCE: usize = 256;

/// The contents of a pack's index.
#[derive(Debug, Serialize, Deserialize)]
struct Index {
    format: u32,
    /// The fingerprint of the pictures from which the cache was made.
    source: String,
    /// The pack's length in bytes.
    bytes: u64,
    pictures: Vec<Kept>,
}

/// A picture in an index.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Kept {
    /// The width, the height, and the CRC-32 of the pixels.
    Pixels(u32, u32, u32),
    /// The reason why the picture cannot be used.
    Damaged(String),
}

impl Kept {
    /// Returns the number of bytes of the pixels, or the largest number if a damaged index has more.
    fn size(&self) -> u64 {
        match self {
            Kept::Pixels(width, height, _) => {
                (u64::from(*width) * u64::from(*height)).saturating_mul(CHANNELS as u64)
            }
            Kept::Damaged(_) => 0,
        }
    }
}

/// A picture's position in a cache.
#[derive(Clone, Debug)]
pub(super) struct Packed {
    pack: Arc<Path>,
    offset: u64,
    kept: Kept,
}

impl Packed {
    /// Reads the picture. The inner error says why the original picture cannot be used.
    ///
    /// # Errors
    ///
    /// [`Error::Cache`] if the pack does not hold the bytes that were written, or cannot be read.
    pub fn read(&self) -> Result<Result<Picture, String>> {
        let Packed { pack, offset, kept } = self;
        let (width, height, sum) = match kept {
            Kept::Pixels(width, height, sum) => (*width as usize, *height as usize, *sum),
            Kept::Damaged(why) => {
                let index = pack.with_extension("json");
                return Ok(Err(format!(
                    "{why}; {} keeps this, delete it if the picture is restored",
                    index.display()
                )));
            }
        };
        let mut pixels = vec![0; kept.size() as usize];
        let read = |pixels: &mut [u8]| -> io::Result<()> {
            let mut file = File::open(pack)?;
            file.seek(SeekFrom::Start(*offset))?;
            file.read_exact(pixels)
        };
        read(&mut pixels)
            .map_err(|error| damaged(pack, format!("it can't be read at byte {offset}: {error}")))?;
        let found = sum_of(&pixels);
        if found != sum {
            let what = format!("the picture at byte {offset} has the CRC-32 {found:08x}, expected {sum:08x}");
            return Err(damaged(pack, what));
        }
        Ok(Ok(Picture { width, height, pixels }))
    }
}

fn sum_of(bytes: &[u8]) -> u32 {
    let mut sum = flate2::Crc::new();
    sum.update(bytes);
    sum.sum()
}

fn damaged(file: &Path, what: String) -> Error {
    let remedy = "delete it, and the same command makes that part again";
    Error::Cache { file: file.into(), what, remedy }
}

/// A cache of the pictures of a data set.
pub(super) struct Cache {
    folder: PathBuf,
    /// The length to which the shorter sides are shrunk.
    side: usize,
    /// The number of pictures in a pack.
    per_pack: usize,
    /// The fingerprint of the pictures of all splits.
    source: String,
    pictures: Arc<[Vec<Item>; 2]>,
    /// The position of every picture, once all packs are there.
    packed: OnceLock<Vec<Packed>>,
    /// Is held while packs are made, so that no other thread makes them too.
    making: Mutex<()>,
}

/// The paths and the pictures of a pack.
struct Pack<'a> {
    pack: PathBuf,
    index: PathBuf,
    split: &'static str,
    items: &'a [Item],
    /// The number of the split's pictures in the packs before this one.
    before: usize,
    /// The number of pictures in the split.
    of: usize,
}

impl Cache {
    /// Opens the cache in `folder`, as far as it exists, and writes nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Cache`] if the folder has a damaged cache or one of other pictures.
    pub fn open(
        folder: &Path,
        side: usize,
        per_pack: usize,
        source: String,
        pictures: &Arc<[Vec<Item>; 2]>,
    ) -> Result<Cache> {
        let cache = Cache {
            folder: folder.into(),
            side,
            per_pack,
            source,
            pictures: Arc::clone(pictures),
            packed: OnceLock::new(),
            making: Mutex::default(),
        };
        // Every index is checked, also those after a pack that is missing.
        cache.packs().try_for_each(|pack| cache.index(&pack).map(drop))?;
        Ok(cache)
    }

    /// Returns the positions of the pictures, of all splits one after the other. Makes the packs
    /// that are missing.
    ///
    /// # Errors
    ///
    /// Those of [`Cache::open`], and [`Error::Write`].
    pub fn packed(&self, pool: &ThreadPool, on_event: &mut dyn FnMut(Event)) -> Result<&[Packed]> {
        let _making = match self.packed.get() {
            Some(packed) => return Ok(packed),
            None => self.making.lock().unwrap_or_else(PoisonError::into_inner),
        };
        if let Some(packed) = self.packed.get() {
            return Ok(packed);
        }
        // This removes files of an interrupted run. It fails if the folder does not exist yet.
        whole_file::sweep(&self.folder).ok();
        let mut all = Vec::new();
        for pack in self.packs() {
            let kept = match self.index(&pack)? {
                Some(index) => index.pictures,
                None => self.make(&pack, pool, on_event)?,
            };
            let (file, mut offset): (Arc<Path>, u64) = (pack.pack.into(), 0);
            for kept in kept {
                let size = kept.size();
                all.push(Packed { pack: Arc::clone(&file), offset, kept });
                offset += size;
            }
        }
        Ok(self.packed.get_or_init(|| all))
    }

    fn packs(&self) -> impl Iterator<Item = Pack<'_>> {
        self.pictures.iter().zip(SPLITS).flat_map(move |(items, split)| {
            items.chunks(self.per_pack).enumerate().map(move |(number, part)| {
                let path = |ending: &str| self.folder.join(format!("{split}-{number:05}.{ending}"));
                Pack {
                    pack: path("rgb"),
                    index: path("json"),
                    split,
                    items: part,
                    before: number * self.per_pack,
                    of: items.len(),
                }
            })
        })
    }

    /// Returns the index of a pack; `None` if the pack must still be made.
    fn index(&self, pack: &Pack) -> Result<Option<Index>> {
        Index::read(&pack.index, &pack.pack, &self.source, pack.items.len())
    }

    fn make(&self, pack: &Pack, pool: &ThreadPool, on_event: &mut dyn FnMut(Event)) -> Result<Vec<Kept>> {
        on_event(Event::Shrinking {
            folder: self.folder.display().to_string(),
            split: pack.split.into(),
            done: pack.before,
            total: pack.of,
        });
        let kept = write(&pack.pack, pack.items, self.side, pool)?;
        let bytes = kept.iter().map(Kept::size).sum();
        let index = Index { format: FORMAT, source: self.source.clone(), bytes, pictures: kept.clone() };
        index.write(&pack.index)?;
        Ok(kept)
    }
}

/// Returns whether an error of reading is about the file, which is not a regular one or shorter
/// than it was.
fn is_of_the_file(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
}

/// Decodes and shrinks pictures into a pack, which is written atomically.
fn write(pack: &Path, items: &[Item], side: usize, pool: &ThreadPool) -> Result<Vec<Kept>> {
    let mut all = Vec::with_capacity(items.len());
    whole_file::replace(
        pack,
        |error| Error::write(pack)(error),
        |temporary| {
            let mut file = BufWriter::new(File::create(temporary).map_err(Error::write(pack))?);
            for part in items.chunks(AT_ONCE) {
                let made: Vec<Result<Result<Picture, String>>> = pool.install(|| {
                    let make = |scaler: &mut Scaler, item: &Item| -> Result<Result<Picture, String>> {
                        match item.stored.read() {
                            // A disk or a network that fails says nothing about the picture.
                            Err(error) if !is_of_the_file(&error) => {
                                Err(Error::io(item.stored.to_string())(error))
                            }
                            read => Ok(decode(read).and_then(|picture| shrink(picture, side, scaler))),
                        }
                    };
                    part.par_iter().map_init(Scaler::default, make).collect()
                });
                for made in made {
                    all.push(match made? {
                        Ok(Picture { width, height, pixels }) => {
                            file.write_all(&pixels).map_err(Error::write(pack))?;
                            Kept::Pixels(width as u32, height as u32, sum_of(&pixels))
                        }
                        Err(why) => Kept::Damaged(why),
                    });
                }
            }
            file.flush().map_err(Error::write(pack))
        },
    )?;
    Ok(all)
}

impl Index {
    /// Reads the index of a complete pack; `None` if the pack must still be made.
    fn read(path: &Path, pack: &Path, source: &str, pictures: usize) -> Result<Option<Index>> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(path)(error)),
        };
        let value: Value = serde_json::from_slice(&text)
            .map_err(|error| damaged(path, format!("it is no complete JSON: {error}")))?;
        if !seal::check(&value).map_err(|what| damaged(path, what))? {
            return Err(damaged(path, "it has no seal".into()));
        }
        let index: Index = serde_json::from_value(value)
            .map_err(|error| damaged(path, format!("it is no index of this version ({FORMAT}): {error}")))?;
        if index.format != FORMAT || index.source != source || index.pictures.len() != pictures {
            let Index { format, source: found, pictures: there, .. } = &index;
            return Err(Error::Cache {
                file: path.into(),
                what: format!(
                    "it is of format {format}, of {} pictures and of the fingerprint {found}, expected format {FORMAT}, \
                     {pictures} and {source}: the cache was made from other pictures, or for another `resize`",
                    there.len()
                ),
                remedy: "name another folder for these pictures, or delete that one",
            });
        }
        let pixels = |sum: u64, kept: &Kept| sum.checked_add(kept.size());
        if index.pictures.iter().try_fold(0, pixels) != Some(index.bytes) {
            return Err(damaged(path, format!("its pictures do not have {} bytes together", index.bytes)));
        }
        match fs::metadata(pack) {
            Ok(metadata) if metadata.len() == index.bytes => Ok(Some(index)),
            // Whoever deletes a damaged pack wants it to be made again.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Ok(metadata) => {
                Err(damaged(pack, format!("it has {} bytes, expected {}", metadata.len(), index.bytes)))
            }
            Err(error) => Err(Error::io(pack)(error)),
        }
    }

    fn write(&self, path: &Path) -> Result<()> {
        let mut value = serde_json::to_value(self).expect("numbers and texts");
        value[seal::SEAL] = seal::of(&value).into();
        whole_file::write(path, value.to_string()).map_err(Error::write(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batches::Augmentation;
    use crate::dataset::Dataset;
    use crate::imagenet::tests::{FLIP, WNIDS, collect, jpeg_of, open, png_of, scene, small, write_folders};
    use crate::imagenet::{ImageNet, Options, TRAIN};
    use crate::testing;
    use image::DynamicImage;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    /// Returns a folder of pictures, among them a small, a wide, a high and a damaged one, and
    /// options for a cache of them.
    fn source() -> (tempfile::TempDir, Options) {
        let folder = tempfile::tempdir().unwrap();
        write_folders(folder.path());
        let add = |split: &str, name: &str, contents: &[u8]| {
            testing::write(&folder.path().join(split).join(WNIDS[1]).join(name), contents);
        };
        for split in ["train", "val"] {
            let png = |width, height| png_of(&DynamicImage::ImageRgb8(scene(width, height, 7)));
            add(split, "small.png", &png(18, 30));
            add(split, "wide.png", &png(3000, 30));
            add(split, "high.png", &png(47, 61));
        }
        let whole = jpeg_of(&scene(50, 44, 3));
        add("train", "cut.jpg", &whole[..whole.len() / 2]);
        let cache = Some(folder.path().join("cache"));
        (folder, Options { cache, bad_percent: 30.0, ..small() })
    }

    fn epoch(data: &ImageNet) -> (Vec<u32>, Vec<u32>) {
        collect(data.train_batches(4, FLIP, 1, 0))
    }

    /// Makes the cache; returns the splits that were made.
    fn make(data: &ImageNet) -> Vec<String> {
        let mut made = Vec::new();
        let mut note = |event| match event {
            Event::Shrinking { split, done: 0, .. } => made.push(split),
            other => panic!("{other}"),
        };
        data.prepare(&mut note).unwrap();
        made
    }

    #[test]
    fn a_cache_is_made_when_it_is_needed() {
        let (folder, options) = source();
        let data = open(folder.path(), &options).unwrap();
        let held = data.hold_out(4, 0).unwrap();
        assert!(!folder.path().join("cache").exists(), "loading wrote something");
        assert_eq!(make(&held), SPLITS);
        assert!(make(&data).is_empty());
        assert!(make(&open(folder.path(), &options).unwrap()).is_empty());
    }

    fn refused(folder: &Path, options: &Options) -> String {
        let error = open(folder, options).unwrap_err();
        assert!(matches!(error, Error::Cache { .. }), "{error}");
        error.to_string()
    }

    #[test]
    fn evaluation_sees_the_same_pixels_and_training_others() {
        let (folder, options) = source();
        let folder = folder.path();
        let plain = open(folder, &Options { cache: None, ..options.clone() }).unwrap();
        let expected = (collect(plain.test_batches(4)), epoch(&plain));
        let data = open(folder, &options).unwrap();
        assert_eq!(collect(data.test_batches(4)), expected.0);
        let (labels, pixels) = epoch(&data);
        assert!(labels == expected.1.0 && pixels != expected.1.1);
        assert_eq!((plain.name(), data.name()), ("imagenet_part", "imagenet_part_shrunk"));
        assert!(data.source().contains("; shrunk to 20 in "), "{}", data.source());
        assert_ne!(data.fingerprint(), plain.fingerprint());
        // The same picture is unusable, for the same reason.
        let skipped = |data: &ImageNet| match &data.skipped()[..] {
            [skipped] => (skipped.file.clone(), skipped.why.clone()),
            all => panic!("{all:?}"),
        };
        let [(file, why), (same, again)] = [&plain, &data].map(skipped);
        assert!(file == same && file.ends_with("cut.jpg"), "{file}, {same}");
        assert!(again.starts_with(&why) && again.contains("-00000.json keeps this"), "{why}, {again}");

        // From now on the pictures are not read, even if the options for their preparation change.
        for picture in ["train/n01440764/n01440764_7.JPEG", "val/n01443537/high.png"] {
            let size = fs::metadata(folder.join(picture)).unwrap().len() as usize;
            fs::write(folder.join(picture), vec![0; size]).unwrap();
        }
        let changed = Options { scale: [0.5, 1.0], threads: Some(1), ..options.clone() };
        for options in [&options, &changed] {
            let again = open(folder, options).unwrap();
            assert_eq!(collect(again.test_batches(4)), expected.0);
            assert_eq!(epoch(&again) == (labels.clone(), pixels.clone()), options.scale != changed.scale);
        }
        // A data set with held-out images reads the cache too.
        let held = data.hold_out(4, 0).unwrap();
        assert_eq!(held.name(), "imagenet_holdout_part_shrunk");
        let no_flip = Augmentation { pad: 0, flip: false };
        assert_eq!(
            collect(held.train_batches(4, no_flip, 1, 0)).0.len() + collect(held.test_batches(4)).0.len(),
            9
        );
    }

    #[test]
    fn a_damaged_cache_is_an_error_and_what_is_deleted_is_made_again() {
        let (folder, options) = source();
        let folder = folder.path();
        let expected = epoch(&open(folder, &options).unwrap());
        let [pack, index] =
            ["rgb", "json"].map(|ending| folder.join(format!("cache/training-00000.{ending}")));
        let whole = [&pack, &index].map(|path| fs::read(path).unwrap());

        let mut bytes = whole[0].clone();
        bytes[1234] ^= 1;
        fs::write(&pack, bytes).unwrap();
        let data = open(folder, &options).unwrap();
        let error = data.train_batches(4, FLIP, 1, 0).find_map(Result::err).unwrap().to_string();
        assert!(error.contains("training-00000.rgb") && error.contains("expected"), "{error}");
        assert!(error.ends_with("delete it, and the same command makes that part again"), "{error}");
        let of_pictures = data.skipped().iter().all(|skipped| skipped.file.ends_with("cut.jpg"));
        assert!(of_pictures, "it is no damage of the pictures: {:?}", data.skipped());

        fs::write(&pack, &whole[0][..whole[0].len() - 1]).unwrap();
        assert!(refused(folder, &options).contains("bytes, expected"));
        fs::remove_file(&pack).unwrap();
        assert_eq!(epoch(&open(folder, &options).unwrap()), expected);
        assert_eq!([&pack, &index].map(|path| fs::read(path).unwrap()), whole);

        let text = String::from_utf8(whole[1].clone()).unwrap();
        let other = text.replacen("24,20", "20,24", 1);
        let unsealed = text.replacen("seal", "sale", 1);
        assert!(other != text && unsealed != text, "{text}");
        for (text, expected) in
            [(&text[..99], "no complete JSON"), (&other[..], "seal"), (&unsealed[..], "no seal")]
        {
            fs::write(&index, text).unwrap();
            let error = refused(folder, &options);
            assert!(error.contains("training-00000.json") && error.contains(expected), "{error}");
        }
        fs::remove_file(&index).unwrap();
        assert_eq!(epoch(&open(folder, &options).unwrap()), expected);
        assert_eq!([&pack, &index].map(|path| fs::read(path).unwrap()), whole);
    }

    #[test]
    fn the_cache_of_other_pictures_is_refused() {
        let (folder, options) = source();
        let folder = folder.path();
        make(&open(folder, &options).unwrap());
        let changed = folder.join("val/n01443537/high.png");
        let contents = fs::read(&changed).unwrap();
        let check = || {
            let error = refused(folder, &options);
            assert!(
                error.contains("made from other pictures") && error.contains("another folder"),
                "{error}"
            );
        };
        fs::write(&changed, [&contents[..], &[0]].concat()).unwrap();
        check();
        fs::remove_file(&changed).unwrap();
        check();
        // Whatever is missing, nothing is written beside the index of other pictures.
        let packs = ["rgb", "json"].map(|ending| folder.join(format!("cache/training-00000.{ending}")));
        let kept = packs.each_ref().map(|path| fs::read(path).unwrap());
        packs.iter().for_each(|path| fs::remove_file(path).unwrap());
        check();
        assert_eq!(fs::read_dir(folder.join("cache")).unwrap().count(), 2);
        packs.iter().zip(kept).for_each(|(path, contents)| fs::write(path, contents).unwrap());
        fs::write(&changed, contents).unwrap();
        open(folder, &options).unwrap();
        refused(folder, &Options { resize: 21, ..options.clone() });
        refused(folder, &Options { classes: "2".parse().ok(), ..options });
    }

    /// A process that is killed while it makes the third pack leaves two and an unfinished file.
    #[test]
    fn making_a_cache_is_gone_on_with() {
        let (folder, options) = source();
        let data = open(folder.path(), &Options { cache: None, ..options }).unwrap();
        assert_eq!(data.train_images(), 10);
        let cache = folder.path().join("cache");
        let mut done = Vec::new();
        let mut make = |killed_at: usize| {
            done.clear();
            let made = catch_unwind(AssertUnwindSafe(|| {
                let cache = Cache::open(&cache, 20, 3, "a fingerprint".into(), &data.0.splits).unwrap();
                let mut note = |event| match event {
                    Event::Shrinking { split, done: before, .. } if split == SPLITS[TRAIN] => {
                        done.push(before);
                        assert!(before < killed_at, "killed");
                    }
                    Event::Shrinking { .. } => {}
                    other => panic!("{other}"),
                };
                cache.packed(&data.0.common.pool, &mut note).map(<[Packed]>::to_vec)
            }));
            (made.map(|made| made.unwrap()).ok(), done.clone())
        };
        assert_eq!(make(6).1, [0, 3, 6]);
        fs::write(cache.join(".unfinished-abcdef.rgb"), "half a pack").unwrap();
        let (made, done) = make(99);
        assert_eq!(done, [6, 9]);
        let (again, done) = make(0);
        assert!(done.is_empty());
        let read = |packed: Option<Vec<Packed>>| {
            packed.unwrap().iter().map(|packed| packed.read().unwrap()).collect::<Vec<_>>()
        };
        let (made, again) = (read(made), read(again));
        assert!(made == again && made[..10].iter().filter(|made| made.is_ok()).count() == 9);
        // There are four packs of the one split and two of the other, their indices, no other files.
        assert_eq!((made.len(), fs::read_dir(&cache).unwrap().count()), (16, 12));
    }
}
