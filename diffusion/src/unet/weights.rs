//! The U-Net's tensors by name: lent to others as they are now, or taken from others.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::{UNet, UNetConfig, new_revision};
use crate::{Checkpoint, Result};

/// A tensor as it is now.
#[derive(Clone, Debug)]
pub struct Weight {
    /// Shares its memory with the layer that computes with it.
    pub tensor: Tensor,
    /// Another number whenever the tensor has changed.
    pub revision: u64,
}

/// The tensors as loaded, each with a revision of its own.
pub(super) fn loaded(tensors: BTreeMap<String, Tensor>) -> BTreeMap<String, Weight> {
    let revision = new_revision();
    tensors.into_iter().map(|(name, tensor)| (name, Weight { tensor, revision })).collect()
}

impl UNet {
    /// Builds the U-Net up to a tap, or whole, from tensors by diffusers' names, such as another program lends. Names beyond the
    /// tap may be absent. `from` says in errors whose they are.
    pub fn from_tensors(
        from: &str,
        tensors: HashMap<String, Tensor>,
        config: UNetConfig,
        tap: Option<&str>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Self::from_checkpoint(Checkpoint::from_tensors(Path::new(from), tensors, dtype, device), config, tap)
    }

    /// Another number whenever the weights have changed; no two U-Nets of a process share one.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Every tensor that is loaded, as it is now, with merged LoRA, by its diffusers name.
    pub fn weights(&self) -> &BTreeMap<String, Weight> {
        &self.weights
    }
}
