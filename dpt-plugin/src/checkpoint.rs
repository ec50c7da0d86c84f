//! Reading files of adapter and LoRA weights: safetensors or PyTorch pickle, told apart by their first bytes.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use candle_core::{DType, Device};
use diffusion::Checkpoint;
use serde::Deserialize;

use crate::{Adapter, AdapterSizes, Error, Result, SizeHints, pickle};

/// Longest header that is read for its metadata; the limit of the safetensors crate.
const MAX_HEADER: u64 = 100_000_000;

/// Opens a file of weights, to be delivered as f32 on `device`.
pub(crate) fn open(path: &Path, device: &Device) -> Result<Checkpoint> {
    let mut magic = [0; 4];
    let mut file = File::open(path).map_err(|e| Error::NotFound(format!("{}: {e}", path.display())))?;
    file.read_exact(&mut magic).map_err(|_| Error::file(path, "shorter than any file of weights"))?;
    match &magic {
        b"PK\x03\x04" => Ok(Checkpoint::from_tensors(path, pickle::read(path)?, DType::F32, device)),
        [0x80, ..] => {
            Err(Error::file(path, "a PyTorch pickle in the format before 1.6; save it again with a current one"))
        }
        _ => Ok(Checkpoint::open(path, DType::F32, device)?),
    }
}

impl Adapter {
    /// Loads an adapter from a file in the released names, safetensors or PyTorch pickle, onto `device`. LoRA weights that
    /// the file also holds are passed over; other tensors that an adapter does not have are an error.
    pub fn open(path: &Path, hints: SizeHints, device: &Device) -> Result<Self> {
        let checkpoint = open(path, device)?;
        let adapter = load_adapter(&checkpoint, hints)?;
        checkpoint.ignore_below("unet.");
        finish(checkpoint)?;
        Ok(adapter)
    }
}

/// Accounts for every tensor, and refuses NaN and infinity: one such weight would spoil every picture.
pub(crate) fn finish(checkpoint: Checkpoint) -> Result<()> {
    if let Some(name) = checkpoint.first_non_finite()? {
        return Err(Error::file(checkpoint.path(), format!("tensor `{name}` holds NaN or infinity")));
    }
    Ok(checkpoint.finish()?)
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
    let hints = hints.or(header_hints(path)?);
    let sizes = AdapterSizes::infer(&root, hints).map_err(|e| Error::file(path, e))?;
    // The release aligns with RoBERTa tokens through this head; the score does not use it.
    checkpoint.ignore_below("contrastive_align_projection_");
    Adapter::load(&root, sizes)
}

/// What a safetensors header's `dpt` entry says of the sizes; other files say nothing.
fn header_hints(path: &Path) -> Result<SizeHints> {
    #[derive(Deserialize)]
    struct Header {
        #[serde(rename = "__metadata__", default)]
        metadata: std::collections::HashMap<String, String>,
    }
    let mut file = File::open(path).map_err(|e| Error::file(path, e))?;
    let mut length = [0; 8];
    if file.read_exact(&mut length).is_err() || length.starts_with(b"PK\x03\x04") {
        return Ok(SizeHints::default());
    }
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(Error::file(
            path,
            format!("a safetensors header of {length} bytes, over the limit of {MAX_HEADER}"),
        ));
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header).map_err(|e| Error::file(path, e))?;
    let header: Header = serde_json::from_slice(&header).map_err(|e| Error::file(path, e))?;
    match header.metadata.get("dpt") {
        None => Ok(SizeHints::default()),
        Some(text) => {
            serde_json::from_str(text).map_err(|e| Error::file(path, format!("the header's `dpt` entry: {e}")))
        }
    }
}
