//! Named tensors from a file, with every name accounted for.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};

use crate::{Error, Result};

/// The tensors of one file. They are converted to one dtype and device as they are taken; [`Checkpoint::finish`] fails when
/// some were never asked for.
pub struct Checkpoint {
    source: Source,
    path: PathBuf,
    dtype: DType,
    device: Device,
    taken: RefCell<BTreeSet<String>>,
    taken_bytes: Cell<u64>,
}

enum Source {
    Mapped(MmapedSafetensors),
    Loaded(HashMap<String, Tensor>),
}

impl Checkpoint {
    /// Maps the safetensors file `path`; its tensors (f32, f16, bf16 or f64 in the file) are delivered as `dtype` on
    /// `device`.
    pub fn open(path: &Path, dtype: DType, device: &Device) -> Result<Self> {
        std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: mapping is sound as long as nobody truncates or rewrites the file while it is open; a checkpoint in use
        // is read-only by contract (see the crate's documentation), as in every runtime that maps weights.
        let file = unsafe { MmapedSafetensors::new(path) }
            .map_err(|e| Error::file(path, format!("not a readable safetensors file: {e}")))?;
        Ok(Self::new(path, Source::Mapped(file), dtype, device))
    }

    /// Tensors that were read from `path` by other means, under the same rules.
    pub fn from_tensors(path: &Path, tensors: HashMap<String, Tensor>, dtype: DType, device: &Device) -> Self {
        Self::new(path, Source::Loaded(tensors), dtype, device)
    }

    fn new(path: &Path, source: Source, dtype: DType, device: &Device) -> Self {
        Self {
            source,
            path: path.to_owned(),
            dtype,
            device: device.clone(),
            taken: RefCell::default(),
            taken_bytes: Cell::new(0),
        }
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
        let mut names: Vec<String> = match &self.source {
            Source::Mapped(file) => file.tensors().into_iter().map(|(name, _)| name).collect(),
            Source::Loaded(tensors) => tensors.keys().cloned().collect(),
        };
        names.sort();
        names
    }

    /// The first tensor by name that holds NaN or infinity as delivered.
    pub fn first_non_finite(&self) -> Result<Option<String>> {
        for name in self.names() {
            let failed = |e| Error::file(&self.path, format!("tensor `{name}`: {e}"));
            // 0 when every value is finite, NaN otherwise.
            let zero = self.load(&name).and_then(|t| (t * 0.)?.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>());
            if zero.map_err(failed)?.is_nan() {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// Marks a tensor as known although no layer reads it (buffers that old files carry, such as `position_ids`).
    pub fn ignore(&self, name: &str) {
        self.taken.borrow_mut().insert(name.to_owned());
    }

    /// The same for every tensor whose name starts with `prefix`.
    pub fn ignore_below(&self, prefix: &str) {
        self.taken.borrow_mut().extend(self.names().into_iter().filter(|name| name.starts_with(prefix)));
    }

    /// Succeeds when every tensor in the file was taken or ignored.
    pub fn finish(self) -> Result<()> {
        let names = self.names();
        let taken = self.taken.borrow();
        let left: Vec<_> = names.into_iter().filter(|name| !taken.contains(name)).collect();
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

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match &self.source {
            Source::Mapped(file) => file.get(name).ok().map(|view| view.shape().to_vec()),
            Source::Loaded(tensors) => tensors.get(name).map(|tensor| tensor.dims().to_vec()),
        }
    }

    fn load(&self, name: &str) -> candle_core::Result<Tensor> {
        match &self.source {
            Source::Mapped(file) => file.load(name, &self.device)?,
            Source::Loaded(tensors) => tensors[name].to_device(&self.device)?,
        }
        .to_dtype(self.dtype)
    }
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
        let tensor = self.checkpoint.load(&name).map_err(|e| Error::file(path(), format!("tensor `{name}`: {e}")))?;
        self.checkpoint.taken.borrow_mut().insert(name);
        let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
        self.checkpoint.taken_bytes.set(self.checkpoint.taken_bytes.get() + bytes as u64);
        Ok(tensor)
    }

    /// Bytes of the tensors taken from the checkpoint so far, as delivered.
    pub fn taken_bytes(&self) -> u64 {
        self.checkpoint.taken_bytes.get()
    }

    fn full(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }
}
