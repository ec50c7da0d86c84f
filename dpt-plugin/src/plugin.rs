//! The plugin itself: one method per call of the ABI.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use diffusion::lora::LoraFile;
use diffusion::{LoraEntry, TextModel, UNet, UNetConfig};
use host_api::plugin::{HostHandle, Latents, Lora, Params, Plugin};
use host_api::{Descriptor, Model, Needs, Outcome, Prediction, Report, Run, Space, Step};

use crate::batch::Batch;
use crate::config::{Config, GradientSource};
use crate::params::{Strength, params};
use crate::score::{score, score_and_gradient};
use crate::source::{Evaluation, OwnUNet, Source};
use crate::text::{Conditioning, TextRequirements};
use crate::{Adapter, Error, Result, checkpoint, lora};

/// Discriminative Probing and Tuning: corrects latents by the gradient of the matching score (Eq. 9).
pub struct DptPlugin {
    host: HostHandle,
    config: Config,
    device: Device,
    params: Arc<Params>,
    adapter: Adapter,
    lora_entries: Vec<LoraEntry>,
    lora: Arc<Lora>,
    prepared: Option<Prepared>,
    conditioning: Option<Conditioning>,
}

/// What depends on the model.
struct Prepared {
    source: Source,
    /// The base model's text encoder, for hosts that give prompts alone.
    encoder: Option<TextModel>,
    latent_channels: usize,
}

impl Plugin for DptPlugin {
    const DESCRIPTOR: Descriptor = Descriptor {
        id: "dpt",
        name: "DPT self-correction",
        version: env!("CARGO_PKG_VERSION"),
        vendor: "the DPT plugin's authors",
        description: "Scores how well noisy latents match the prompt and corrects them by the score's gradient",
    };

    fn create(host: HostHandle, config: &str) -> host_api::Result<Self> {
        Ok(Self::new(host, Config::parse(config)?)?)
    }

    fn prepare(&mut self, model: &Model<'_>, latents: host_api::Device) -> host_api::Result<()> {
        if latents != host_api::Device::Cpu {
            let message = format!("latents on {latents:?}: they must be in main memory, wherever the model computes");
            return Err(Error::Unsupported(message).into());
        }
        self.prepared = Some(self.fit(model)?);
        Ok(())
    }

    fn needs(&self) -> Needs {
        let own = self.config.source() == GradientSource::Plugin;
        // With the base model's text encoder prompts are enough.
        let encodes = self.prepared.as_ref().is_some_and(|prepared| prepared.encoder.is_some());
        Needs { gradient: !own, context: own && !encodes, pooled: !encodes, tap: self.adapter.sizes().tap.clone() }
    }

    fn begin(&mut self, run: &Run<'_>) -> host_api::Result<()> {
        self.conditioning = Some(self.conditioning_of(&run.text, run.batch)?);
        Ok(())
    }

    fn step(&mut self, step: &Step<'_>, latents: &mut Latents<'_>, report: &mut Report) -> host_api::Result<()> {
        let result = self.correct(step, latents, report);
        if result.is_err() {
            self.prepared_mut().source.release();
        }
        Ok(result?)
    }

    fn end(&mut self) -> host_api::Result<()> {
        self.conditioning = None;
        Ok(())
    }

    fn memory(&self) -> u64 {
        let prepared = self.prepared.as_ref().map_or(0, |prepared| {
            let own = match &prepared.source {
                Source::Own(own) => own.unet.weight_bytes(),
                Source::Host(_) => 0,
            };
            own + prepared.encoder.as_ref().map_or(0, TextModel::weight_bytes)
        });
        prepared + self.adapter.weight_bytes() + lora::bytes(&self.lora_entries)
    }

    fn params(&self) -> Option<Arc<Params>> {
        Some(self.params.clone())
    }

    fn lora(&self) -> Option<Arc<Lora>> {
        Some(self.lora.clone())
    }
}

