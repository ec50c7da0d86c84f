use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::{DType, Tensor};
use serde_json::{Value, json};

use super::adamw::{clip_norm, norm_of};
use super::objective::add_gradients;
use super::state::{self, State};
use super::{AdamW, AdamWSettings, Batcher, Gradients, LearningRate, Metrics, Model, Objective};
use crate::data::Encoder;
use crate::{Error, Result};

/// How a run goes.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where its files go.
    pub folder: PathBuf,
    /// Steps of the optimiser.
    pub steps: u64,
    /// Batches whose gradients are averaged for a step.
    pub accumulate: u64,
    /// The optimiser's constants.
    pub optimiser: AdamWSettings,
    /// The learning rate of each step.
    pub learning_rate: LearningRate,
    /// Bound on the norm of all gradients together.
    pub clip: f64,
    /// The state is saved after every so many steps.
    pub save_every: u64,
    /// What else the run depends on: a run is resumed only with the same.
    pub settings: Value,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every step is done.
    Finished,
    /// It was stopped; the state after this many steps is saved.
    Interrupted(u64),
}

/// A training run.
pub struct Trainer<'a> {
    /// Whose parameters are trained.
    pub model: &'a mut Model,
    /// What is minimised.
    pub objective: Objective,
    /// On what.
    pub batcher: Batcher<'a>,
    /// How pictures and texts come in.
    pub encoder: &'a mut Encoder,
    /// How.
    pub plan: Plan,
}

/// The losses in the plot, where they are computed.
const PLOTTED: [&str; 7] =
    ["text_to_image", "image_to_text", "presence", "box_l1", "box_giou", "text_to_object", "denoising"];

