//! Named tensors from a file, safetensors or PyTorch pickle, with every name accounted for.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use crate::finite::is_finite;
use crate::{Error, Result, pickle};

/// Longest header that is read for its metadata; the limit of the safetensors crate.
const MAX_HEADER: u64 = 100_000_000;

/// The tensors of one file. They are converted to one dtype and device as they are taken; [`Checkpoint::finish`] fails when
/// some were never asked for.
pub struct Checkpoint {
    source: Source,
    /// Where each name is found, in a view of another checkpoint.
    view: Option<BTreeMap<String, Stored>>,
    path: PathBuf,
    dtype: DType,
    device: Device,
    /// Names that a layer has taken, with what it got, or that are known to be of no use.
    taken: RefCell<BTreeMap<String, Option<Tensor>>>,
    taken_bytes: Cell<u64>,
}

#[derive(Clone)]
enum Source {
    Mapped(Arc<MmapedSafetensors>),
    Loaded(Arc<HashMap<String, Tensor>>),
}

/// How a tensor of a view is stored in the file: under another name, as some of the rows, in another shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) name: String,
    /// Start and number of rows, where it is a part.
    pub(crate) rows: Option<(usize, usize)>,
    /// The shape that it is delivered in, of as many values.
    pub(crate) shape: Vec<usize>,
}

impl Checkpoint {
    /// Opens the file `path`, safetensors or a PyTorch pickle, told apart by its first bytes; its tensors (f32, f16, bf16 or
    /// f64 in the file) are delivered as `dtype` on `device`. Fails when it is neither, or not a regular file.
    pub fn open(path: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let mut file = open_regular(path)?;
        let mut magic = [0; 4];
        file.read_exact(&mut magic)
            .map_err(|_| Error::file(path, "not a readable safetensors file or pickle: shorter than any"))?;
        match &magic {
            b"PK\x03\x04" => Ok(Self::from_tensors(path, pickle::read(path)?, dtype, device)),
            [0x80, 0x02, b'\x8a', _] => {
                Err(Error::file(path, "a PyTorch pickle in the format before 1.6; save it again with a current one"))
            }
            _ => Self::map(path, dtype, device),
        }
    }

    fn map(path: &Path, dtype: DType, device: &Device) -> Result<Self> {
        // SAFETY: mapping is sound as long as nobody truncates or rewrites the file while it is open; a checkpoint in use
        // is read-only by contract (see the crate's documentation), as in every runtime that maps weights.
        let file = unsafe { MmapedSafetensors::new(path) }
            .map_err(|e| Error::file(path, format!("not a readable safetensors file: {e}")))?;
        Ok(Self::new(path, Source::Mapped(Arc::new(file)), dtype, device))
    }

    /// Tensors that were read from `path` by other means, under the same rules.
    pub fn from_tensors(path: &Path, tensors: HashMap<String, Tensor>, dtype: DType, device: &Device) -> Self {
        Self::new(path, Source::Loaded(Arc::new(tensors)), dtype, device)
    }

    fn new(path: &Path, source: Source, dtype: DType, device: &Device) -> Self {
        Self {
            source,
            view: None,
            path: path.to_owned(),
            dtype,
            device: device.clone(),
            taken: RefCell::default(),
            taken_bytes: Cell::new(0),
        }
    }

    /// The same file under other names, of which no others are seen.
    pub(crate) fn view(&self, view: BTreeMap<String, Stored>) -> Self {
        let view = Some(view);
        Self { view, ..Self::new(&self.path, self.source.clone(), self.dtype, &self.device) }
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The top of the name tree.
    pub fn root(&self) -> Scope<'_> {
        Scope { checkpoint: self, prefix: String::new() }
    }

    /// All names, sorted.
    pub fn names(&self) -> Vec<String> {
        if let Some(view) = &self.view {
            return view.keys().cloned().collect();
        }
        let mut names: Vec<String> = match &self.source {
            Source::Mapped(file) => file.tensors().into_iter().map(|(name, _)| name).collect(),
            Source::Loaded(tensors) => tensors.keys().cloned().collect(),
        };
        names.sort();
        names
    }

    /// The names that were neither taken nor ignored so far, sorted.
    pub fn unclaimed(&self) -> Vec<String> {
        let taken = self.taken.borrow();
        self.names().into_iter().filter(|name| !taken.contains_key(name)).collect()
    }

    /// The texts in a safetensors header's `__metadata__`; none for a pickle.
    pub fn metadata(&self) -> Result<BTreeMap<String, String>> {
        match self.source {
            Source::Mapped(_) => header_metadata(&self.path),
            Source::Loaded(_) => Ok(BTreeMap::new()),
        }
    }