impl DptPlugin {
    /// Loads adapter and LoRA.
    fn new(host: HostHandle, config: Config) -> Result<Self> {
        let params = params(&config)?;
        let device = diffusion::device(&config.device).map_err(unknown_name)?;
        diffusion::dtype(&config.dtype).map_err(unknown_name)?;
        let file = checkpoint::open(&config.adapter, &device)?;
        let adapter = checkpoint::load_adapter(&file, config.hints())?;
        let own = LoraFile::read(&file)?;
        file.finish()?;
        let files = match &config.lora {
            None => {
                lora::warn(&own, &host);
                vec![(own.entries, 1.)]
            }
            Some(choices) => lora::load(choices.list(), &device, &host)?,
        };
        let lora_entries = lora::combine(files, config.lora_strength)?;
        let lora = Arc::new(lora::for_hosts(&lora_entries)?);
        Ok(Self { host, config, device, params, adapter, lora_entries, lora, prepared: None, conditioning: None })
    }

    /// Checks that method and adapter fit the model, and gets hold of a gradient source. The old source, if there is one,
    /// lives until the new one is ready, so that a failed prepare changes nothing.
    fn fit(&self, model: &Model) -> Result<Prepared> {
        check_model(model)?;
        let sampled = model.unet_config.map(UNetConfig::parse).transpose();
        let sampled = sampled.map_err(|e| Error::Unsupported(format!("the model's U-Net: {e}")))?;
        sampled.as_ref().map_or(Ok(()), |config| self.check_fit(config))?;
        let (source, encoder) = match self.config.source() {
            GradientSource::Host => (self.host_source()?, None),
            GradientSource::Plugin => self.own_source(model, sampled.as_ref())?,
        };
        Ok(Prepared { source, encoder, latent_channels: model.latent_channels })
    }

    fn host_source(&self) -> Result<Source> {
        self.host.gradient().map(Source::Host).ok_or_else(|| {
            Error::Unsupported(format!(
                "host {} has no sampler-hook.gradient/1; configure a `base_model` so that the plugin computes the gradient \
                 itself",
                self.host.name()
            ))
        })
    }

    /// Loads the base model up to the tap, with the LoRA merged, and its text encoder where it has one.
    fn own_source(&self, model: &Model, sampled: Option<&UNetConfig>) -> Result<(Source, Option<TextModel>)> {
        let folder = self.config.base_model.as_deref().expect("checked when the configuration was parsed");
        let dtype = diffusion::dtype(&self.config.dtype)?;
        let tap = &self.adapter.sizes().tap;
        let mut unet = UNet::load_to(&folder.join("unet"), tap, dtype, &self.device).map_err(tap_not_found)?;
        self.check_fit(unet.config())?;
        let (own, host) = (unet.config().in_channels, model.unet_in_channels);
        if own != host {
            return Err(Error::Shape(format!("the base model's U-Net takes {own} channels, the host's {host}")));
        }
        let (own, host) = (&unet.config().block_out_channels, sampled.map(|config| &config.block_out_channels));
        if host.is_some_and(|host| host != own) {
            let host = host.expect("just compared");
            let message = format!("its U-Net's levels have {own:?} channels, the host's {host:?}");
            return Err(Error::Shape(format!("the base model is not the host's: {message}")));
        }
        unet.merge_lora(&self.lora_entries, 1.)?;
        let tap = unet.config().tap(tap)?;
        let encoder = folder.join("text_encoder").is_dir();
        let encoder = encoder.then(|| TextModel::load(folder, dtype, &self.device)).transpose()?;
        Ok((Source::Own(Box::new(OwnUNet { unet, tap, tape: None })), encoder))
    }

