//! What `weights probe` and `weights tune` have in common: their flags, and how a run is put together.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device};
use clap::{ArgAction, Args};
use diffusion::scheduler::SchedulerConfig;
use diffusion::{Pipeline, UNet, Vae};
use dpt_plugin::loss::{GroundingLoss, GroundingWeights, PresenceLoss};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use weights::data::{Encoder, Manifest, ShapesSource, Source};
use weights::train::{
    AdamWSettings, Batcher, Contrast, Decay, LearningRate, LossWeights, Model, Objective, Outcome, Plan, Trainer,
};
use weights::world::Split;
use weights::{Error, Result};

/// Flags of both stages.
#[derive(Args, Clone)]
pub(crate) struct Training {
    /// The base model: a folder in the diffusers layout, or a single file [default: the shipped weights/shapes]
    #[arg(long, value_name = "DIR|FILE")]
    pub(crate) model: Option<PathBuf>,
    /// What to train on: `shapes`, or a folder with pictures and a manifest.jsonl
    #[arg(long, default_value = "shapes", value_name = "shapes|DIR")]
    data: String,
    /// Scenes of the shapes world
    #[arg(long, default_value_t = 4096)]
    examples: usize,
    /// Keep latents in this folder, for later runs
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Where weights, state, metrics and curves go
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Go on with the run in that folder
    #[arg(long)]
    resume: bool,
    /// Steps of the optimiser [default: the paper's for Stable Diffusion's sizes, fewer for smaller models]
    #[arg(long)]
    steps: Option<u64>,
    /// Items of a batch
    #[arg(long)]
    batch: Option<usize>,
    /// Batches whose gradients are averaged for a step
    #[arg(long)]
    accumulate: Option<u64>,
    /// Highest learning rate
    #[arg(long, value_parser = not_negative)]
    lr: Option<f64>,
    /// Steps over which the learning rate rises
    #[arg(long)]
    warmup: Option<u64>,
    /// What becomes of the learning rate then
    #[arg(long, value_enum)]
    decay: Option<Decay>,
    /// AdamW's decay of the mean gradient and of the mean squared gradient
    #[arg(long, action = ArgAction::Set, num_args = 2, value_names = ["BETA1", "BETA2"], value_parser = probability, default_values_t = [AdamWSettings::DEFAULT.beta1, AdamWSettings::DEFAULT.beta2])]
    betas: Vec<f64>,
    /// Share of a parameter that is taken away at each step, times the learning rate
    #[arg(long, default_value_t = AdamWSettings::DEFAULT.weight_decay, value_parser = not_negative)]
    weight_decay: f64,
    /// Bound on the norm of the gradients
    #[arg(long, default_value_t = 1., value_parser = positive)]
    clip: f64,
    /// Whom pictures and captions are held against
    #[arg(long, value_enum, default_value = "triplets")]
    contrast: Contrast,
    /// Weight of the matching loss
    #[arg(long, default_value_t = 1., value_parser = not_negative)]
    matching: f64,
    /// Weight of the grounding loss
    #[arg(long, default_value_t = 1., value_parser = not_negative)]
    pub(crate) grounding: f64,
    /// Weights of presence, L1 distance, generalised IoU and contrast in the grounding loss (Eq. 7)
    #[arg(long, action = ArgAction::Set, num_args = 4, value_names = ["PRESENCE", "L1", "GIOU", "CONTRAST"], value_parser = not_negative, default_values_t = GroundingWeights::DEFAULT.loss)]
    grounding_terms: Vec<f64>,
    /// Weights of presence, L1 distance and generalised IoU in the choice of the query (Eq. 5)
    #[arg(long, action = ArgAction::Set, num_args = 3, value_names = ["PRESENCE", "L1", "GIOU"], value_parser = not_negative, default_values_t = GroundingWeights::DEFAULT.cost)]
    grounding_costs: Vec<f64>,
    /// Temperature of the contrast between expressions and queries (Eq. 6)
    #[arg(long, default_value_t = GroundingLoss::DEFAULT.temperature, value_parser = positive)]
    grounding_temperature: f64,
    /// What a query that was not matched counts for in the cross-entropy of the grounding probability
    #[arg(long, default_value_t = 0.1, value_parser = not_negative, value_name = "WEIGHT")]
    no_object: f64,
    /// Teach the grounding probability by Eq. 7 alone, as in the paper, and not by cross-entropy
    #[arg(long, conflicts_with = "no_object")]
    paper_presence: bool,
    /// Probability that the adapter drops a value [default: 0.1; 0 for smaller models]
    #[arg(long, value_parser = probability)]
    dropout: Option<f64>,
    /// Save after every so many steps
    #[arg(long, default_value_t = 200)]
    save_every: u64,
    /// Another seed, other scenes, noise and order
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Where to compute: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// What a stage's paper sizes are, and those for smaller models.
pub(crate) struct StageDefaults {
    pub(crate) steps: [u64; 2],
    pub(crate) batch: [usize; 2],
    pub(crate) accumulate: [u64; 2],
    pub(crate) lr: [f64; 2],
    pub(crate) warmup: [u64; 2],
    pub(crate) decay: [Decay; 2],
    pub(crate) dropout: [f64; 2],
}

/// A loaded base model and what it is trained on.
pub(crate) struct Prepared {
    pub(crate) pipeline: Pipeline,
    pub(crate) model_path: PathBuf,
    pub(crate) device: Device,
    pub(crate) source: Box<dyn Source>,
}

impl Training {
    pub(crate) fn prepare(&self) -> Result<Prepared> {
        let device = diffusion::device(&self.device)?;
        let model_path = model_or_shipped(self.model.as_deref())?;
        let pipeline = Pipeline::load(&model_path, DType::F32, &device)?;
        let source: Box<dyn Source> = match self.data.as_str() {
            "shapes" => Box::new(ShapesSource { seed: self.seed, split: Some(Split::Train), len: self.examples }),
            folder => Box::new(Manifest::open(Path::new(folder))?),
        };
        Ok(Prepared { pipeline, model_path, device, source })
    }

