//! The low-rank weights that the plugin brings: those in the adapter's file, or those of other files, stacked.

use candle_core::Device;
use diffusion::LoraEntry;
use diffusion::lora::{LoraFile, stack};
use host_api::plugin::HostHandle;

use crate::config::LoraChoice;
use crate::{Error, Result};

/// Reads every chosen file, multiplies its entries by its strength and by that of the whole, and makes one entry per module of
/// them. What is not applied is told to the host's user.
pub(crate) fn load(choices: &[LoraChoice], device: &Device, host: &HostHandle) -> Result<Vec<(Vec<LoraEntry>, f64)>> {
    let load = |choice: &LoraChoice| -> Result<_> {
        let file = LoraFile::open(&choice.path, device)?;
        warn(&file, host);
        if file.entries.is_empty() {
            return Err(Error::file(&choice.path, "holds no LoRA weights for the U-Net's attention"));
        }
        Ok((file.entries, choice.strength))
    };
    choices.iter().map(load).collect()
}

/// Tells the host's user what of a file is not applied.
pub(crate) fn warn(file: &LoraFile, host: &HostHandle) {
    if let Some(warning) = file.warning() {
        host.log(log::Level::Warn, &warning);
    }
}

/// Several files as one set of entries, all multiplied by `strength`.
pub(crate) fn combine(files: Vec<(Vec<LoraEntry>, f64)>, strength: f64) -> Result<Vec<LoraEntry>> {
    let scaled: Vec<_> = files.into_iter().map(|(entries, own)| (entries, own * strength)).collect();
    Ok(stack(&scaled)?)
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
