//! State dicts as `torch.save` writes them: a zip archive of a pickle, `data.pkl`, and the storages
//! that it refers to.
//!
//! Nothing in the pickle is executed ([`pickle`]). Whatever it says, the memory used is at most a
//! small multiple of the file's length plus 320 MiB.

use candle_core::{DType, Device, Tensor};
use pickle::{Pickle, Place};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::io::{Cursor, Read};
use zip::ZipArchive;

/// The keys under which training scripts keep the state dict in their checkpoints, in order of
/// preference.
const STATE_KEYS: [&str; 7] =
    ["state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_ema", "ema"];

/// The largest size of the pickle in bytes. A network of 10,000 tensors needs a tenth of it.
const MOST_PICKLE: u64 = 16 << 20;

/// The numbers of a file's tensors may take this many times as much memory as the file is long,
/// because tensors can share numbers and are widened, ...
const TIMES_FILE: u64 = 8;
/// ... plus this many bytes.
const ANY_CASE: u64 = 64 << 20;

/// The limits of the number of tensors and of their dimensions, because many tensors can share one
/// description.
const MOST_TENSORS: usize = 100_000;
const MOST_DIMENSIONS: usize = 8;

type Result<T> = std::result::Result<T, String>;

/// Reads the tensors of a state dict, alone or in a checkpoint, as float32 on the CPU.
pub(crate) fn read(data: &[u8]) -> Result<BTreeMap<String, Tensor>> {
    let archive = ZipArchive::new(Cursor::new(data)).map_err(|e| format!("is no whole zip archive ({e})"))?;
    let names: Vec<String> = archive.file_names().flatten().map(Cow::into_owned).collect();
    let folders: Vec<&str> = names.iter().filter_map(|name| name.strip_suffix("data.pkl")).collect();
    let [folder] = folders[..] else {
        return Err(format!("has {} files data.pkl: expected the one that torch.save writes", folders.len()));
    };
    let budget = TIMES_FILE * data.len() as u64 + ANY_CASE;
    let mut archive = Archive { archive, folder, budget };
    if names.iter().any(|name| *name == format!("{folder}byteorder"))
        && archive.file("byteorder", 16)? != b"little"
    {
        return Err("has its numbers in the byte order of another kind of machine".into());
    }
    let pickle = archive.file("data.pkl", MOST_PICKLE)?;
    let pickle = pickle::read(&pickle).map_err(|e| format!("has a data.pkl that is {e}"))?;
    let found = state_dict(&pickle)?;
    let mut storages = HashMap::new();
    let mut tensors = BTreeMap::new();
    for (name, source) in found {
        let tensor = archive
            .tensor(&source, &mut storages)
            .map_err(|problem| format!("has a tensor {name} that can't be read: {problem}"))?;
        tensors.insert(name.to_string(), tensor);
    }
    Ok(tensors)
}

/// The description of a tensor.
struct Source<'a> {
    dtype: DType,
    storage: &'a str,
    /// The offset in elements.
    offset: usize,
    sizes: Vec<usize>,
    /// The strides in elements.
    strides: Vec<usize>,
}

/// Returns the tensors under the first key that has any, or else those of the whole pickle.
fn state_dict<'a>(pickle: &Pickle<'a>) -> Result<Vec<(&'a str, Source<'a>)>> {
    let nested = STATE_KEYS.iter().filter_map(|key| pickle.item(pickle.top(), key));
    for place in nested.chain([pickle.top()]) {
        let mut found = Vec::new();
        for &(name, value) in pickle.items(place).unwrap_or_default() {
            if let (Some(name), Some(call)) = (pickle.text(name), rebuilt(pickle, value)) {
                if found.len() == MOST_TENSORS {
                    return Err(format!("has more than {MOST_TENSORS} tensors"));
                }
                found.push((name, source(pickle, call).map_err(|e| format!("has a tensor {name} {e}"))?));
            }
        }
        if !found.is_empty() {
            return Ok(found);
        }
    }
    Err(format!("holds no state dict, neither alone nor under {}", STATE_KEYS.join(", ")))
}

/// Returns the arguments of the call that makes a tensor, if the value is a tensor or a parameter.
fn rebuilt<'p>(pickle: &'p Pickle, value: Place) -> Option<&'p [Place]> {
    let tensor = |value| pickle.call(value, "torch._utils", "_rebuild_tensor_v2");
    let parameter = |value| pickle.call(value, "torch._utils", "_rebuild_parameter")?.first().copied();
    tensor(value).or_else(|| tensor(parameter(value)?))
}