    fn objective(&self, denoising: f64, dropout: f64) -> Objective {
        let presence = match self.paper_presence {
            true => PresenceLoss::Paper,
            false => PresenceLoss::CrossEntropy { others: self.no_object },
        };
        let numbers = "clap sees to their number";
        let weights = GroundingWeights {
            loss: self.grounding_terms[..].try_into().expect(numbers),
            cost: self.grounding_costs[..].try_into().expect(numbers),
        };
        Objective {
            weights: LossWeights { matching: self.matching, grounding: self.grounding, denoising },
            contrast: self.contrast,
            grounding: GroundingLoss { weights, presence, temperature: self.grounding_temperature },
            dropout,
        }
    }

    fn plan(&self, defaults: &StageDefaults, size: usize, settings: Value) -> Result<Plan> {
        let plan = Plan {
            folder: self.out.clone(),
            steps: self.steps.unwrap_or(defaults.steps[size]),
            accumulate: self.accumulate.unwrap_or(defaults.accumulate[size]),
            optimiser: AdamWSettings {
                beta1: self.betas[0],
                beta2: self.betas[1],
                weight_decay: self.weight_decay,
                ..AdamWSettings::DEFAULT
            },
            learning_rate: LearningRate {
                peak: self.lr.unwrap_or(defaults.lr[size]),
                warmup: self.warmup.unwrap_or(defaults.warmup[size]),
                decay: self.decay.unwrap_or(defaults.decay[size]),
            },
            clip: self.clip,
            save_every: self.save_every,
            settings,
        };
        if [plan.steps, plan.accumulate, plan.save_every].contains(&0) {
            return Err(Error::Request("--steps, --accumulate and --save-every start at 1".into()));
        }
        Ok(plan)
    }