    /// A tensor as it is stored in the file, by its name there. Panics when the file has none of that name.
    pub fn raw(&self, name: &str) -> Result<RawTensor<'_>> {
        match &self.source {
            Source::Mapped(file) => {
                let view = file.get(name).expect("a name of the file");
                let (dtype, shape) = (view.dtype(), view.shape().to_vec());
                Ok(RawTensor { dtype, shape, data: Cow::Borrowed(view.data()) })
            }
            Source::Loaded(tensors) => RawTensor::of(&tensors[name]),
        }
    }

    /// Marks a tensor as known although no layer reads it (buffers that old files carry, such as `position_ids`).
    pub fn ignore(&self, name: &str) {
        self.taken.borrow_mut().entry(name.to_owned()).or_default();
    }

    /// The same for every tensor whose name starts with `prefix`.
    pub fn ignore_below(&self, prefix: &str) {
        let below = self.names().into_iter().filter(|name| name.starts_with(prefix));
        let mut taken = self.taken.borrow_mut();
        below.for_each(|name| {
            taken.entry(name).or_default();
        });
    }

    /// Succeeds when every tensor in the file was taken or ignored.
    pub fn finish(self) -> Result<()> {
        let left = self.unclaimed();
        match left.first() {
            None => Ok(()),
            Some(name) => Err(Error::UnexpectedTensor {
                path: self.path.clone(),
                name: name.clone(),
                found: self.shape(name).unwrap_or_default(),
                count: left.len(),
            }),
        }
    }

    /// The shape that a tensor is delivered in.
    pub(crate) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        if let Some(view) = &self.view {
            return view.get(name).map(|stored| stored.shape.clone());
        }
        match &self.source {
            Source::Mapped(file) => file.get(name).ok().map(|view| view.shape().to_vec()),
            Source::Loaded(tensors) => tensors.get(name).map(|tensor| tensor.dims().to_vec()),
        }
    }

    /// As delivered. One NaN or infinity among the weights would spoil every picture, so such a tensor is refused.
    fn load(&self, name: &str) -> Result<Tensor> {
        let load = || -> candle_core::Result<(Tensor, bool)> {
            let stored = self.view.as_ref().and_then(|view| view.get(name));
            let stored_name = stored.map_or(name, |stored| &stored.name);
            let mut tensor = match &self.source {
                Source::Mapped(file) => {
                    let tensor = file.load(stored_name, &Device::Cpu)?;
                    let_go(file.get(stored_name)?.data());
                    tensor
                }
                Source::Loaded(tensors) => tensors[stored_name].clone(),
            };
            if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16 | DType::F64) {
                candle_core::bail!("it holds {:?} numbers; expected F32, F16, BF16 or F64", tensor.dtype());
            }
            if let Some(Stored { rows, shape, .. }) = stored {
                if let Some((start, count)) = rows {
                    tensor = tensor.narrow(0, *start, *count)?.contiguous()?;
                }
                tensor = tensor.reshape(&shape[..])?;
            }
            let tensor = tensor.to_dtype(self.dtype)?;
            let finite = is_finite(&tensor)?;
            Ok((tensor.to_device(&self.device)?, finite))
        };
        match load() {
            Ok((tensor, true)) => Ok(tensor),
            Ok((_, false)) => {
                let message = format!("tensor `{name}` holds NaN or infinity as {:?}", self.dtype);
                Err(Error::file(&self.path, message))
            }
            Err(error) => Err(Error::file(&self.path, format!("tensor `{name}`: {error}"))),
        }
    }
}

/// Tells the system that a part of a mapped file, of which there is a copy now, need not stay in memory: or a program that has loaded
/// its weights would seem to hold them twice. It is read again if it is looked at again.
fn let_go(data: &[u8]) {
    #[cfg(target_os = "linux")]
    // SAFETY: whole pages of a mapping of a file, which nothing writes to; the system may drop and read them as it likes.
    unsafe {
        let page = libc::sysconf(libc::_SC_PAGESIZE).max(1) as usize;
        let skipped = data.as_ptr().align_offset(page);
        if let Some(whole) = data.len().checked_sub(skipped).map(|rest| rest / page * page).filter(|whole| *whole > 0) {
            libc::madvise(data.as_ptr().add(skipped).cast_mut().cast(), whole, libc::MADV_DONTNEED);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = data;
}

/// A tensor as it is stored in a file.
#[derive(Clone, Debug)]
pub struct RawTensor<'a> {
    /// The type of its elements.
    pub dtype: safetensors::Dtype,
    /// Its extents.
    pub shape: Vec<usize>,
    /// Row-major, little-endian.
    pub data: Cow<'a, [u8]>,
}

impl RawTensor<'static> {
    /// A copy of a tensor's values.
    pub fn of(tensor: &Tensor) -> Result<Self> {
        let mut data = Vec::new();
        tensor.write_bytes(&mut data)?;
        Ok(Self { dtype: tensor.dtype().into(), shape: tensor.dims().to_vec(), data: Cow::Owned(data) })
    }
}