/// Returns the description of a tensor. `call` begins with the storage, the offset, the sizes and
/// the strides; the rest is not used.
fn source<'a>(pickle: &Pickle<'a>, call: &[Place]) -> Result<Source<'a>> {
    let unknown = || "whose description can't be understood".to_string();
    let &[storage, offset, sizes, strides, ..] = call else { return Err(unknown()) };
    let pickle::Value::Persistent(id) = pickle.get(storage) else { return Err(unknown()) };
    let Some(&[_, kind, key, ..]) = pickle.tuple(*id) else { return Err(unknown()) };
    let pickle::Value::Global(_, kind) = pickle.get(kind) else { return Err(unknown()) };
    let dtype = match *kind {
        b"FloatStorage" => DType::F32,
        b"DoubleStorage" => DType::F64,
        b"HalfStorage" => DType::F16,
        b"BFloat16Storage" => DType::BF16,
        b"LongStorage" => DType::I64,
        b"IntStorage" => DType::I32,
        b"ShortStorage" => DType::I16,
        b"ByteStorage" | b"BoolStorage" => DType::U8,
        other => return Err(format!("of numbers that are not supported ({})", other.escape_ascii())),
    };
    let found = || {
        let dimensions = [sizes, strides].map(|place| pickle.tuple(place).map_or(usize::MAX, <[Place]>::len));
        if dimensions[0] != dimensions[1] || dimensions[0] > MOST_DIMENSIONS {
            return None;
        }
        Some(Source {
            dtype,
            storage: pickle.text(key)?,
            offset: pickle.size(offset)?,
            sizes: pickle.sizes(sizes)?,
            strides: pickle.sizes(strides)?,
        })
    };
    found().ok_or_else(unknown)
}

struct Archive<'a> {
    archive: ZipArchive<Cursor<&'a [u8]>>,
    /// The prefix of all file names.
    folder: &'a str,
    /// The number of bytes that may still be allocated.
    budget: u64,
}

impl Archive<'_> {
    /// Reads a whole file of at most `most` bytes. The archive's checksum is verified.
    fn file(&mut self, name: &str, most: u64) -> Result<Vec<u8>> {
        let name = format!("{}{name}", self.folder);
        let fail = |e: &dyn std::fmt::Display| format!("its file {name} can't be read ({e})");
        let file = self.archive.by_name(&name).map_err(|e| fail(&e))?;
        let mut data = Vec::new();
        file.take(most + 1).read_to_end(&mut data).map_err(|e| fail(&e))?;
        if data.len() as u64 > most {
            return Err(format!("its file {name} has more than the {most} bytes that are expected"));
        }
        Ok(data)
    }

    fn spend(&mut self, bytes: Option<u64>) -> Result<()> {
        let left = bytes.and_then(|bytes| self.budget.checked_sub(bytes));
        self.budget = left.ok_or("it takes much more memory than the file is long")?;
        Ok(())
    }

    /// Gathers a tensor's numbers, for any strides, and converts them to float32.
    fn tensor(&mut self, source: &Source, storages: &mut HashMap<String, Vec<u8>>) -> Result<Tensor> {
        if !storages.contains_key(source.storage) {
            let storage = self.file(&format!("data/{}", source.storage), self.budget)?;
            self.spend(Some(storage.len() as u64))?;
            storages.insert(source.storage.to_string(), storage);
        }
        let storage = &storages[source.storage];
        let Source { dtype, offset, ref sizes, ref strides, .. } = *source;
        let width = dtype.size_in_bytes();
        let count = sizes.iter().try_fold(1usize, |count, &size| count.checked_mul(size));
        // The gathered numbers, and the floats that they become.
        let bytes = count.and_then(|count| (count as u64).checked_mul(width as u64 + 4));
        self.spend(bytes)?;
        let count = count.unwrap_or(0);
        let mut gathered = Vec::with_capacity(count * width);
        if count > 0 {
            let last = sizes
                .iter()
                .zip(strides)
                .try_fold(offset, |last, (size, stride)| last.checked_add((size - 1).checked_mul(*stride)?));
            let end = last.and_then(|last| last.checked_add(1)?.checked_mul(width));
            if end.is_none_or(|end| end > storage.len()) {
                return Err(format!("it reaches beyond its storage of {} bytes", storage.len()));
            }
            let mut index = vec![0; sizes.len()];
            for _ in 0..count {
                let place: usize = index.iter().zip(strides).map(|(i, stride)| i * stride).sum();
                gathered.extend_from_slice(&storage[(offset + place) * width..][..width]);
                // Advance to the next element, the last dimension first.
                for (i, &size) in index.iter_mut().zip(sizes).rev() {
                    *i += 1;
                    if *i < size {
                        break;
                    }
                    *i = 0;
                }
            }
        }
        let tensor = Tensor::from_raw_buffer(&gathered, dtype, sizes, &Device::Cpu);
        tensor.and_then(|tensor| tensor.to_dtype(DType::F32)).map_err(|e| e.to_string())
    }
}
