//! LoRA in the released names: `unet.<path>.attn{1,2}.processor.to_{q,k,v,out}_lora.{down,up}.weight`, scale 1.

use candle_core::Tensor;
use diffusion::{Checkpoint, LoraEntry};

use crate::{Error, Result};

/// Takes every LoRA entry out of a checkpoint, sorted by module, each multiplied by `strength`.
pub(crate) fn load(checkpoint: &Checkpoint, strength: f64) -> Result<Vec<LoraEntry>> {
    let mut entries = Vec::new();
    for name in checkpoint.names() {
        let Some(stem) = name.strip_suffix(".down.weight").filter(|stem| stem.starts_with("unet.")) else { continue };
        let Some(module) = module(stem) else {
            let message = format!("tensor `{name}` is not in the released LoRA names");
            return Err(Error::file(checkpoint.path(), message));
        };
        let down = matrix(checkpoint, &name)?;
        let up = matrix(checkpoint, &format!("{stem}.up.weight"))?;
        let (rank, expected) = (up.dim(1)?, down.dim(0)?);
        if rank != expected {
            let message = format!("`{module}`: the LoRA's up factor has rank {rank}, its down factor {expected}");
            return Err(Error::file(checkpoint.path(), message));
        }
        entries.push(LoraEntry { module, down, up, scale: strength });
    }
    Ok(entries)
}

/// `unet.<path>.processor.to_out_lora` to `<path>.to_out.0`, the diffusers path of the weight it changes.
fn module(stem: &str) -> Option<String> {
    let (attention, projection) = stem.strip_prefix("unet.")?.split_once(".processor.")?;
    let projection = match projection.strip_suffix("_lora")? {
        "to_out" => "to_out.0",
        projection @ ("to_q" | "to_k" | "to_v") => projection,
        _ => return None,
    };
    Some(format!("{attention}.{projection}"))
}

fn matrix(checkpoint: &Checkpoint, name: &str) -> Result<Tensor> {
    let root = checkpoint.root();
    match root.shape(name).as_deref() {
        Some(shape @ [rows, columns]) if *rows > 0 && *columns > 0 => Ok(root.tensor(name, shape)?),
        Some(found) => {
            Err(Error::file(checkpoint.path(), format!("tensor `{name}` has shape {found:?}, expected a matrix")))
        }
        None => Err(Error::file(checkpoint.path(), format!("tensor `{name}` is missing"))),
    }
}

/// The entries as the ABI's extension hands them to hosts.
pub(crate) fn for_hosts(entries: &[LoraEntry]) -> Result<host_api::plugin::Lora> {
    let entry = |entry: &LoraEntry| -> Result<host_api::plugin::LoraEntry> {
        let ((rank, in_features), out_features) = (entry.down.dims2()?, entry.up.dim(0)?);
        Ok(host_api::plugin::LoraEntry {
            module: entry.module.clone(),
            rank,
            in_features,
            out_features,
            down: entry.down.flatten_all()?.to_vec1()?,
            up: entry.up.flatten_all()?.to_vec1()?,
            scale: entry.scale,
        })
    };
    Ok(host_api::plugin::Lora::new(entries.iter().map(entry).collect::<Result<_>>()?)?)
}

/// Bytes of the factors, which are held twice: as tensors and as the extension's plain numbers.
pub(crate) fn bytes(entries: &[LoraEntry]) -> u64 {
    entries.iter().map(|entry| 8 * (entry.down.elem_count() + entry.up.elem_count()) as u64).sum()
}
