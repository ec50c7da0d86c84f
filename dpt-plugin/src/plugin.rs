//! The plugin itself: one method per call of the ABI.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use diffusion::lora::LoraFile;
use diffusion::{LoraEntry, TextModel};
use host_api::plugin::{HostHandle, Latents, Lora, Params, Plugin};
use host_api::{Descriptor, DeviceMemory, Dtype, Lent, Model, Needs, Outcome, Report, Run, Space, Step, View};
use tensor_views::Held;

use crate::batch::{Batch, settle, write};
use crate::config::{Config, GradientSource};
use crate::fit::{Fitting, Prepared, gradient_source};
use crate::params::{Strength, params};
use crate::pool::Pool;
use crate::score::score;
use crate::source::{Correction, Scorer, Source, check_features, replayed};
use crate::text::{Conditioning, TextRequirements};
use crate::{Adapter, Error, Result, checkpoint, lora};

/// Discriminative Probing and Tuning: corrects latents by the gradient of the matching score (Eq. 9).
pub struct DptPlugin {
    host: HostHandle,
    config: Config,
    gradient: GradientSource,
    device: Device,
    pool: Pool,
    params: Arc<Params>,
    adapter: Held<Adapter>,
    lora_entries: Held<Vec<LoraEntry>>,
    lora: Arc<Lora>,
    prepared: Option<Prepared>,
    conditioning: Option<Conditioning>,
    /// The last to go.
    _released: Released,
}

impl Plugin for DptPlugin {
    const DESCRIPTOR: Descriptor = Descriptor {
        id: "dpt",
        name: "DPT self-correction",
        version: env!("CARGO_PKG_VERSION"),
        vendor: "the DPT plugin's authors",
        description: "Scores how well noisy latents match the prompt and corrects them by the score's gradient",
    };

