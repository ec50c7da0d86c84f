//! One sampling run with hooks.

use std::time::Instant;

use candle_core::{DType, Tensor};
use diffusion::scheduler::Ddim;
use diffusion::{LoraEntry, TextKeys};
use host_api::host::Instance;
use host_api::{Run, Space, Step, Text, View, ViewMut};

use crate::{Error, Result, Seconds, Session, StepRecord};

/// What to sample.
#[derive(Debug, Clone)]
pub struct Request {
    /// One prompt per item of the batch.
    pub prompts: Vec<String>,
    /// What guidance leads away from; usually empty.
    pub negative: String,
    /// DDIM steps.
    pub steps: usize,
    /// Classifier-free guidance; 1 leaves the unconditional half out.
    pub guidance: f64,
    /// Noise at the first timestep, `[batch, channels, h, w]`.
    pub start: Tensor,
}

/// What a run gave.
pub struct RunOutcome {
    /// Latents after the last step, `[batch, channels, h, w]`.
    pub latents: Tensor,
    /// What the plugin did, one entry per step.
    pub steps: Vec<StepRecord>,
    /// LoRA entries that were merged for the run.
    pub lora_entries: usize,
    /// Where the time went.
    pub seconds: Seconds,
}

impl Session {
    /// Samples. `observe` is called after every step with the step's latents and what the plugin did. The U-Net's weights
    /// are, bit for bit, what they were before, also when the run fails.
    pub fn run(
        &mut self,
        request: &Request,
        observe: &mut dyn FnMut(&Tensor, Option<&StepRecord>),
    ) -> Result<RunOutcome> {
        let started = Instant::now();
        let lora_entries = self.merge_lora()?;
        let lora = started.elapsed().as_secs_f64();
        let result = self.sample(request, observe);
        let restoring = Instant::now();
        if lora_entries > 0 {
            self.host.unet().restore_lora();
        }
        let mut outcome = result?;
        outcome.lora_entries = lora_entries;
        outcome.seconds.load = self.load_seconds;
        outcome.seconds.lora = lora + restoring.elapsed().as_secs_f64();
        Ok(outcome)
    }

    /// Latents as a run gives them to images `[batch, 3, H, W]`, nominally in [-1, 1].
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(self.vae.decode(&(latents / self.vae.config().scaling_factor)?)?)
    }

    /// Merges the plugin's low-rank weights into the U-Net; returns how many there are.
    fn merge_lora(&mut self) -> Result<usize> {
        let Some(plugin) = &self.plugin else { return Ok(0) };
        let Some(lora) = plugin.lora().map_err(Error::plugin("LoRA"))? else { return Ok(0) };
        let entries = lora.entries().map_err(Error::plugin("LoRA"))?;
        let mut unet = self.host.unet();
        let entry = |entry: host_api::plugin::LoraEntry| -> Result<LoraEntry> {
            Ok(LoraEntry {
                down: Tensor::from_vec(entry.down, (entry.rank, entry.in_features), unet.device())?,
                up: Tensor::from_vec(entry.up, (entry.out_features, entry.rank), unet.device())?,
                module: entry.module,
                scale: entry.scale,
            })
        };
        let entries = entries.into_iter().map(entry).collect::<Result<Vec<_>>>()?;
        if !entries.is_empty() {
            unet.merge_lora(&entries, 1.)?;
        }
        Ok(entries.len())
    }

    fn sample(
        &mut self,
        request: &Request,
        observe: &mut dyn FnMut(&Tensor, Option<&StepRecord>),
    ) -> Result<RunOutcome> {
        let mut seconds = Seconds::default();
        let batch = request.start.dim(0)?;
        if request.prompts.len() != batch {
            return Err(Error::Request(format!("{} prompts for a batch of {batch}", request.prompts.len())));
        }
        let scheduler = Ddim::new(&self.scheduler, request.steps)?;
        let Self { text, host, plugin, .. } = self;

        let started = Instant::now();
        let prompts: Vec<&str> = request.prompts.iter().map(String::as_str).collect();
        let conditional = text.encode(&prompts)?;
        let guided = request.guidance != 1.;
        let context = match guided {
            false => conditional.hidden.clone(),
            true => {
                Tensor::cat(&[text.encode(&vec![&*request.negative; batch])?.hidden, conditional.hidden.clone()], 0)?
            }
        };
        let keys = host.unet().text(&context)?;
        let conditional_keys = keys.rows(keys.batch() - batch, batch)?;
        seconds.text = started.elapsed().as_secs_f64();

        if let Some(plugin) = plugin {
            let flat = |t: &Tensor| -> Result<Vec<f32>> { Ok(t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?) };
            let (context, pooled) = (flat(&conditional.hidden)?, flat(&conditional.pooled)?);
            let view = |values, shape| View::new(values, shape).map_err(Error::plugin("text"));
            let text = Text {
                context: Some(view(&context, conditional.hidden.dims())?),
                pooled: Some(view(&pooled, conditional.pooled.dims())?),
                end_of_text: None,
                prompts: Some(&request.prompts),
            };
            let run = Run { batch, steps: request.steps, guidance_scale: request.guidance, text };
            plugin.begin(&run).map_err(Error::plugin("begin"))?;
        }
        host.set_text(Some(conditional_keys));
        let sampled = steps(host, plugin.as_mut(), &scheduler, &keys, request, observe, &mut seconds);
        host.set_text(None);
        let ended = plugin.as_mut().map_or(Ok(()), |plugin| plugin.end().map_err(Error::plugin("end")));
        let (latents, records) = sampled?;
        ended?;
        Ok(RunOutcome { latents, steps: records, lora_entries: 0, seconds })
    }
}

