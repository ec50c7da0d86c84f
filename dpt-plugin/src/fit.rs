//! What `prepare` does: holds method, adapter and model against each other, and gets hold of a gradient source.

use candle_core::Device;
use diffusion::{LoadOptions, LoraEntry, TextModel, UNetConfig, load_unet_to};
use host_api::plugin::HostHandle;
use host_api::{Model, Prediction};

use crate::borrowed::BorrowedWeights;
use crate::config::{Config, GradientSource};
use crate::source::{Lender, OwnUNet, Source};
use crate::{Adapter, Error, Result};

/// What depends on the model.
pub(crate) struct Prepared {
    pub(crate) source: Source,
    /// The base model's text encoder, for hosts that give prompts alone.
    pub(crate) encoder: Option<TextModel>,
    pub(crate) latent_channels: usize,
}

/// What is held against the model.
pub(crate) struct Fitting<'a> {
    pub(crate) host: &'a HostHandle,
    pub(crate) config: &'a Config,
    pub(crate) gradient: GradientSource,
    pub(crate) adapter: &'a Adapter,
    pub(crate) lora: &'a [LoraEntry],
    pub(crate) device: &'a Device,
    /// Where the host's latents are.
    pub(crate) latents: &'a Device,
}

/// Whose U-Net computes, where the configuration does not say: the plugin's when there is a base model, else what the host
/// lends, its gradient before its weights.
pub(crate) fn gradient_source(config: &Config, host: &HostHandle) -> GradientSource {
    let chosen = match (&config.gradient, &config.base_model) {
        (Some(source), _) => return *source,
        (None, Some(_)) => GradientSource::Plugin,
        (None, None) if host.gradient().is_none() && host.weights().is_some() => GradientSource::Weights,
        (None, None) => GradientSource::Host,
    };
    host.log(log::Level::Info, &format!("`gradient` is not configured: \"{}\"", chosen.name()));
    chosen
}

impl Fitting<'_> {
    /// Fails when method or adapter do not fit the model, and when the source is not there.
    pub(crate) fn fit(&self, model: &Model) -> Result<Prepared> {
        check_model(model)?;
        let sampled = model.unet_config.map(UNetConfig::parse).transpose();
        let sampled = sampled.map_err(|e| Error::Unsupported(format!("the model's U-Net: {e}")))?;
        sampled.as_ref().map_or(Ok(()), |config| self.check(config))?;
        let (source, encoder) = match self.gradient {
            GradientSource::Host => (self.host_source()?, None),
            GradientSource::Plugin => self.own_source(model, sampled.as_ref())?,
            GradientSource::Weights => (self.borrowed_source(sampled.as_ref())?, None),
            GradientSource::Split => (Source::Split, None),
        };
        Ok(Prepared { source, encoder, latent_channels: model.latent_channels })
    }

    fn host_source(&self) -> Result<Source> {
        let lender = |gradient| Source::Host(Lender { gradient, device: self.latents.clone() });
        self.host.gradient().map(lender).ok_or_else(|| {
            Error::Unsupported(format!(
                "host {} has no sampler-hook.gradient/1; configure a `base_model` so that the plugin computes the gradient \
                 itself, or `gradient` \"weights\" where the host lends its weights, or \"split\" where it computes them",
                self.host.name()
            ))
        })
    }

    /// Loads the base model up to the tap, with the LoRA merged, and its text encoder where it has one.
    fn own_source(&self, model: &Model, sampled: Option<&UNetConfig>) -> Result<(Source, Option<TextModel>)> {
        const TASK: &str = "load the base model";
        let model_path = self.config.base_model.as_deref().expect("checked when the configuration was parsed");
        let dtype = diffusion::dtype(&self.config.dtype)?;
        let tap = &self.adapter.sizes().tap;
        self.host.progress(TASK, 0, 1);
        let options = LoadOptions { configs: self.config.base_configs.clone(), ..LoadOptions::default() };
        let loaded = load_unet_to(model_path, &options, tap, dtype, self.device).map_err(tap_not_found);
        // The task ends also where it fails.
        self.host.progress(TASK, 1, 1);
        let (mut unet, encoder) = loaded?;
        self.check(unet.config())?;
        let (own, host) = (unet.config().in_channels, model.unet_in_channels);
        if own != host {
            return Err(Error::Shape(format!("the base model's U-Net takes {own} channels, the host's {host}")));
        }
        let own = &unet.config().block_out_channels;
        if let Some(host) = sampled.map(|config| &config.block_out_channels).filter(|host| *host != own) {
            let message = format!("its U-Net's levels have {own:?} channels, the host's {host:?}");
            return Err(Error::Shape(format!("the base model is not the host's: {message}")));
        }
        unet.merge_lora(self.lora, 1.)?;
        let tap = unet.config().tap(tap)?;
        Ok((Source::Own(Box::new(OwnUNet { unet, tap, borrowed: None })), encoder))
    }

    /// Reads the host's weights up to the tap. The LoRA is the host's to merge, and in its weights when it samples.
    fn borrowed_source(&self, sampled: Option<&UNetConfig>) -> Result<Source> {
        let config = sampled.ok_or_else(|| {
            let message = "`gradient` is \"weights\", which needs the U-Net's configuration in the host's model";
            Error::Unsupported(message.into())
        })?;
        let (tap, dtype) = (&self.adapter.sizes().tap, diffusion::dtype(&self.config.dtype)?);
        let mut borrowed = BorrowedWeights::new(self.host, config, tap, dtype, self.device)?;
        let unet = borrowed.refresh()?.expect("the first time");
        let tap = config.tap(tap)?;
        Ok(Source::Own(Box::new(OwnUNet { unet, tap, borrowed: Some(borrowed) })))
    }

    /// Tap and widths of adapter and U-Net.
    fn check(&self, unet: &UNetConfig) -> Result<()> {
        let sizes = self.adapter.sizes();
        let tap = unet.tap(&sizes.tap).map_err(tap_not_found)?;
        let channels = unet.tap_channels(tap);
        if channels != sizes.channels {
            let message = format!("the adapter reads {} channels at {tap}, the U-Net has {channels}", sizes.channels);
            return Err(Error::Shape(message));
        }
        if unet.cross_attention_dim != sizes.clip_dim {
            return Err(Error::Shape(format!(
                "the adapter speaks of text of width {}, the U-Net's text has {}",
                sizes.clip_dim, unet.cross_attention_dim
            )));
        }
        Ok(())
    }
}

fn tap_not_found(error: diffusion::Error) -> Error {
    match error {
        diffusion::Error::Input(message) => Error::NotFound(message),
        other => other.into(),
    }
}

/// Models that the method is not defined for or whose inputs are not known here.
fn check_model(model: &Model) -> Result<()> {
    if model.prediction == Prediction::Flow {
        let message = "flow-prediction models have no alpha_bar, and the correction (Eq. 9) is not defined for them";
        return Err(Error::Unsupported(message.into()));
    }
    let (inputs, latents) = (model.unet_in_channels, model.latent_channels);
    if inputs != latents {
        return Err(Error::Unsupported(format!(
            "the U-Net takes {inputs} channels for latents of {latents}: models with extra inputs (inpainting) are not \
             supported"
        )));
    }
    if latents == 0 {
        return Err(Error::Shape("the model's latents have 0 channels".into()));
    }
    Ok(())
}