    /// Trains and says how it ended. `make` gives the model and what the stage adds to the settings.
    pub(crate) fn train(
        &self,
        stage: &str,
        defaults: StageDefaults,
        denoising: f64,
        prepared: Prepared,
        make: impl FnOnce(UNet, &SchedulerConfig) -> Result<(Model, Value)>,
    ) -> Result<()> {
        let Prepared { pipeline, model_path, device, source } = prepared;
        let size = usize::from(is_small(&pipeline));
        let batch = self.batch.unwrap_or(defaults.batch[size]);
        let dropout = self.dropout.unwrap_or(defaults.dropout[size]);
        let objective = self.objective(denoising, dropout);
        if self.matching == 0. && self.grounding == 0. && denoising == 0. {
            return Err(Error::Request("every loss has weight 0: there is nothing to learn".into()));
        }
        if self.matching != 0. && self.contrast == Contrast::InBatch && batch < 2 {
            return Err(Error::Request("--contrast in-batch needs a --batch of at least 2".into()));
        }
        let Pipeline { text, unet, vae, scheduler } = pipeline;
        let pixels = native_size(&unet, &vae)?;
        let mut encoder = Encoder::new(text, vae, pixels, &device, self.cache.clone())?;
        let (mut model, added) = make(unet, &scheduler)?;
        let mut settings = json!({
            "stage": stage,
            "model": model_path,
            "data": source.describe(),
            "batch": batch,
            "contrast": format!("{:?}", self.contrast).to_lowercase(),
            "losses": {"matching": self.matching, "grounding": self.grounding, "denoising": denoising},
            "grounding": {
                "terms": self.grounding_terms,
                "costs": self.grounding_costs,
                "temperature": self.grounding_temperature,
                "no_object": (!self.paper_presence).then_some(self.no_object),
            },
            "dropout": dropout,
            "seed": self.seed,
        });
        settings.as_object_mut().expect("made above").extend(added.as_object().cloned().unwrap_or_default());
        let plan = self.plan(&defaults, size, settings)?;
        let steps = plan.steps;
        let batcher = Batcher::new(
            source.as_ref(),
            self.seed,
            batch,
            model.discriminator().timesteps(),
            objective.needs_negatives(),
        )?;
        let mut trainer = Trainer { model: &mut model, objective, batcher, encoder: &mut encoder, plan };
        let template = "{bar:32} {pos}/{len} {msg}, {elapsed} of {duration}";
        let bar = ProgressBar::new(steps).with_style(ProgressStyle::with_template(template).expect("valid"));
        let stop = on_interrupt()?;
        let outcome = trainer.run(self.resume, &stop, &mut |step, metrics| {
            bar.set_position(step);
            let mean = |name: &str| metrics.recent(name, 20);
            let shown = ["loss", "text_to_image", "image_to_text", "box_giou", "denoising"];
            let shown = shown.iter().filter_map(|name| Some(format!("{name} {:.3}", mean(name)?)));
            bar.set_message(shown.collect::<Vec<_>>().join(", "));
        })?;
        bar.finish_and_clear();
        match outcome {
            Outcome::Finished => println!("{}", self.out.join(Trainer::WEIGHTS).display()),
            Outcome::Interrupted(step) => {
                println!("stopped and saved after {step} of {steps} steps; --resume goes on");
            }
        }
        Ok(())
    }
}

/// Below 1.
fn probability(text: &str) -> std::result::Result<f64, String> {
    not_negative(text).ok().filter(|number| *number < 1.).ok_or_else(|| "expected a number from 0, below 1".into())
}

pub(crate) fn not_negative(text: &str) -> std::result::Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.);
    number.ok_or_else(|| "expected a finite number, 0 or more".into())
}

pub(crate) fn positive(text: &str) -> std::result::Result<f64, String> {
    not_negative(text).ok().filter(|number| *number > 0.).ok_or_else(|| "expected a finite number above 0".into())
}

/// Width and height in pixels that a model was trained at.
pub(crate) fn native_size(unet: &UNet, vae: &Vae) -> Result<(u32, u32)> {
    let side = unet.config().sample_size.unwrap_or(64).saturating_mul(vae.config().latent_scale());
    let side = u32::try_from(side).map_err(|_| Error::Request(format!("pictures of {side} pixels are too large")))?;
    Ok((side, side))
}

/// Smaller than Stable Diffusion: text of less than 768 channels.
pub(crate) fn is_small(pipeline: &Pipeline) -> bool {
    pipeline.unet.config().cross_attention_dim < 768
}

pub(crate) fn model_or_shipped(model: Option<&Path>) -> Result<PathBuf> {
    match model {
        Some(path) => Ok(path.to_owned()),
        None => Ok(host_demo::default_model()?),
    }
}

/// Set by the first interrupt; the second ends the program.
fn on_interrupt() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let set = stop.clone();
    ctrlc::set_handler(move || {
        if set.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("stopping after this step; once more to stop at once");
    })
    .map_err(|e| Error::Request(format!("cannot listen for interrupts: {e}")))?;
    Ok(stop)
}
