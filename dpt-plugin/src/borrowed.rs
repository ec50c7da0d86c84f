//! A U-Net of the plugin's own on the host's weights (`sampler-hook.weights/1`), followed revision by revision.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use diffusion::{UNet, UNetConfig};
use host_api::View;
use host_api::plugin::{HostHandle, HostWeights};

use crate::{Error, Result};

/// What was read of the host, to read again only what has changed.
pub(crate) struct BorrowedWeights {
    host: HostHandle,
    weights: HostWeights,
    config: UNetConfig,
    tap: String,
    dtype: DType,
    device: Device,
    /// Names up to the tap, with the host's indices.
    names: Vec<(usize, String)>,
    /// Each tensor with the revision that it was read at.
    tensors: HashMap<String, (u64, Tensor)>,
    /// The host's revision that all of them were read at.
    revision: Option<u64>,
}

impl BorrowedWeights {
    /// Looks for the names that the U-Net needs up to the tap; reads nothing yet.
    pub(crate) fn new(
        host: &HostHandle,
        config: &UNetConfig,
        tap: &str,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let weights = host
            .weights()
            .ok_or_else(|| Error::Unsupported(format!("host {} has no sampler-hook.weights/1", host.name())))?;
        let beyond = config.prefixes_beyond(config.tap(tap)?);
        let needed = |name: &str| !beyond.iter().any(|prefix| name.starts_with(prefix));
        let names = weights.names()?.into_iter().enumerate().filter(|(_, name)| needed(name)).collect();
        Ok(Self {
            host: host.clone(),
            weights,
            config: config.clone(),
            tap: tap.to_owned(),
            dtype,
            device: device.clone(),
            names,
            tensors: HashMap::new(),
            revision: None,
        })
    }

    /// The U-Net on the host's weights as they are now; `None` when they are what they were at the last call that succeeded.
    pub(crate) fn refresh(&mut self) -> Result<Option<UNet>> {
        const TASK: &str = "read the host's U-Net";
        let revision = self.weights.revision()?;
        if self.revision == Some(revision) {
            return Ok(None);
        }
        let mut read = HashMap::new();
        for (done, (index, name)) in self.names.iter().enumerate() {
            if self.host.cancelled() {
                return Err(Error::Cancelled);
            }
            let own = self.weights.tensor_revision(*index)?;
            if self.tensors.get(name).is_none_or(|(known, _)| *known != own) {
                // What is lent on a device does not leave it where the U-Net computes there too.
                let lent = |view: &View<'_>| {
                    let device = if view.device() == host_api::Device::Cpu { &Device::Cpu } else { &self.device };
                    tensor_views::read(view, device)
                };
                let tensor = self.weights.tensor(*index, lent)?.to_dtype(self.dtype)?;
                read.insert(name.clone(), (own, tensor));
                self.host.progress(TASK, done + 1, self.names.len());
            }
        }
        // The host's revision counts changes anywhere; these may all be beyond the tap.
        if read.is_empty() && self.revision.is_some() {
            self.revision = Some(revision);
            return Ok(None);
        }
        let kept = self.tensors.iter().filter(|(name, _)| !read.contains_key(*name));
        let all = kept.chain(&read).map(|(name, (_, tensor))| (name.clone(), tensor.clone())).collect();
        let from = format!("the U-Net of host {}", self.host.name());
        let unet = UNet::from_tensors(&from, all, self.config.clone(), Some(&self.tap), self.dtype, &self.device)?;
        // On the device where the U-Net has them; nothing is kept twice.
        for (name, weight) in unet.weights() {
            let known = read.get(name).or_else(|| self.tensors.get(name)).map(|(revision, _)| *revision);
            if let Some(revision) = known {
                self.tensors.insert(name.clone(), (revision, weight.tensor.clone()));
            }
        }
        self.revision = Some(revision);
        Ok(Some(unet))
    }
}
