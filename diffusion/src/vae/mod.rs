//! The autoencoder between pixels and latents: diffusers' `AutoencoderKL`, with or without attention in the middle.

mod config;
mod decoder;
mod encoder;
mod mid;

use std::path::Path;

use candle_core::{DType, Device, Tensor};

pub use config::VaeConfig;

use crate::config::weights_file;
use crate::layers::Linear;
use crate::{Checkpoint, Error, Result};
use decoder::Decoder;
use encoder::Encoder;

/// A loaded autoencoder. Images are `[B, 3, H, W]` in [-1, 1]; latents `[B, latent_channels, h, w]`, unscaled: those that
/// the U-Net sees are [`VaeConfig::scaling_factor`] times these.
pub struct Vae {
    config: VaeConfig,
    dtype: DType,
    device: Device,
    encoder: Encoder,
    quant: Option<Linear>,
    post_quant: Option<Linear>,
    decoder: Decoder,
}

/// The distribution over latents that an image is encoded to.
pub struct LatentDistribution {
    /// `[B, latent_channels, h, w]`.
    pub mean: Tensor,
    /// Logarithm of the variance, in the same shape.
    pub logvar: Tensor,
}

impl Vae {
    /// Loads the `vae` folder of a diffusers pipeline.
    pub fn load(folder: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let config = VaeConfig::load(&folder.join("config.json"))?;
        Self::from_checkpoint(
            Checkpoint::open(&weights_file(folder, "diffusion_pytorch_model")?, dtype, device)?,
            config,
        )
    }

    pub(crate) fn from_checkpoint(checkpoint: Checkpoint, config: VaeConfig) -> Result<Self> {
        let root = checkpoint.root();
        let channels = config.latent_channels;
        let conv1x1 = |name: &str, channels: usize| Linear::load_conv1x1(&root.enter(name), channels, channels);
        let vae = Self {
            dtype: root.dtype(),
            device: root.device().clone(),
            encoder: Encoder::load(&root.enter("encoder"), &config)?,
            quant: config.use_quant_conv.then(|| conv1x1("quant_conv", 2 * channels)).transpose()?,
            post_quant: config.use_post_quant_conv.then(|| conv1x1("post_quant_conv", channels)).transpose()?,
            decoder: Decoder::load(&root.enter("decoder"), &config)?,
            config,
        };
        checkpoint.finish()?;
        Ok(vae)
    }

    /// Sizes of the model.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Images `[B, 3, H, W]` in [-1, 1], sides divisible by [`VaeConfig::latent_scale`].
    pub fn encode(&self, images: &Tensor) -> Result<LatentDistribution> {
        let scale = self.config.latent_scale();
        match images.dims() {
            [_, channels, h, w]
                if *channels == self.config.in_channels
                    && [h, w].iter().all(|side| **side > 0 && **side % scale == 0) => {}
            found => {
                let channels = self.config.in_channels;
                let message = format!(
                    "images have shape {found:?}, expected [batch, {channels}, H, W] with sides divisible by {scale}"
                );
                return Err(Error::Input(message));
            }
        }
        let mut x = self.encoder.forward(&images.to_dtype(self.dtype)?.to_device(&self.device)?)?;
        if let Some(quant) = &self.quant {
            x = quant.forward_channels(&x)?;
        }
        let channels = self.config.latent_channels;
        // Bounds on the logarithm as in diffusers' DiagonalGaussianDistribution.
        Ok(LatentDistribution {
            mean: x.narrow(1, 0, channels)?.contiguous()?,
            logvar: x.narrow(1, channels, channels)?.clamp(-30., 20.)?,
        })
    }

    /// Unscaled latents `[B, latent_channels, h, w]` to images `[B, 3, H, W]`, nominally in [-1, 1] but not clamped.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let channels = self.config.latent_channels;
        match latents.dims() {
            [_, found, h, w] if *found == channels && *h > 0 && *w > 0 => {}
            found => {
                return Err(Error::Input(format!("latents have shape {found:?}, expected [batch, {channels}, h, w]")));
            }
        }
        let mut x = latents.to_dtype(self.dtype)?.to_device(&self.device)?;
        if let Some(post_quant) = &self.post_quant {
            x = post_quant.forward_channels(&x)?;
        }
        self.decoder.forward(&x)
    }
}
