//! One sampling run with hooks.

use std::time::Instant;

use candle_core::{DType, Tensor};
use diffusion::LoraEntry;
use diffusion::scheduler::{Evaluation, Sampler, Space};
use host_api::host::Instance;
use host_api::{Run, Step};

use crate::conditioning::{Conditioning, Phase};
use crate::host::DemoHost;
use crate::{Error, Mode, Request, Result, Seconds, Session, StepRecord, split};

/// What a run gave.
pub struct RunOutcome {
    /// Latents after the last step, `[batch, channels, h, w]`.
    pub latents: Tensor,
    /// What the plugin did, one entry per evaluation of the U-Net.
    pub steps: Vec<StepRecord>,
    /// LoRA entries of the plugin that were merged for the run.
    pub lora_entries: usize,
    /// Where the time went.
    pub seconds: Seconds,
}

impl Session {
    /// Samples. `observe` is called after every evaluation with the latents that came of it, in the sampler's space, and what
    /// the plugin did. The U-Net's weights are, bit for bit, what they were before, also when the run fails.
    pub fn run(
        &mut self,
        request: &Request,
        observe: &mut dyn FnMut(&Tensor, Option<&StepRecord>),
    ) -> Result<RunOutcome> {
        let started = Instant::now();
        let brought = if request.plugin_lora { self.plugin_lora()? } else { Vec::new() };
        let merged = [self.lora.clone(), brought.clone()].concat();
        self.host.unet().merge_lora(&merged, 1.)?;
        let lora = started.elapsed().as_secs_f64();
        let result = self.sample(request, observe);
        let restoring = Instant::now();
        self.host.unet().restore_lora();
        let mut outcome = result?;
        outcome.lora_entries = brought.len();
        outcome.seconds.load = self.load_seconds;
        outcome.seconds.lora = lora + restoring.elapsed().as_secs_f64();
        Ok(outcome)
    }

    /// Latents as a run gives them to images `[batch, 3, H, W]`, nominally in [-1, 1].
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(self.vae.decode(&(latents / self.vae.config().scaling_factor)?)?)
    }

    /// Images `[batch, 3, H, W]` in [-1, 1] to latents as the U-Net takes them: the mean of the VAE's distribution, whose
    /// spread is far below the noise that follows.
    pub fn encode(&self, images: &Tensor) -> Result<Tensor> {
        Ok((self.vae.encode(images)?.mean.to_dtype(DType::F32)? * self.vae.config().scaling_factor)?)
    }

    /// How many low-rank entries the plugin brings.
    pub fn plugin_lora_count(&self) -> Result<usize> {
        let Some(plugin) = &self.plugin else { return Ok(0) };
        let lora = plugin.lora().map_err(Error::plugin("LoRA"))?;
        Ok(lora.map_or(0, |lora| lora.count() as usize))
    }

    /// The low-rank weights that the plugin brings.
    fn plugin_lora(&self) -> Result<Vec<LoraEntry>> {
        let Some(plugin) = &self.plugin else { return Ok(Vec::new()) };
        let Some(lora) = plugin.lora().map_err(Error::plugin("LoRA"))? else { return Ok(Vec::new()) };
        let entries = lora.entries().map_err(Error::plugin("LoRA"))?;
        let device = self.host.unet().device().clone();
        let entry = |entry: host_api::plugin::LoraEntry| -> Result<LoraEntry> {
            Ok(LoraEntry {
                down: Tensor::from_vec(entry.down, (entry.rank, entry.in_features), &device)?,
                up: Tensor::from_vec(entry.up, (entry.out_features, entry.rank), &device)?,
                module: entry.module,
                scale: entry.scale,
            })
        };
        entries.into_iter().map(entry).collect()
    }

    fn sample(
        &mut self,
        request: &Request,
        observe: &mut dyn FnMut(&Tensor, Option<&StepRecord>),
    ) -> Result<RunOutcome> {
        let mut seconds = Seconds::default();
        let batch = request.batch()?;
        let sampler = request.scheduler.plan(&self.scheduler, request.steps, request.first_step()?)?;
        let Self { text, host, plugin, split, .. } = self;

        let started = Instant::now();
        let conditioning = Conditioning::new(request, text, &host.unet(), &host.lent_on())?;
        seconds.text = started.elapsed().as_secs_f64();

        if let Some(plugin) = plugin {
            let text = conditioning.first().text();
            let run = Run { batch, steps: request.steps, guidance_scale: request.guidance, text };
            plugin.begin(&run).map_err(Error::plugin("begin"))?;
        }
        let (plugin_in_run, split) = (plugin.as_mut(), *split);
        let mut sampling = Sampling { host, plugin: plugin_in_run, split, sampler, conditioning, request, seconds };
        let sampled = sampling.run(observe);
        let seconds = sampling.seconds;
        host.set_text(None);
        let ended = plugin.as_mut().map_or(Ok(()), |plugin| plugin.end().map_err(Error::plugin("end")));
        let (latents, records) = sampled?;
        ended?;
        Ok(RunOutcome { latents, steps: records, lora_entries: 0, seconds })
    }
}