    fn device_memory() -> Option<&'static dyn DeviceMemory> {
        tensor_views::device_memory()
    }

    fn create(host: HostHandle, config: &str) -> host_api::Result<Self> {
        Ok(Self::new(host, Config::parse(config)?)?)
    }

    fn prepare(&mut self, model: &Model<'_>, latents: host_api::Device) -> host_api::Result<()> {
        let _asking = tensor_views::bind(&self.device);
        let own = tensor_views::name(&self.device);
        if own != latents && own != host_api::Device::Cpu && latents != host_api::Device::Cpu {
            let message =
                format!("latents on {latents} for a plugin whose `device` is {own}: no tensor crosses between them");
            return Err(Error::Unsupported(message).into());
        }
        let latents = &tensor_views::device(latents)?;
        let Self { host, config, gradient, adapter, lora_entries, device, .. } = self;
        let fitting = Fitting { host, config, gradient: *gradient, adapter, lora: lora_entries, device, latents };
        // The old source, if there is one, lives until the new one is ready: a prepare that fails changes nothing.
        self.prepared = Some(fitting.fit(model)?);
        Ok(())
    }

    fn needs(&self) -> Needs {
        // With the base model's text encoder prompts are enough.
        let encodes = self.prepared.as_ref().is_some_and(|prepared| prepared.encoder.is_some());
        let own = matches!(self.gradient, GradientSource::Plugin | GradientSource::Weights);
        Needs {
            gradient: self.gradient == GradientSource::Host,
            weights: self.gradient == GradientSource::Weights,
            context: own && !encodes,
            pooled: !encodes,
            tap: self.adapter.sizes().tap.clone(),
        }
    }

    fn begin(&mut self, run: &Run<'_>) -> host_api::Result<()> {
        let _asking = tensor_views::bind(&self.device);
        self.prepared_mut().source.refresh()?;
        self.conditioning = Some(self.conditioning_of(&run.text, run.batch, self.config.cuda_graphs)?);
        Ok(())
    }

    fn step(&mut self, step: &Step<'_>, latents: &mut Latents<'_>, report: &mut Report) -> host_api::Result<()> {
        let _asking = tensor_views::bind(&self.device);
        let result = self.correct(step, latents, report);
        if result.is_err() {
            self.prepared_mut().source.release();
        }
        Ok(result?)
    }

    const SPLIT: bool = true;

    fn score(
        &mut self,
        step: &Step<'_>,
        features: Option<&View<'_>>,
        cotangent: Option<Dtype>,
        report: &mut Report,
    ) -> host_api::Result<Option<Lent>> {
        let _asking = tensor_views::bind(&self.device);
        Ok(self.score_features(step, features, cotangent, report)?)
    }

    fn apply(
        &mut self,
        step: &Step<'_>,
        latents: &mut Latents<'_>,
        gradient: &View<'_>,
        report: &mut Report,
    ) -> host_api::Result<()> {
        let _asking = tensor_views::bind(&self.device);
        let strength = Strength::read(&self.params)?;
        report.outcome = strength.outcome(step);
        if report.outcome == Outcome::Corrected {
            self.apply_gradient(step, latents, gradient, &strength, report)?;
        }
        Ok(())
    }

    fn end(&mut self) -> host_api::Result<()> {
        let _asking = tensor_views::bind(&self.device);
        self.conditioning = None;
        // What was kept from one step to the next.
        diffusion::release_memory(&self.device);
        Ok(())
    }

    fn memory(&self) -> u64 {
        let prepared = self.prepared.as_ref().map_or(0, |prepared| {
            let own = match &prepared.source {
                Source::Own(own) => own.unet.weight_bytes(),
                Source::Host(_) | Source::Split => 0,
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

impl Drop for DptPlugin {
    fn drop(&mut self) {
        let _asking = tensor_views::bind(&self.device);
        (self.conditioning, self.prepared) = (None, None);
    }
}

/// Gives a device's memory back as it is dropped.
struct Released(Device);

impl Drop for Released {
    fn drop(&mut self) {
        let _asking = tensor_views::bind(&self.0);
        diffusion::release_memory(&self.0);
    }
}

impl DptPlugin {
    /// Loads adapter and LoRA.
    fn new(host: HostHandle, config: Config) -> Result<Self> {
        let params = params(&config)?;
        let device = diffusion::device(&config.device).map_err(unknown_name)?;
        let _asking = tensor_views::bind(&device);
        diffusion::dtype(&config.dtype).map_err(unknown_name)?;
        let pool = Pool::new(config.threads, &device)?;
        let file = checkpoint::open(&config.adapter, &device)?;
        let adapter = Held::new(checkpoint::load_adapter(&file, config.hints())?, &device);
        let own = LoraFile::read(&file)?;
        file.finish()?;
        let files = match &config.lora {
            None => {
                lora::warn(&own, &host);
                vec![(own.entries, 1.)]
            }
            Some(choices) => lora::load(choices.list(), &device, &host)?,
        };
        let lora_entries = Held::new(lora::combine(files, config.lora_strength)?, &device);
        let lora = Arc::new(lora::for_hosts(&lora_entries)?);
        let gradient = gradient_source(&config, &host);
        let (prepared, conditioning, _released) = (None, None, Released(device.clone()));
        Ok(Self {
            host,
            config,
            gradient,
            device,
            pool,
            params,
            adapter,
            lora_entries,
            lora,
            prepared,
            conditioning,
            _released,
        })
    }

    /// `graphs`: it is of several steps, which may be captured.
    fn conditioning_of(&self, text: &host_api::Text, batch: usize, graphs: bool) -> Result<Conditioning> {
        let prepared = self.prepared.as_ref().expect("prepare precedes begin");
        let clip_dim = self.adapter.sizes().clip_dim;
        let needs = TextRequirements { batch, clip_dim, device: &self.device, graphs };
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
        let items = latents.shape()[0];
        let values = tensor_views::read(&latents.view(), &self.device)?;
        let scale = Tensor::new(&[space_scale(step)], &self.device)?;
        self.prepared_mut().source.refresh()?;
        let mut own_text = step.text.as_ref().map(|text| self.conditioning_of(text, items, false)).transpose()?;
        let Self { host, pool, adapter, prepared, conditioning, device, .. } = self;
        let source = &mut prepared.as_mut().expect("prepare precedes step").source;
        let text = own_text.as_mut().or(conditioning.as_mut()).expect("begin precedes step");
        let stop = || if host.cancelled() { Err(Error::Cancelled) } else { Ok(()) };

        stop()?;
        let by = Scorer { adapter, text: &mut *text, pool, stop: &stop };
        if !corrected {
            let mut batch = Batch::new(&values, &scale)?;
            batch.check_texts(&by.text.pooled)?;
            let numbers = source.score(step, batch, by)?;
            return settle(&numbers, report).map(drop);
        }
        let eta = Tensor::new(&[strength.eta], device)?;
        let correction = Correction { step, latents: values, scale, eta, bound: strength.bound };
        let corrected = source.correct(&correction, by)?;
        text.tell(host);
        write(&corrected, latents, report)
    }

    /// The first half of a step on features that the host computed.
    fn score_features(
        &mut self,
        step: &Step,
        features: Option<&View>,
        cotangent: Option<Dtype>,
        report: &mut Report,
    ) -> Result<Option<Lent>> {
        let strength = Strength::read(&self.params)?;
        report.outcome = strength.outcome(step);
        let corrected = report.outcome == Outcome::Corrected;
        let monitored = strength.monitor && step.sub_evaluation == 0;
        let Some(features) = features.filter(|_| corrected || monitored) else { return Ok(None) };
        let features = tensor_views::read(features, self.adapter.device())?.to_dtype(DType::F32)?;
        let items = features.dim(0)?;
        check_features(&features, &self.adapter, items)?;
        let mut own_text = step.text.as_ref().map(|text| self.conditioning_of(text, items, false)).transpose()?;
        let text = own_text.as_mut().or(self.conditioning.as_mut()).expect("begin precedes step");
        let mut batch = Batch::without_latents(items, self.adapter.device())?;
        batch.check_features(&features)?;
        batch.check_texts(&text.pooled)?;
        let sinusoids = self.adapter.sinusoids(&vec![step.timestep; items])?;
        let Some(dtype) = cotangent.filter(|_| corrected) else {
            let scores = self.pool.run(|| score(&self.adapter, &features, &sinusoids, &text.pooled))?;
            settle(&batch.scored(&scores)?, report)?;
            return Ok(None);
        };
        let (scores, gradient) = replayed(&self.adapter, text, &self.pool, &features, &sinusoids)?;
        text.tell(&self.host);
        settle(&batch.scored(&scores)?, report)?;
        Ok(Some(tensor_views::lend(&batch.without_spoilt(&gradient)?.to_dtype(tensor_views::dtype(dtype))?)?))
    }

    /// The second half.
    fn apply_gradient(
        &self,
        step: &Step,
        latents: &mut Latents,
        gradient: &View,
        strength: &Strength,
        report: &mut Report,
    ) -> Result<()> {
        let number = |value| Tensor::new(&[value], &self.device);
        let gradient = tensor_views::read(gradient, &self.device)?.to_dtype(DType::F32)?;
        let batch = Batch::new(&tensor_views::read(&latents.view(), &self.device)?, &number(space_scale(step))?)?;
        // Those of the first half were reported by it.
        let scores = Tensor::full(f32::NAN, batch.items()?, &self.device)?;
        write(&batch.corrected(&scores, &gradient, &number(strength.eta)?, strength.bound)?, latents, report)
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

/// c in `x = z / c`: latents in sigma space times it are in VP space.
fn space_scale(step: &Step) -> f64 {
    if step.space == Space::Ve { step.alpha_bar.sqrt() } else { 1. }
}
