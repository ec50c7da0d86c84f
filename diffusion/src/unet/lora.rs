//! Low-rank changes of the attention projections: `W + strength * scale * up @ down`, merged once and taken out again by
//! putting the kept originals back, bit for bit.

use std::collections::HashMap;

use candle_core::Tensor;

use super::attention::Attention;
use super::{UNet, Weight, new_revision};
use crate::layers::statistics_dtype;
use crate::lora::LoraEntry;
use crate::{Error, Result};

/// The original weights of the projections that are changed now.
#[derive(Default)]
pub(super) struct Merged {
    originals: HashMap<String, Weight>,
}

impl Merged {
    pub(super) fn bytes(&self) -> u64 {
        let bytes = |Weight { tensor, .. }: &Weight| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
        self.originals.values().map(bytes).sum()
    }
}

impl UNet {
    /// Adds the entries to the projections; several entries for one projection add up. All of them, or none: an unknown
    /// module or an entry that does not fit is an error and changes nothing. Entries for blocks beyond the tap that this
    /// U-Net was loaded to are skipped. Text keys and tapes made before are no longer valid.
    pub fn merge_lora(&mut self, entries: &[LoraEntry], strength: f64) -> Result<()> {
        let (absent, wide) = (self.absent_prefixes(), statistics_dtype(self.dtype));
        let mut changed: HashMap<String, Tensor> = HashMap::new();
        for entry in entries.iter().filter(|entry| !absent.iter().any(|prefix| entry.module.starts_with(prefix))) {
            let current = match changed.get(&entry.module) {
                Some(weight) => weight.clone(),
                None => self.projection_mut(&entry.module)?.to_dtype(wide)?,
            };
            changed.insert(entry.module.clone(), merge(&current, entry, strength)?);
        }
        for weight in changed.values_mut() {
            *weight = weight.to_dtype(self.dtype)?;
        }
        self.revision = new_revision();
        for (module, weight) in changed {
            let revision = self.revision;
            let original = self.set_projection(&module, Weight { tensor: weight, revision })?;
            self.lora.originals.entry(module).or_insert(original);
        }
        Ok(())
    }

    /// Puts every original weight back. Text keys and tapes made before are no longer valid.
    pub fn restore_lora(&mut self) {
        for (module, original) in std::mem::take(&mut self.lora.originals) {
            // Its revision too: to whoever remembers it, the tensor is what it was.
            self.set_projection(&module, original).expect("was found when it was merged");
        }
        self.revision = new_revision();
    }

    /// Path and weight `[out, in]`, as it is now, of every attention projection that is loaded.
    pub fn projections(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.attentions().flat_map(Attention::projections)
    }

    /// Puts a weight in place of another, which it returns.
    fn set_projection(&mut self, module: &str, weight: Weight) -> Result<Weight> {
        *self.projection_mut(module)? = weight.tensor.clone();
        let name = format!("{module}.weight");
        Ok(self.weights.insert(name, weight).expect("every projection was taken from the checkpoint by this name"))
    }

    fn projection_mut(&mut self, module: &str) -> Result<&mut Tensor> {
        let found = self.attentions_mut().find_map(|attention| {
            let name = module.strip_prefix(attention.path.as_str())?.strip_prefix('.')?;
            attention.projection_mut(name)
        });
        found.ok_or_else(|| Error::Input(format!("LoRA: this U-Net has no attention projection `{module}`")))
    }
}

/// In the precision of `weight`, which is rounded to the model's only when every entry is in.
fn merge(weight: &Tensor, entry: &LoraEntry, strength: f64) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    match (entry.down.dims(), entry.up.dims()) {
        ([rank, i], [o, r]) if rank == r && *i == inputs && *o == outputs => {}
        (down, up) => {
            return Err(Error::Input(format!(
                "LoRA `{}`: down {down:?} and up {up:?} do not fit the weight [{outputs}, {inputs}]",
                entry.module
            )));
        }
    }
    let like = |factor: &Tensor| factor.to_device(weight.device())?.to_dtype(weight.dtype());
    Ok((weight + (like(&entry.up)?.matmul(&like(&entry.down)?)? * (strength * entry.scale))?)?)
}
