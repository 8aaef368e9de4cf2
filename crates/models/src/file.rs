//! Networks as safetensors files. The tensors are stored by name and the structure as JSON in the
//! metadata, so that a pruned or quantized network is read from its file alone.
//!
//! A network that would be larger than [`MAX_FILE_BYTES`] becomes a set of files: the tensors are
//! in parts next to the file, and the file holds the structure and the names and hashes of its
//! parts. A part is named by its hash and written before the file. So the file never names a
//! missing or a wrong part, whenever the writer is killed. Parts that the file no longer names are
//! removed after it is written.

use crate::structure::Structure;
use crate::{Error, Naming, Network, Result, seal};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use whole_file::seal::{SEAL, sha256};

/// The metadata key that holds the [`Structure`].
pub(crate) const STRUCTURE: &str = "network";

/// The metadata key that holds the [`Part`]s, if there are any.
const PARTS: &str = "parts";

/// The largest number of bytes of a file, so that storage that takes only small files can hold
/// checkpoints. A larger single tensor has a part of its own.
pub const MAX_FILE_BYTES: usize = 16 << 20;

/// A file that holds some of the tensors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Part {
    /// The name. The part is in the same folder as the file that names it.
    file: String,
    /// The SHA-256 of the part's bytes, in lower-case hex.
    sha256: String,
}

/// The contents of a file in addition to the network.
#[derive(Debug, Default)]
pub struct Extras {
    /// Free text, by name.
    pub metadata: BTreeMap<String, String>,
    /// Tensors that are not the network's own, such as an optimizer's velocities, by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// Whether the file holds a hash of itself, which reading checks.
    pub sealed: bool,
}

/// A tensor's bytes for safetensors.
struct Bytes {
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl View for Bytes {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }
    fn data_len(&self) -> usize {
        self.data.len()
    }
}

fn bytes(tensor: &Tensor) -> Result<Bytes> {
    let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let data = values.into_iter().flat_map(f32::to_le_bytes).collect();
    Ok(Bytes { shape: tensor.dims().to_vec(), data })
}

fn fail(path: &Path, problem: impl std::fmt::Display) -> Error {
    Error::File { path: path.display().to_string(), problem: problem.to_string() }
}

fn damaged(path: &Path, problem: impl std::fmt::Display) -> Error {
    Error::Damaged { path: path.display().to_string(), problem: problem.to_string() }
}

fn not_whole(path: &Path, problem: impl std::fmt::Display) -> Error {
    damaged(path, format!("is not a whole safetensors file ({problem})"))
}

/// Reads a file that must exist.
fn read(path: &Path) -> Result<Vec<u8>> {
    crate::input::read(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => damaged(path, format!("could not be read: {e}")),
        _ => fail(path, format!("could not be read: {e}")),
    })
}

/// The named tensors and the metadata of a file.
type Contents = (Vec<(String, Bytes)>, BTreeMap<String, String>);

/// Returns an upper bound of the bytes that a tensor takes in a file: its data and its header
/// entry.
fn entry_bytes((name, tensor): &(String, Bytes)) -> usize {
    // The entry has the name, the shape and two offsets. No number is longer than 20 digits.
    tensor.data.len() + 2 * name.len() + 20 * (tensor.shape.len() + 2) + 80
}

/// Splits the tensors, in order, into groups that fit a file of `most` bytes.
fn groups(tensors: Vec<(String, Bytes)>, most: usize) -> Vec<Vec<(String, Bytes)>> {
    let mut groups: Vec<Vec<(String, Bytes)>> = Vec::new();
    let mut size = usize::MAX;
    for tensor in tensors {
        let entry = entry_bytes(&tensor);
        if size.saturating_add(entry) > most {
            groups.push(Vec::new());
            size = 0;
        }
        size += entry;
        groups.last_mut().expect("just pushed").push(tensor);
    }
    groups
}

/// Returns the prefix of the names of a file's parts: `checkpoint.part-` for
/// `checkpoint.safetensors`.
fn part_prefix(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    format!("{stem}.part-")
}