    /// Tap and widths of adapter and U-Net.
    fn check_fit(&self, unet: &UNetConfig) -> Result<()> {
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

    fn conditioning_of(&self, text: &host_api::Text, batch: usize) -> Result<Conditioning> {
        let prepared = self.prepared.as_ref().expect("prepare precedes begin");
        let needs = TextRequirements { batch, clip_dim: self.adapter.sizes().clip_dim, device: &self.device };
        Conditioning::new(text, &needs, &prepared.source, prepared.encoder.as_ref(), &self.host)
    }

    fn prepared_mut(&mut self) -> &mut Prepared {
        self.prepared.as_mut().expect("prepare precedes step")
    }

    /// One step: score, gradient, and `z + eta ds/dz` for each item whose numbers are finite.
    fn correct(&mut self, step: &Step, latents: &mut Latents, report: &mut Report) -> Result<()> {
        let strength = Strength::read(&self.params)?;
        report.outcome = strength.outcome(step);
        let corrected = report.outcome == Outcome::Corrected;
        let monitored = strength.monitor && step.sub_evaluation == 0;
        if !corrected && !monitored {
            return Ok(());
        }
        self.check_step(step, latents)?;
        // x = z / scale in sigma space.
        let scale = if step.space == Space::Ve { step.alpha_bar.sqrt() } else { 1. };
        let shape = latents.shape();
        let mut batch = Batch::read(latents, scale, report)?;
        let own_text = step.text.as_ref().map(|text| self.conditioning_of(text, shape[0])).transpose()?;
        let Self { host, adapter, prepared, conditioning, .. } = self;
        let source = &mut prepared.as_mut().expect("prepare precedes step").source;
        let text = own_text.as_ref().or(conditioning.as_ref()).expect("begin precedes step");
        let stop = || if host.cancelled() { Err(Error::Cancelled) } else { Ok(()) };

        stop()?;
        let tap = &adapter.sizes().tap;
        let evaluation = Evaluation { step, latents: batch.values(), shape, tap, keys: text.keys.as_ref() };
        let features = source.features(&evaluation, adapter.device())?;
        check_features(&features, adapter, shape[0])?;
        batch.check_rows("the U-Net's features", &features, report)?;
        batch.check_rows("pooled texts", &text.pooled, report)?;
        stop()?;
        let timesteps = vec![step.timestep; shape[0]];
        if !corrected {
            source.release();
            let scores = score(adapter, &features, &timesteps, &text.pooled)?.to_vec1()?;
            batch.report_scores(&scores, report);
            return Ok(());
        }
        let (scores, cotangent) = score_and_gradient(adapter, &features, &timesteps, &text.pooled)?;
        batch.report_scores(&scores.to_vec1()?, report);
        let cotangent = batch.without_spoilt(&cotangent)?;
        stop()?;
        let gradient = source.vjp(&cotangent, shape)?;
        batch.write(&gradient, &strength, scale, latents, report)
    }

    fn check_step(&self, step: &Step, latents: &Latents) -> Result<()> {
        let prepared = self.prepared.as_ref().expect("prepare precedes step");
        let [_, channels, ..] = latents.shape();
        if channels != prepared.latent_channels {
            let expected = prepared.latent_channels;
            return Err(Error::Shape(format!("latents have {channels} channels, the model's have {expected}")));
        }
        if step.extra_inputs && matches!(prepared.source, Source::Own(_)) && !self.config.ignore_extra_inputs {
            return Err(Error::Unsupported(
                "the host adds U-Net inputs that the plugin's own U-Net cannot see; use the host's gradient, or set \
                 `ignore_extra_inputs` to correct without them"
                    .into(),
            ));
        }
        Ok(())
    }
}

/// A device or dtype that nobody knows; one that this build lacks is another error.
fn unknown_name(error: diffusion::Error) -> Error {
    match error {
        diffusion::Error::Input(message) => Error::Config(message),
        other => other.into(),
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

fn check_features(features: &Tensor, adapter: &Adapter, batch: usize) -> Result<()> {
    match features.dims() {
        [b, c, h, w] if *b == batch && *c == adapter.sizes().channels && *h > 0 && *w > 0 => Ok(()),
        found => Err(Error::Shape(format!(
            "the features at {} have shape {found:?}, expected [{batch}, {}, h, w]",
            adapter.sizes().tap,
            adapter.sizes().channels
        ))),
    }
}
