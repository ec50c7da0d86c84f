//! Reading adapters from files in the released names.

use std::path::Path;

use candle_core::{DType, Device};
use diffusion::Checkpoint;

use crate::{Adapter, AdapterSizes, Error, Result, SizeHints};

/// Opens a file of weights, safetensors or PyTorch pickle, to be delivered as f32 on `device`.
pub(crate) fn open(path: &Path, device: &Device) -> Result<Checkpoint> {
    Ok(Checkpoint::open(path, DType::F32, device)?)
}

impl Adapter {
    /// Loads an adapter from a file in the released names, safetensors or PyTorch pickle, onto `device`. LoRA weights that
    /// the file also holds are passed over; other tensors that an adapter does not have are an error.
    pub fn open(path: &Path, hints: SizeHints, device: &Device) -> Result<Self> {
        let checkpoint = open(path, device)?;
        let adapter = load_adapter(&checkpoint, hints)?;
        checkpoint.ignore_below("unet.");
        checkpoint.finish()?;
        Ok(adapter)
    }
}

/// Takes the adapter out of a checkpoint. LoRA tensors stay; what remains besides them can be found by
/// [`Checkpoint::finish`].
pub(crate) fn load_adapter(checkpoint: &Checkpoint, hints: SizeHints) -> Result<Adapter> {
    let root = checkpoint.root();
    let path = checkpoint.path();
    if !root.contains("query_embed.weight") {
        let message = "no `query_embed.weight` in it: this is not a DPT adapter in the released names";
        return Err(Error::file(path, message));
    }
    let hints = hints.or(SizeHints::of_header(checkpoint)?);
    let sizes = AdapterSizes::infer(&root, hints).map_err(|e| Error::file(path, e))?;
    // The release aligns with RoBERTa tokens through this head; the score does not use it.
    checkpoint.ignore_below("contrastive_align_projection_");
    Adapter::load(&root, sizes)
}

impl SizeHints {
    /// What a safetensors header's `dpt` entry says of the sizes; other files say nothing.
    pub fn of_header(checkpoint: &Checkpoint) -> Result<Self> {
        match checkpoint.metadata()?.get("dpt") {
            None => Ok(Self::default()),
            Some(text) => serde_json::from_str(text)
                .map_err(|e| Error::file(checkpoint.path(), format!("the header's `dpt` entry: {e}"))),
        }
    }
}
