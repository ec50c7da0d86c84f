//! Low-rank weights that belong to the plugin.

use crate::abi;
use crate::error::{Error, Result, Status};
use crate::view::ViewMut;

/// Names in a LoRA file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LoraLayout {
    /// `unet.<module>.lora_A.weight`, `lora_B.weight`; alpha in the header's `lora_adapter_metadata`.
    Peft,
    /// `lora_unet_<module with _ for .>.lora_down.weight`, `lora_up.weight`, `alpha`.
    Kohya,
}

impl LoraLayout {
    /// The code of the interface.
    pub fn code(self) -> i32 {
        match self {
            Self::Peft => abi::SH_LORA_PEFT,
            Self::Kohya => abi::SH_LORA_KOHYA,
        }
    }

    /// The layout of a code.
    pub fn from_code(code: i32) -> Result<Self> {
        match code {
            abi::SH_LORA_PEFT => Ok(Self::Peft),
            abi::SH_LORA_KOHYA => Ok(Self::Kohya),
            other => Err(Error::invalid_argument(format!("unknown LoRA layout {other}"))),
        }
    }
}

/// `W + strength * scale * up @ down`, for one linear or 1x1 projection.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraEntry {
    /// Diffusers path: `"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"`.
    pub module: String,
    /// Rows of `down`.
    pub rank: usize,
    /// Columns of `down` and of the weight.
    pub in_features: usize,
    /// Rows of `up` and of the weight.
    pub out_features: usize,
    /// `[rank, in]`, row-major.
    pub down: Vec<f32>,
    /// `[out, rank]`, row-major.
    pub up: Vec<f32>,
    /// `alpha / rank`, or 1.
    pub scale: f64,
}

impl LoraEntry {
    fn check(&self) -> Result<()> {
        let fits = |length: usize, a: usize, b: usize| a.checked_mul(b) == Some(length);
        if self.rank == 0
            || !fits(self.down.len(), self.rank, self.in_features)
            || !fits(self.up.len(), self.out_features, self.rank)
        {
            let Self { module, rank, in_features, out_features, .. } = self;
            let (down, up) = (self.down.len(), self.up.len());
            return Err(Error::shape_mismatch(format!(
                "LoRA {module}: {down} and {up} numbers for rank {rank}, {in_features} in, {out_features} out"
            )));
        }
        Ok(())
    }

    /// Adds `strength * scale * up @ down` to `weight` `[out, in]`. The sum is formed in f32 and rounded once.
    pub fn merge(&self, strength: f64, weight: &mut ViewMut<'_>) -> Result<()> {
        if !strength.is_finite() {
            return Err(Error::invalid_argument(format!("LoRA strength is {strength}")));
        }
        if weight.shape() != [self.out_features, self.in_features] {
            let expected = [self.out_features, self.in_features];
            let message = format!("weight of {} has shape {:?}, expected {expected:?}", self.module, weight.shape());
            return Err(Error::shape_mismatch(message));
        }
        let factor = (strength * self.scale) as f32;
        let mut sum = weight.to_vec();
        let mut delta = vec![0f32; self.in_features];
        for (row, up) in sum.chunks_mut(self.in_features.max(1)).zip(self.up.chunks(self.rank)) {
            delta.fill(0.0);
            for (&up, down) in up.iter().zip(self.down.chunks(self.in_features)) {
                delta.iter_mut().zip(down).for_each(|(delta, &down)| *delta += up * down);
            }
            row.iter_mut().zip(&delta).for_each(|(weight, &delta)| *weight += factor * delta);
        }
        weight.write(&sum)
    }
}

/// All low-rank weights of a plugin.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    entries: Vec<LoraEntry>,
}

impl Lora {
    /// Checks that each entry's numbers fit its shape and that no module comes twice.
    pub fn new(entries: Vec<LoraEntry>) -> Result<Self> {
        entries.iter().try_for_each(LoraEntry::check)?;
        let mut modules: Vec<&str> = entries.iter().map(|entry| entry.module.as_str()).collect();
        modules.sort_unstable();
        if let Some(pair) = modules.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::new(Status::InvalidData, format!("two LoRA entries for {}", pair[0])));
        }
        Ok(Self { entries })
    }

    /// All entries.
    pub fn entries(&self) -> &[LoraEntry] {
        &self.entries
    }

    /// The entry at `index`.
    pub fn entry(&self, index: usize) -> Result<&LoraEntry> {
        let count = self.entries.len();
        self.entries.get(index).ok_or_else(|| Error::invalid_argument(format!("LoRA entry {index} of {count}")))
    }
}