/// A run in progress.
struct Sampling<'a> {
    host: &'a DemoHost,
    plugin: Option<&'a mut Instance>,
    split: bool,
    sampler: Box<dyn Sampler>,
    conditioning: Conditioning,
    request: &'a Request,
    seconds: Seconds,
}

impl Sampling<'_> {
    /// Corrects, predicts and steps, once per evaluation.
    fn run(&mut self, observe: &mut dyn FnMut(&Tensor, Option<&StepRecord>)) -> Result<(Tensor, Vec<StepRecord>)> {
        let mut latents = self.start()?;
        let mut records = Vec::new();
        for i in 0..self.sampler.evaluations().len() {
            let at = self.sampler.evaluations()[i];
            self.host.set_text(Some(self.conditioning.at(at.step).conditional.clone()));
            let started = Instant::now();
            let (corrected, record) = match self.plugin {
                Some(_) => self.correct(&at, &latents).map(|(corrected, record)| (corrected, Some(record)))?,
                None => (latents.clone(), None),
            };
            self.seconds.correction += started.elapsed().as_secs_f64();

            let started = Instant::now();
            // Without guidance there is no unconditional half, and the first is not looked at.
            let (unconditional, from) = match self.request.mode {
                Mode::Paper => (&corrected, &corrected),
                Mode::ConditionOnly => (&latents, &latents),
            };
            let noise = self.predict(i, unconditional, &corrected)?;
            self.seconds.unet += started.elapsed().as_secs_f64();
            latents = self.sampler.step(i, &noise, from)?;
            observe(&latents, record.as_ref());
            records.extend(record);
        }
        Ok((latents, records))
    }

    /// Latents of the first evaluation, in the sampler's space.
    fn start(&self) -> Result<Tensor> {
        let noise = self.request.noise.to_dtype(DType::F32)?;
        match &self.request.image {
            None => Ok((noise * self.sampler.init_noise_sigma())?),
            Some(image) => Ok(self.sampler.add_noise(&image.latents.to_dtype(DType::F32)?, &noise)?),
        }
    }

    /// The latents as the plugin corrects them, and what it did.
    fn correct(&mut self, at: &Evaluation, latents: &Tensor) -> Result<(Tensor, StepRecord)> {
        let plugin = self.plugin.as_deref_mut().expect("called with a plugin");
        let phase = self.conditioning.at(at.step);
        let switched = !std::ptr::eq(phase, self.conditioning.first());
        let step = Step {
            index: at.step,
            count: self.request.steps,
            sub_evaluation: at.sub_evaluation,
            timestep: at.timestep,
            alpha_bar: at.alpha_bar,
            space: match self.sampler.space() {
                Space::VariancePreserving => host_api::Space::Vp,
                Space::Sigma => host_api::Space::Ve,
            },
            extra_inputs: false,
            text: switched.then(|| phase.text()),
        };
        let device = self.host.lent_on();
        let input = tensor_views::lend(&latents.to_device(&device)?).map_err(Error::plugin("latents"))?;
        let mut report = None;
        let corrected = tensor_views::fill(latents.dims(), &device, |out| {
            report = Some(match self.split {
                false => plugin.step(&step, &input.view(), out)?,
                true => split::step(self.host, plugin, &step, &input.view(), out)?,
            });
            Ok(())
        });
        let corrected = corrected.map_err(Error::plugin(format_args!("step {}", step.index)))?;
        let report = report.expect("set where the step succeeded");
        for (item, record) in report.items.iter().enumerate().filter(|(_, item)| item.status != host_api::Status::Ok) {
            log::warn!("step {}, item {item}: not corrected ({:?})", step.index, record.status);
        }
        Ok((corrected.to_device(latents.device())?, StepRecord::new(&step, &report)))
    }

    /// The noise (or v) with classifier-free guidance; both halves in one batch, the unconditional one first.
    fn predict(&self, i: usize, unconditional: &Tensor, conditional: &Tensor) -> Result<Tensor> {
        let (unet, guidance) = (self.host.unet(), self.request.guidance);
        let Evaluation { step, timestep, .. } = self.sampler.evaluations()[i];
        let Phase { keys, .. } = self.conditioning.at(step);
        let batch = conditional.dim(0)?;
        let conditional = self.sampler.model_input(i, conditional)?;
        if guidance == 1. {
            return Ok(unet.forward(&conditional, &vec![timestep; batch], keys)?.to_dtype(DType::F32)?);
        }
        let both = Tensor::cat(&[self.sampler.model_input(i, unconditional)?, conditional], 0)?;
        let both = unet.forward(&both, &vec![timestep; 2 * batch], keys)?.to_dtype(DType::F32)?;
        let (unconditional, conditional) = (both.narrow(0, 0, batch)?, both.narrow(0, batch, batch)?);
        Ok((&unconditional + ((conditional - &unconditional)? * guidance)?)?)
    }
}