/// Opens a file that can be mapped: reading from a pipe or a device could wait for ever.
fn open_regular(path: &Path) -> Result<File> {
    let kind = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !kind.is_file() {
        let what = if kind.is_dir() { "a folder" } else { "not a regular file" };
        return Err(Error::file(path, format!("{what}; expected a file of weights")));
    }
    File::open(path).map_err(|e| Error::io(path, e))
}

/// `__metadata__` of a safetensors file, of which no more than the header is read.
fn header_metadata(path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Header {
        #[serde(rename = "__metadata__", default)]
        metadata: BTreeMap<String, String>,
    }
    let mut file = open_regular(path)?;
    let size = file.metadata().map_err(|e| Error::io(path, e))?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|e| Error::io(path, e))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER || length > size - 8 {
        let limit = MAX_HEADER.min(size - 8);
        return Err(Error::file(path, format!("a safetensors header of {length} bytes, over the limit of {limit}")));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(|e| Error::io(path, e))?;
    let header: Header = serde_json::from_slice(&header).map_err(|e| Error::file(path, e))?;
    Ok(header.metadata)
}

/// A place in the checkpoint's name tree, such as `down_blocks.0.resnets.1`.
#[derive(Clone)]
pub struct Scope<'a> {
    checkpoint: &'a Checkpoint,
    prefix: String,
}

impl Scope<'_> {
    /// One or more dotted names further down.
    pub fn enter(&self, name: impl std::fmt::Display) -> Self {
        Self { checkpoint: self.checkpoint, prefix: self.full(&name.to_string()) }
    }

    /// The dotted path of this place; empty at the root.
    pub fn path(&self) -> &str {
        &self.prefix
    }

    /// The dtype that tensors are delivered in.
    pub fn dtype(&self) -> DType {
        self.checkpoint.dtype
    }

    /// The device that tensors are delivered on.
    pub fn device(&self) -> &Device {
        &self.checkpoint.device
    }

    /// Whether the file has a tensor of this name here.
    pub fn contains(&self, name: &str) -> bool {
        self.shape(name).is_some()
    }

    /// The shape of a tensor in the file; `None` when it is not there.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.checkpoint.shape(&self.full(name))
    }

    /// Takes a tensor of exactly `shape`.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let name = self.full(name);
        let path = || self.checkpoint.path.clone();
        let Some(found) = self.checkpoint.shape(&name) else {
            return Err(Error::MissingTensor { path: path(), name, expected: shape.to_vec() });
        };
        if found != shape {
            return Err(Error::TensorShape { path: path(), name, expected: shape.to_vec(), found });
        }
        let tensor = self.checkpoint.load(&name)?;
        self.checkpoint.taken.borrow_mut().insert(name, Some(tensor.clone()));
        let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
        self.checkpoint.taken_bytes.set(self.checkpoint.taken_bytes.get() + bytes as u64);
        Ok(tensor)
    }

    /// Has [`Self::taken`] give the same values where a layer keeps them: what was delivered is let go of.
    #[cfg(feature = "cuda")]
    pub(crate) fn keep_instead(&self, name: &str, tensor: &Tensor) {
        let name = self.full(name);
        let mut taken = self.checkpoint.taken.borrow_mut();
        let kept = taken.get_mut(&name).and_then(Option::as_mut).expect("a tensor that was taken");
        assert_eq!(kept.shape(), tensor.shape(), "`{name}`");
        *kept = tensor.clone();
    }

    /// The tensors taken from the checkpoint so far, as delivered, by their full names. They share the memory of those that
    /// the layers hold.
    pub fn taken(&self) -> BTreeMap<String, Tensor> {
        let taken = self.checkpoint.taken.borrow();
        taken.iter().filter_map(|(name, tensor)| Some((name.clone(), tensor.clone()?))).collect()
    }

    /// Bytes of the tensors taken from the checkpoint so far, as delivered.
    pub fn taken_bytes(&self) -> u64 {
        self.checkpoint.taken_bytes.get()
    }

    fn full(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }
}
