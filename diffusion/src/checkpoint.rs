//! Named tensors from a memory-mapped safetensors file, with every name accounted for.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};

use crate::{Error, Result};

/// An open safetensors file. Tensors are converted to one dtype and device as they are taken; [`Checkpoint::finish`]
/// fails when some were never asked for.
pub struct Checkpoint {
    file: MmapedSafetensors,
    path: PathBuf,
    dtype: DType,
    device: Device,
    taken: RefCell<BTreeSet<String>>,
}

impl Checkpoint {
    /// Maps `path`; its tensors (f32, f16, bf16 or f64 in the file) are delivered as `dtype` on `device`.
    pub fn open(path: &Path, dtype: DType, device: &Device) -> Result<Self> {
        std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: mapping is sound as long as nobody truncates or rewrites the file while it is open; a checkpoint in use
        // is read-only by contract (see the crate's documentation), as in every runtime that maps weights.
        let file = unsafe { MmapedSafetensors::new(path) }
            .map_err(|e| Error::file(path, format!("not a readable safetensors file: {e}")))?;
        Ok(Self { file, path: path.to_owned(), dtype, device: device.clone(), taken: RefCell::default() })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The top of the name tree.
    pub fn root(&self) -> Scope<'_> {
        Scope { checkpoint: self, prefix: String::new() }
    }

    /// Marks a tensor as known although no layer reads it (buffers that old files carry, such as `position_ids`).
    pub fn ignore(&self, name: &str) {
        self.taken.borrow_mut().insert(name.to_owned());
    }

    /// The same for every tensor whose name starts with `prefix`.
    pub fn ignore_below(&self, prefix: &str) {
        let names = self.file.tensors().into_iter().map(|(name, _)| name).filter(|name| name.starts_with(prefix));
        self.taken.borrow_mut().extend(names);
    }

    /// Succeeds when every tensor in the file was taken or ignored.
    pub fn finish(self) -> Result<()> {
        let taken = self.taken.into_inner();
        let mut left: Vec<_> = self.file.tensors().into_iter().filter(|(name, _)| !taken.contains(name)).collect();
        left.sort_by(|a, b| a.0.cmp(&b.0));
        match left.first() {
            None => Ok(()),
            Some((name, view)) => Err(Error::UnexpectedTensor {
                path: self.path,
                name: name.clone(),
                found: view.shape().to_vec(),
                count: left.len(),
            }),
        }
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
        self.checkpoint.file.get(&self.full(name)).is_ok()
    }

    /// Takes a tensor of exactly `shape`.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let name = self.full(name);
        let Checkpoint { file, path, dtype, device, taken } = self.checkpoint;
        let Ok(view) = file.get(&name) else {
            return Err(Error::MissingTensor { path: path.clone(), name, expected: shape.to_vec() });
        };
        if view.shape() != shape {
            let found = view.shape().to_vec();
            return Err(Error::TensorShape { path: path.clone(), name, expected: shape.to_vec(), found });
        }
        let tensor = file
            .load(&name, device)
            .and_then(|t| t.to_dtype(*dtype))
            .map_err(|e| Error::file(path, format!("tensor `{name}`: {e}")))?;
        taken.borrow_mut().insert(name);
        Ok(tensor)
    }

    fn full(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }
}