/// Returns the bytes of a safetensors file, with the metadata in the order of their keys.
///
/// The library takes them in an order that is another one in each process, which would give the
/// same network other hashes.
fn serialize(
    tensors: Vec<(String, Bytes)>,
    metadata: BTreeMap<String, String>,
) -> std::result::Result<Vec<u8>, Box<dyn std::error::Error>> {
    /// What comes before the metadata: the header's length and its first key.
    const BEFORE: usize = size_of::<u64>() + "{\"__metadata__\":".len();
    let sorted = serde_json::to_vec(&metadata)?;
    let unsorted: HashMap<String, String> = metadata.into_iter().collect();
    let written = serde_json::to_vec(&unsorted)?;
    let mut data = safetensors::serialize(tensors, Some(unsorted))?;
    match data.get_mut(BEFORE..BEFORE + written.len()) {
        Some(place) if *place == *written => place.copy_from_slice(&sorted),
        _ => return Err("its metadata are not where they were expected".into()),
    }
    Ok(data)
}

/// Writes tensors to a part of `path`.
fn write_part(path: &Path, tensors: Vec<(String, Bytes)>) -> Result<Part> {
    let data = safetensors::serialize(tensors, None).map_err(|e| fail(path, e))?;
    let sha256 = sha256(&data);
    let file = format!("{}{}.safetensors", part_prefix(path), &sha256[..16]);
    let place = path.with_file_name(&file);
    whole_file::write(&place, data).map_err(|e| fail(&place, format!("could not be written: {e}")))?;
    Ok(Part { file, sha256 })
}

/// Returns the path of a part of `path`, and its bytes, whose hash is checked.
fn read_part(path: &Path, part: &Part) -> Result<(PathBuf, Vec<u8>)> {
    // A name with a folder in it could lead outside of this folder.
    if Path::new(&part.file).file_name() != Some(part.file.as_ref()) {
        return Err(fail(
            path,
            format!("names {:?} as a part: expected the name of a file beside it", part.file),
        ));
    }
    let place = path.with_file_name(&part.file);
    let advice = format!("it is a part of {}, and the files of a set are copied together", path.display());
    let data = read(&place).map_err(|error| match error {
        Error::Damaged { path, problem } => Error::Damaged { path, problem: format!("{problem}; {advice}") },
        other => other,
    })?;
    let found = sha256(&data);
    if found != part.sha256 {
        return Err(damaged(&place, format!("has SHA-256 {found}, expected {}; {advice}", part.sha256)));
    }
    Ok((place, data))
}

/// Returns the parts that a file names, if it is a network's file.
fn named_parts(path: &Path) -> Option<Vec<Part>> {
    /// The limit of safetensors.
    const LONGEST_HEADER: u64 = 100_000_000;
    if !path.is_file() {
        return None; // Opening a pipe would wait for a writer.
    }
    let mut file = File::open(path).ok()?;
    let mut header = vec![0; 8];
    file.read_exact(&mut header).ok()?;
    let length = u64::from_le_bytes(*header.first_chunk()?);
    file.take(length.min(LONGEST_HEADER)).read_to_end(&mut header).ok()?;
    let (_, header) = SafeTensors::read_metadata(&header).ok()?;
    serde_json::from_str(header.metadata().as_ref()?.get(PARTS)?).ok()
}

/// Returns every part of `path` in its folder, whether `path` names it or not.
///
/// Parts that another file in the folder names are left out, so that a renamed file keeps its
/// parts.
fn parts_beside(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
    let prefix = part_prefix(path);
    let is_part = |name: &str| {
        let hash = name.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(".safetensors"));
        hash.is_some_and(|hash| hash.len() == 16 && hash.bytes().all(|c| c.is_ascii_hexdigit()))
    };
    let (mut parts, mut of_others) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if is_part(&entry.file_name().to_string_lossy()) {
            parts.push(entry.path());
        } else if path.file_name() != Some(&entry.file_name())
            && entry.path().extension().is_some_and(|extension| extension == "safetensors")
        {
            of_others.extend(named_parts(&entry.path()).unwrap_or_default());
        }
    }
    parts.retain(|part| !of_others.iter().any(|named| part.ends_with(&named.file)));
    Ok(parts)
}