/// Corrects, predicts and steps, once per timestep.
fn steps(
    host: &crate::host::DemoHost,
    mut plugin: Option<&mut Instance>,
    scheduler: &Ddim,
    keys: &TextKeys,
    request: &Request,
    observe: &mut dyn FnMut(&Tensor, Option<&StepRecord>),
    seconds: &mut Seconds,
) -> Result<(Tensor, Vec<StepRecord>)> {
    let mut latents = (request.start.to_dtype(DType::F32)? * scheduler.init_noise_sigma())?;
    let mut records = Vec::new();
    for (index, &timestep) in scheduler.timesteps().iter().enumerate() {
        let mut record = None;
        if let Some(plugin) = plugin.as_deref_mut() {
            let started = Instant::now();
            let step = Step {
                index,
                count: request.steps,
                sub_evaluation: 0,
                timestep,
                alpha_bar: scheduler.alpha_bar(index),
                space: Space::Vp,
                extra_inputs: false,
                text: None,
            };
            let (corrected, done) = correct(plugin, &step, &latents)?;
            latents = corrected;
            record = Some(done);
            seconds.correction += started.elapsed().as_secs_f64();
        }
        let started = Instant::now();
        let noise = predict(host, &latents, timestep, keys, request.guidance)?;
        seconds.unet += started.elapsed().as_secs_f64();
        latents = scheduler.step(index, &noise, &latents)?;
        observe(&latents, record.as_ref());
        records.extend(record);
    }
    Ok((latents, records))
}

fn correct(plugin: &mut Instance, step: &Step, latents: &Tensor) -> Result<(Tensor, StepRecord)> {
    let mut values = latents.flatten_all()?.to_vec1::<f32>()?;
    let mut view = ViewMut::new(&mut values, latents.dims()).map_err(Error::plugin("latents"))?;
    let report = plugin.step_in_place(step, &mut view).map_err(Error::plugin(format_args!("step {}", step.index)))?;
    for (item, report) in report.items.iter().enumerate().filter(|(_, item)| item.status != host_api::Status::Ok) {
        log::warn!("step {}, item {item}: not corrected ({:?})", step.index, report.status);
    }
    Ok((Tensor::from_vec(values, latents.shape(), latents.device())?, StepRecord::new(step, &report)))
}

/// The noise (or v) with classifier-free guidance; both halves in one batch, the unconditional one first.
fn predict(
    host: &crate::host::DemoHost,
    latents: &Tensor,
    timestep: f64,
    keys: &TextKeys,
    guidance: f64,
) -> Result<Tensor> {
    let unet = host.unet();
    let batch = latents.dim(0)?;
    if guidance == 1. {
        return Ok(unet.forward(latents, &vec![timestep; batch], keys)?.to_dtype(DType::F32)?);
    }
    let both = unet.forward(&Tensor::cat(&[latents, latents], 0)?, &vec![timestep; 2 * batch], keys)?;
    let both = both.to_dtype(DType::F32)?;
    let (unconditional, conditional) = (both.narrow(0, 0, batch)?, both.narrow(0, batch, batch)?);
    Ok((&unconditional + ((conditional - &unconditional)? * guidance)?)?)
}
