use std::path::PathBuf;

use serde::Deserialize;

use crate::{Error, Result, SizeHints};

/// The JSON schema of the configuration, for user interfaces.
pub const SCHEMA: &str = include_str!("config.schema.json");

/// The plugin's configuration. Relative paths start from the process's current directory.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Adapter weights in the released names: safetensors, or a PyTorch pickle.
    pub adapter: PathBuf,
    /// LoRA weights. Absent: those in the adapter's file, if it has any.
    #[serde(default)]
    pub lora: Option<PathBuf>,
    /// Multiplies every LoRA entry.
    #[serde(default = "one")]
    pub lora_strength: f64,
    /// A diffusers folder of the model that is sampled, where the plugin computes the gradient with its own U-Net.
    #[serde(default)]
    pub base_model: Option<PathBuf>,
    /// Who computes features and gradient. Absent: the plugin when there is a `base_model`, else the host.
    #[serde(default)]
    pub gradient: Option<GradientSource>,
    /// The U-Net block that the adapter reads, where its file does not say.
    #[serde(default)]
    pub tap: Option<String>,
    /// The adapter's attention heads, where its file does not say.
    #[serde(default)]
    pub heads: Option<usize>,
    /// How many of the adapter's queries are for matching, where its file does not say.
    #[serde(default)]
    pub matching_queries: Option<usize>,
    /// Where the adapter and the plugin's own U-Net compute: `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "cpu")]
    pub device: String,
    /// What the plugin's own U-Net computes in: `f32`, `f16` or `bf16`.
    #[serde(default = "f32")]
    pub dtype: String,
    /// Correct also when the host adds U-Net inputs that the plugin's own U-Net cannot see.
    #[serde(default)]
    pub ignore_extra_inputs: bool,
    /// Step size of the correction (Eq. 9).
    #[serde(default = "half")]
    pub eta: f64,
    /// Share of the steps after which correction starts.
    #[serde(default)]
    pub start: f64,
    /// Share of the steps after which it ends.
    #[serde(default = "one")]
    pub end: f64,
    /// Correct every k-th step of that range.
    #[serde(default = "first")]
    pub every: u32,
    /// Bound on the correction's norm relative to the latents'; 0: none.
    #[serde(default)]
    pub max_correction: f64,
    /// Compute the score also in steps that are not corrected, to report it.
    #[serde(default)]
    pub monitor: bool,
}

/// Who computes U-Net features and their gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GradientSource {
    /// The host, through its `gradient/1` extension.
    Host,
    /// The plugin's own U-Net, loaded up to the tap from `base_model`.
    Plugin,
}

fn one() -> f64 {
    1.
}

fn half() -> f64 {
    0.5
}

fn first() -> u32 {
    1
}

fn cpu() -> String {
    "cpu".into()
}

fn f32() -> String {
    "f32".into()
}

impl Config {
    /// Parses JSON; unknown keys, wrong types and a gradient source that cannot work are errors. The ranges of the live
    /// parameters are checked where they are defined.
    pub fn parse(json: &str) -> Result<Self> {
        if json.trim().is_empty() {
            return Err(Error::Config("it is empty; at least `adapter` must be given".into()));
        }
        let config: Self = serde_json::from_str(json).map_err(|e| Error::Config(e.to_string()))?;
        if config.source() == GradientSource::Plugin && config.base_model.is_none() {
            return Err(Error::Config("`gradient` is \"plugin\", which needs a `base_model`".into()));
        }
        if !config.lora_strength.is_finite() {
            return Err(Error::Config(format!(
                "`lora_strength` is {}, expected a finite number",
                config.lora_strength
            )));
        }
        Ok(config)
    }

    /// Who computes the gradient.
    pub fn source(&self) -> GradientSource {
        let default = if self.base_model.is_some() { GradientSource::Plugin } else { GradientSource::Host };
        self.gradient.unwrap_or(default)
    }

    /// What the configuration says of the adapter's sizes.
    pub fn hints(&self) -> SizeHints {
        SizeHints { tap: self.tap.clone(), heads: self.heads, matching_queries: self.matching_queries }
    }
}