/// Adds the tensors of a file's bytes to `tensors`.
fn read_tensors(
    path: &Path,
    data: &[u8],
    device: &Device,
    tensors: &mut BTreeMap<String, Tensor>,
) -> Result<()> {
    let file = SafeTensors::deserialize(data).map_err(|e| not_whole(path, e))?;
    for (name, view) in file.tensors() {
        if view.dtype() != Dtype::F32 {
            return Err(fail(path, format!("tensor {name} is {:?}, expected F32", view.dtype())));
        }
        let (chunks, _) = view.data().as_chunks::<4>();
        let values: Vec<f32> = chunks.iter().map(|b| f32::from_le_bytes(*b)).collect();
        tensors.insert(name, Tensor::from_vec(values, view.shape(), device)?);
    }
    Ok(())
}

impl Network {
    /// Writes the network and `extras` to `path`, completely or not at all.
    ///
    /// If the file would be larger than [`MAX_FILE_BYTES`], the tensors go to parts in the same
    /// folder. Returns the SHA-256 of each file by its name.
    pub fn save(&self, path: &Path, extras: &Extras) -> Result<BTreeMap<String, String>> {
        self.save_in_parts(path, extras, MAX_FILE_BYTES)
    }

    /// Writes the network and `extras` to one file of any size, completely or not at all, so that
    /// it can be copied alone.
    pub fn save_in_one_file(&self, path: &Path, extras: &Extras) -> Result<()> {
        self.save_in_parts(path, extras, usize::MAX).map(drop)
    }

    /// Returns the bytes of one file that holds the network and `extras`, without a seal.
    pub fn to_bytes(&self, extras: &Extras) -> Result<Vec<u8>> {
        let (tensors, metadata) = self.contents(extras)?;
        serialize(tensors, metadata).map_err(|e| fail(Path::new(&self.name), e))
    }

    /// Returns the named tensors and the metadata of a file, without a seal.
    fn contents(&self, extras: &Extras) -> Result<Contents> {
        let own = self.tensors().into_iter();
        let extra = extras.tensors.iter().map(|(name, tensor)| (name.clone(), tensor));
        let tensors = own.chain(extra).map(|(name, tensor)| Ok((name, bytes(tensor)?)));
        let structure = serde_json::to_string(&Structure::of(self));
        let mut metadata = extras.metadata.clone();
        metadata.insert(STRUCTURE.into(), structure.map_err(|e| fail(Path::new(&self.name), e))?);
        Ok((tensors.collect::<Result<_>>()?, metadata))
    }

    /// Returns the SHA-256, in lower-case hex, of the file that holds only the network.
    pub fn sha256(&self) -> Result<String> {
        Ok(sha256(self.to_bytes(&Extras::default())?))
    }

    /// Writes the network and `extras` to files of at most `most` bytes each.
    fn save_in_parts(&self, path: &Path, extras: &Extras, most: usize) -> Result<BTreeMap<String, String>> {
        let (mut tensors, mut metadata) = self.contents(extras)?;
        if extras.sealed {
            metadata.insert(SEAL.into(), seal::BLANK.into());
        }
        let heading: usize = metadata.iter().map(|(key, value)| key.len() + 2 * value.len()).sum();
        let mut parts = Vec::new();
        if heading + tensors.iter().map(entry_bytes).sum::<usize>() > most {
            for group in groups(std::mem::take(&mut tensors), most) {
                parts.push(write_part(path, group)?);
            }
            metadata.insert(PARTS.into(), serde_json::to_string(&parts).map_err(|e| fail(path, e))?);
        }
        let mut data = serialize(tensors, metadata).map_err(|e| fail(path, e))?;
        if extras.sealed {
            seal::close(&mut data);
        }
        let mut hashes: BTreeMap<String, String> =
            parts.iter().map(|part| (part.file.clone(), part.sha256.clone())).collect();
        hashes.insert(path.file_name().unwrap_or_default().to_string_lossy().into(), sha256(&data));
        whole_file::write(path, data).map_err(|e| fail(path, format!("could not be written: {e}")))?;
        // Nothing reads the parts of an earlier set, so it is no error if they can't be removed.
        for part in parts_beside(path).unwrap_or_default() {
            if !parts.iter().any(|kept| part.ends_with(&kept.file)) {
                std::fs::remove_file(part).ok();
            }
        }
        Ok(hashes)
    }