impl Trainer<'_> {
    /// The trained weights' file.
    pub const WEIGHTS: &'static str = "adapter.safetensors";

    fn settings(&self) -> Value {
        let Plan { steps, accumulate, optimiser, learning_rate, clip, settings, .. } = &self.plan;
        let mut all = json!({
            "steps": steps,
            "accumulate": accumulate,
            "learning_rate": learning_rate.peak,
            "warmup": learning_rate.warmup,
            "decay": format!("{:?}", learning_rate.decay).to_lowercase(),
            "betas": [optimiser.beta1, optimiser.beta2],
            "weight_decay": optimiser.weight_decay,
            "clip": clip,
        });
        let object = all.as_object_mut().expect("made above");
        object.extend(settings.as_object().cloned().unwrap_or_default());
        all
    }

    /// Trains to the last step, or until `stop` is set. With `resume` it goes on from the folder's saved state, to the same
    /// weights as a run without interruption; without, a folder that holds a run's files is refused. A step that fails leaves
    /// what was made before it saved.
    pub fn run(&mut self, resume: bool, stop: &AtomicBool, report: &mut dyn FnMut(u64, &Metrics)) -> Result<Outcome> {
        let folder = self.plan.folder.clone();
        std::fs::create_dir_all(&folder).map_err(|e| Error::file(&folder, e))?;
        let (path, settings) = (folder.join(state::FILE), self.settings());
        let mut optimiser = AdamW::new(self.plan.optimiser, BTreeMap::new());
        let mut step = 0;
        if resume {
            let saved = State::open(&path, self.model.discriminator().unet().device())?;
            saved.check(&path, &settings)?;
            saved.restore(&path, self.model.parameters())?;
            self.model.refresh()?;
            step = saved.step;
            optimiser = saved.optimiser(self.plan.optimiser);
        } else if let Some(made) = [state::FILE, Self::WEIGHTS, Metrics::FILE].iter().find(|f| folder.join(f).exists())
        {
            let message = "is there from another run; --resume goes on with it, or choose another folder";
            return Err(Error::file(&folder.join(made), message));
        }
        let mut metrics = Metrics::open(&folder, step)?;
        while step < self.plan.steps {
            if stop.load(Ordering::Relaxed) {
                self.save(&path, step, &settings, &optimiser)?;
                return Ok(Outcome::Interrupted(step));
            }
            let started = Instant::now();
            let (gradients, mut values) = match self.gradients(step) {
                Ok(found) => found,
                Err(error) => {
                    // Nothing was changed by the step that failed: what those before it made is kept.
                    self.save(&path, step, &settings, &optimiser)?;
                    return Err(error);
                }
            };
            let rate = self.plan.learning_rate.at(step, self.plan.steps);
            values.insert("learning_rate".into(), rate);
            optimiser.step(self.model.parameters(), &gradients, rate)?;
            self.model.refresh()?;
            self.model.discriminator().unet().device().synchronize()?;
            values.insert("seconds".into(), started.elapsed().as_secs_f64());
            step += 1;
            metrics.add(step, &values)?;
            report(step, &metrics);
            if step % self.plan.save_every == 0 {
                self.save(&path, step, &settings, &optimiser)?;
            }
        }
        self.save(&path, step, &settings, &optimiser)?;
        metrics.plot(&folder.join("curves.png"), &PLOTTED)?;
        Ok(Outcome::Finished)
    }

    fn save(&self, path: &Path, step: u64, settings: &Value, optimiser: &AdamW) -> Result<()> {
        state::save(path, step, settings, self.model.parameters(), optimiser)?;
        let mut training = settings.clone();
        training["step"] = step.into();
        self.model.save(&self.plan.folder.join(Self::WEIGHTS), &training)
    }

    /// What a step of the optimiser goes by, the means over its batches and bounded, and the numbers to report.
    fn gradients(&mut self, step: u64) -> Result<(Gradients, BTreeMap<String, f64>)> {
        let Plan { accumulate, clip, .. } = self.plan;
        let (mut sums, mut losses) = (Gradients::new(), BTreeMap::<&str, (f64, u64)>::new());
        let device = self.model.discriminator().unet().device().clone();
        let mut data_seconds = 0.;
        for part in 0..accumulate {
            let encoding = Instant::now();
            let batch = self.batcher.batch(step * accumulate + part, self.encoder, &device)?;
            device.synchronize()?;
            data_seconds += encoding.elapsed().as_secs_f64();
            let (found, gradients) = self.objective.evaluate(self.model, &batch)?;
            for (name, loss) in found {
                let (sum, count) = losses.entry(name).or_default();
                (*sum, *count) = (*sum + loss, *count + 1);
            }
            let mean = |(name, gradient): (String, Tensor)| Ok((name, (gradient.detach() / accumulate as f64)?));
            add_gradients(&mut sums, gradients.into_iter().map(mean).collect::<Result<Vec<_>>>()?.into_iter())?;
        }
        let lora = norm_of(sums.iter().filter(|(name, _)| name.starts_with("unet.")).map(|(_, gradient)| gradient))?;
        let norm = clip_norm(&mut sums, clip)?;
        if !norm.is_finite() {
            let message = format!("step {}: the gradients hold NaN or infinity; nothing was changed", step + 1);
            return Err(Error::Request(message));
        }
        // Some batches have no expressions: the mean of a loss is over those that have it.
        let mean = |(name, (sum, count)): (&str, (f64, u64))| (name.to_owned(), sum / count as f64);
        let mut values: BTreeMap<String, f64> = losses.into_iter().map(mean).collect();
        let scale = self.model.discriminator().adapter().logit_scale().to_dtype(DType::F64)?.to_scalar::<f64>()?;
        values.insert("tau".into(), (-scale).exp());
        values.insert("gradient_norm".into(), norm);
        // Of the low-rank factors' part alone: how the losses' weights should be chosen.
        if !self.model.lora().is_empty() {
            values.insert("lora_gradient_norm".into(), lora);
        }
        // Of the step's seconds, what drawing, reading and encoding took.
        values.insert("data_seconds".into(), data_seconds);
        Ok((sums, values))
    }
}
