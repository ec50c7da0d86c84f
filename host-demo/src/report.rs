//! What a run did, as JSON.

use std::path::Path;

use diffusion::lora::LoraFile;
use host_api::{ItemReport, Outcome, Status};
use serde::Serialize;

/// Everything that makes a run repeatable.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs, reason = "the names are those of the command line")]
pub struct Settings {
    pub prompt: String,
    pub negative: String,
    pub model: String,
    pub plugin: Option<String>,
    /// The plugin's configuration.
    pub config: Option<serde_json::Value>,
    pub scheduler: &'static str,
    pub mode: &'static str,
    pub steps: usize,
    pub guidance: f64,
    pub seed: u64,
    pub batch: usize,
    pub width: usize,
    pub height: usize,
    pub latents: Option<String>,
    pub image: Option<String>,
    pub strength: Option<f64>,
    /// Prompts from a share of the schedule on.
    pub prompt_at: Vec<(f64, String)>,
    /// The host's own LoRA files.
    pub lora: Vec<LoraRecord>,
    pub device: String,
    pub dtype: String,
}

/// A LoRA file of the host's own.
#[derive(Debug, Clone, Serialize)]
pub struct LoraRecord {
    /// The file.
    pub path: String,
    /// Multiplies its entries.
    pub strength: f64,
    /// Attention projections that it changes.
    pub entries: usize,
    /// Modules that it would change too, which are left as they are, with the reason.
    pub not_applied: Vec<(String, &'static str)>,
}

impl LoraRecord {
    /// What `file`, read from `path`, brings.
    pub fn new(path: &Path, strength: f64, file: &LoraFile) -> Self {
        let not_applied = file.not_applied.iter().map(|left| (left.module.clone(), left.reason));
        let path = path.display().to_string();
        Self { path, strength, entries: file.entries.len(), not_applied: not_applied.collect() }
    }
}

/// A run from beginning to end.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What was asked for.
    pub settings: Settings,
    /// One entry per evaluation of the U-Net; empty without a plugin.
    pub steps: Vec<StepRecord>,
    /// LoRA entries that were merged for the run.
    pub lora_entries: usize,
    /// Where the time went.
    pub seconds: Seconds,
    /// Peak resident memory of the process in bytes, where the system tells it.
    pub peak_memory_bytes: Option<u64>,
    /// Bytes of weights that the plugin holds.
    pub plugin_memory_bytes: Option<u64>,
    /// The pictures.
    pub images: Vec<String>,
}

/// Wall-clock seconds by phase.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Seconds {
    /// Loading model and plugin.
    pub load: f64,
    /// Text encoders, and keys and values of the text.
    pub text: f64,
    /// Merging LoRA and taking it out.
    pub lora: f64,
    /// The plugin's steps, with the U-Net's share of them.
    pub correction: f64,
    /// Guided noise predictions.
    pub unet: f64,
    /// Latents to pixels.
    pub decode: f64,
}

/// What the plugin did before one evaluation of the U-Net.
#[derive(Debug, Clone, Serialize)]
pub struct StepRecord {
    /// Counted from the schedule's beginning.
    pub index: usize,
    /// 0 for the step's first evaluation of the U-Net.
    pub sub_evaluation: usize,
    /// Training timestep.
    pub timestep: f64,
    /// Cumulative alpha at it.
    pub alpha_bar: f64,
    /// Whether the step was corrected, or why not.
    pub outcome: &'static str,
    /// Spent in the plugin.
    pub seconds: f64,
    /// One per item of the batch.
    pub items: Vec<ItemRecord>,
}

/// What the plugin did to one item. Numbers that were not computed are null.
#[derive(Debug, Clone, Serialize)]
pub struct ItemRecord {
    /// `ok`, or why the item was left as it was.
    pub status: String,
    /// Matching score before the correction.
    pub score: Option<f32>,
    /// L2 norm of the score's gradient for the latents.
    pub gradient_norm: Option<f32>,
    /// L2 norm of what was added to the latents.
    pub correction_norm: f32,
}

impl StepRecord {
    pub(crate) fn new(step: &host_api::Step, report: &host_api::Report) -> Self {
        Self {
            index: step.index,
            sub_evaluation: step.sub_evaluation,
            timestep: step.timestep,
            alpha_bar: step.alpha_bar,
            outcome: outcome_name(report.outcome),
            seconds: report.seconds,
            items: report.items.iter().map(ItemRecord::new).collect(),
        }
    }

    /// Mean of the items' scores; `None` when none was computed.
    pub fn mean_score(&self) -> Option<f32> {
        let scores: Vec<f32> = self.items.iter().filter_map(|item| item.score).collect();
        (!scores.is_empty()).then(|| scores.iter().sum::<f32>() / scores.len() as f32)
    }
}

impl ItemRecord {
    fn new(item: &ItemReport) -> Self {
        let known = |value: f32| value.is_finite().then_some(value);
        Self {
            status: if item.status == Status::Ok { "ok".into() } else { format!("{:?}", item.status) },
            score: known(item.score),
            gradient_norm: known(item.gradient_norm),
            correction_norm: item.correction_norm,
        }
    }
}

fn outcome_name(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Corrected => "corrected",
        Outcome::SkippedStrength => "skipped: eta is 0",
        Outcome::SkippedRange => "skipped: outside the range of steps",
        Outcome::SkippedInterval => "skipped: between corrected steps",
        Outcome::SkippedSubEvaluation => "skipped: not the step's first evaluation",
        Outcome::SkippedEmpty => "skipped: empty batch",
    }
}