    /// Writes [`Network::state_dict`] to a safetensors file, completely or not at all, and returns
    /// the naming of the tensors.
    ///
    /// # Errors
    /// Those of [`Network::state_dict`], and an error if the file can't be written.
    pub fn save_state_dict(&self, path: &Path) -> Result<Naming> {
        let (naming, tensors) = self.state_dict()?;
        let tensors: Vec<(String, Bytes)> =
            tensors.iter().map(|(name, tensor)| Ok((name.clone(), bytes(tensor)?))).collect::<Result<_>>()?;
        // PyTorch's libraries write this entry and refuse files without it.
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let data = serialize(tensors, metadata).map_err(|e| fail(path, e))?;
        whole_file::write(path, data).map_err(|e| fail(path, format!("could not be written: {e}")))?;
        Ok(naming)
    }

    /// Removes the file that [`Network::save`] wrote to `path`, and its parts. Does nothing if
    /// there is no file.
    ///
    /// # Errors
    /// If a file can't be removed.
    pub fn remove(path: &Path) -> Result<()> {
        let missing_is_well = |removed: std::io::Result<()>| match removed {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(fail(path, format!("could not be removed: {e}")))
            }
            _ => Ok(()),
        };
        // The file goes first, because it is what names the parts.
        missing_is_well(std::fs::remove_file(path))?;
        for part in parts_beside(path).unwrap_or_default() {
            missing_is_well(std::fs::remove_file(part))?;
        }
        Ok(())
    }

    /// Reads a network that [`Network::save`] wrote, to any device, whatever device it was on
    /// before.
    ///
    /// # Errors
    /// If the file or one of its parts is missing, cut short, does not match its hash, is not a
    /// network file, or lacks a tensor.
    pub fn load(path: &Path, device: &Device) -> Result<(Self, Extras)> {
        Self::from_bytes(path, &read(path)?, device)
    }

    /// Reads the file with this SHA-256, which [`Network::save`] returned, like [`Network::load`].
    ///
    /// # Errors
    /// Those of [`Network::load`], and an error if the file has another hash.
    pub fn load_verified(path: &Path, expected: &str, device: &Device) -> Result<(Self, Extras)> {
        let data = read(path)?;
        let found = sha256(&data);
        if found != expected {
            return Err(damaged(path, format!("has SHA-256 {found}, expected {expected}")));
        }
        Self::from_bytes(path, &data, device)
    }

    /// Reads the bytes of a file, or of [`Network::to_bytes`].
    ///
    /// `path` names them in errors, and its folder holds the file's parts.
    ///
    /// # Errors
    /// Those of [`Network::load`].
    pub fn from_bytes(path: &Path, data: &[u8], device: &Device) -> Result<(Self, Extras)> {
        let (_, header) = SafeTensors::read_metadata(data).map_err(|e| not_whole(path, e))?;
        let mut metadata: BTreeMap<String, String> =
            header.metadata().clone().unwrap_or_default().into_iter().collect();
        let seal = metadata.remove(SEAL);
        if seal.as_ref().is_some_and(|seal| !seal::holds(data, seal)) {
            return Err(damaged(path, "its content is not what its seal says"));
        }
        let structure = metadata.remove(STRUCTURE).ok_or_else(|| {
            damaged(
                path,
                format!("has no `{STRUCTURE}` in its metadata: expected a file that this project wrote"),
            )
        })?;
        let structure: Structure = serde_json::from_str(&structure)
            .map_err(|e| fail(path, format!("its `{STRUCTURE}` metadata can't be understood: {e}")))?;

        let mut tensors = BTreeMap::new();
        read_tensors(path, data, device, &mut tensors)?;
        if let Some(parts) = metadata.remove(PARTS) {
            let parts: Vec<Part> = serde_json::from_str(&parts)
                .map_err(|e| fail(path, format!("its `{PARTS}` metadata can't be understood: {e}")))?;
            for part in &parts {
                let (path, data) = read_part(path, part)?;
                read_tensors(&path, &data, device, &mut tensors)?;
            }
        }
        let mut network = structure
            .skeleton()
            .map_err(|problem| fail(path, format!("its `{STRUCTURE}` metadata is no network: {problem}")))?;
        for (name, _, tensor) in network.slots_mut() {
            let missing = || fail(path, format!("tensor {name} is missing; was the file edited?"));
            *tensor = tensors.remove(&name).ok_or_else(missing)?;
        }
        network.validate()?;
        network.check_values().map_err(|e| fail(path, e.to_string()))?;
        Ok((network, Extras { metadata, tensors, sealed: seal.is_some() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Input, MobileNet, Version};

    /// Returns a network whose largest tensors are the last convolution's, 104 × 104 floats, and
    /// the classifier's, 104 × 100.
    fn network(seed: u64) -> Network {
        let config = MobileNet { width: 0.1, ..MobileNet::new(Version::V1, Input::Cifar, 100) };
        config.init(seed, &Device::Cpu).unwrap()
    }

    /// Returns a tensor in addition to the network's, and a line of text.
    fn extras() -> Extras {
        let tensor = Tensor::arange(0f32, 5000.0, &Device::Cpu).unwrap();
        Extras {
            metadata: BTreeMap::from([("text".into(), "a \"word\"".into())]),
            tensors: BTreeMap::from([("velocity".into(), tensor)]),
            sealed: false,
        }
    }

    fn bits(network: &Network) -> Vec<(String, Vec<u32>)> {
        let of = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let bits = |tensor: &Tensor| of(tensor).into_iter().map(f32::to_bits).collect();
        network.tensors().into_iter().map(|(name, tensor)| (name, bits(tensor))).collect()
    }

    /// Returns the names and sizes of a folder's files.
    fn files(folder: &Path) -> BTreeMap<String, u64> {
        let of = |entry: std::io::Result<std::fs::DirEntry>| {
            let entry = entry.unwrap();
            (entry.file_name().to_string_lossy().into_owned(), entry.metadata().unwrap().len())
        };
        std::fs::read_dir(folder).unwrap().map(of).collect()
    }

    #[track_caller]
    fn check_read(path: &Path, expected: &Network) {
        let (network, mut found) = Network::load(path, &Device::Cpu).unwrap();
        assert!(bits(&network) == bits(expected), "other tensors were read than written");
        let expected = extras();
        let velocity = found.tensors.remove("velocity").unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(velocity, expected.tensors["velocity"].to_vec1::<f32>().unwrap());
        assert!(found.tensors.is_empty());
        assert_eq!(found.metadata, expected.metadata);
    }

    #[test]
    fn a_file_has_the_same_bytes_whenever_it_is_written() {
        let entries =
            ["one", "two", "three", "four", "five"].map(|key| (key.into(), format!("{key}: \"ε\"")));
        let extras = Extras { metadata: entries.into(), ..extras() };
        let network = network(1);
        let first = network.to_bytes(&extras).unwrap();
        for _ in 0..10 {
            assert!(network.to_bytes(&extras).unwrap() == first, "the same network has other bytes");
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("network.safetensors");
        std::fs::write(&path, first).unwrap();
        assert_eq!(Network::load(&path, &Device::Cpu).unwrap().1.metadata, extras.metadata);
    }

    #[test]
    fn parts_are_small_and_read_as_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoint.safetensors");
        let (first, second) = (network(1), network(2));
        first.save(&path, &extras()).unwrap();
        assert_eq!(files(folder.path()).len(), 1, "what fits is one file");
        check_read(&path, &first);

        let most = 50_000;
        first.save_in_parts(&path, &extras(), most).unwrap();
        let of_first = files(folder.path());
        assert!(of_first.len() > 3, "{of_first:?}");
        assert!(of_first.values().all(|&bytes| bytes <= most as u64), "{of_first:?}");
        check_read(&path, &first);

        // The same tensors make the same parts.
        let again = tempfile::tempdir().unwrap();
        first.save_in_parts(&again.path().join("checkpoint.safetensors"), &extras(), most).unwrap();
        assert!(files(again.path()).keys().eq(of_first.keys()));

        // Another network replaces the parts, and an unrelated file stays.
        let other = folder.path().join("checkpoint.part-notes.safetensors");
        std::fs::write(&other, "notes").unwrap();
        second.save_in_parts(&path, &extras(), most).unwrap();
        check_read(&path, &second);
        assert_eq!(files(folder.path()).len(), of_first.len() + 1, "parts of the first network were left");
        second.save(&path, &extras()).unwrap();
        assert_eq!(files(folder.path()).len(), 2);
        check_read(&path, &second);

        second.save_in_parts(&path, &extras(), most).unwrap();
        Network::remove(&path).unwrap();
        Network::remove(&path).unwrap();
        assert!(files(folder.path()).keys().eq(["checkpoint.part-notes.safetensors"]));
    }

    /// A renamed file still names its parts, and a new file with its old name leaves them alone.
    #[test]
    fn parts_of_a_renamed_file_stay() {
        let folder = tempfile::tempdir().unwrap();
        let [path, before] = ["net", "before"].map(|name| folder.path().join(format!("{name}.safetensors")));
        let (first, second) = (network(1), network(2));
        first.save_in_parts(&path, &extras(), 50_000).unwrap();
        std::fs::rename(&path, &before).unwrap();
        second.save_in_one_file(&path, &extras()).unwrap();
        check_read(&before, &first);
        second.save_in_parts(&path, &extras(), 50_000).unwrap();
        check_read(&before, &first);
        check_read(&path, &second);
        Network::remove(&path).unwrap();
        check_read(&before, &first);
        // They are removed once no file names them.
        std::fs::remove_file(&before).unwrap();
        second.save(&path, &extras()).unwrap();
        assert_eq!(files(folder.path()).len(), 1);
    }

    /// A tensor that is too large for a part has a part of its own.
    #[test]
    fn a_large_tensor_is_a_part() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoint.safetensors");
        network(1).save_in_parts(&path, &extras(), 42_800).unwrap();
        let large = files(folder.path()).values().filter(|&&bytes| bytes > 42_800).count();
        assert_eq!(large, 1, "{:?}", files(folder.path()));
        check_read(&path, &network(1));
    }

    /// A killed writer leaves the old set or the new one.
    #[test]
    fn a_set_is_replaced_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoint.safetensors");
        let (first, second) = (network(1), network(2));
        first.save_in_parts(&path, &extras(), 40_000).unwrap();
        let old = std::fs::read(&path).unwrap();
        // The state after the parts are written and before the file is: the old parts must still be
        // there.
        let aside = tempfile::tempdir().unwrap();
        second.save_in_parts(&aside.path().join("checkpoint.safetensors"), &extras(), 40_000).unwrap();
        for name in files(aside.path()).keys().filter(|name| *name != "checkpoint.safetensors") {
            std::fs::copy(aside.path().join(name), folder.path().join(name)).unwrap();
        }
        assert_eq!(std::fs::read(&path).unwrap(), old);
        check_read(&path, &first);
    }

    #[test]
    fn missing_and_damaged_parts_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoint.safetensors");
        network(1).save_in_parts(&path, &extras(), 40_000).unwrap();
        let name = files(folder.path()).into_keys().find(|name| name.contains(".part-")).unwrap();
        let part = folder.path().join(&name);
        let whole = std::fs::read(&part).unwrap();
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for damaged in [None, Some(&flipped[..]), Some(&whole[..100]), Some(&[])] {
            match damaged {
                Some(bytes) => std::fs::write(&part, bytes).unwrap(),
                None => std::fs::remove_file(&part).unwrap(),
            }
            let message = Network::load(&path, &Device::Cpu).unwrap_err().to_string();
            assert!(message.contains(&name) && message.contains("a part of"), "{message}");
        }
        std::fs::write(&part, whole).unwrap();
        check_read(&path, &network(1));
    }
}
