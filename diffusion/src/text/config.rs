//! What shapes CLIP's text transformer.

use std::path::Path;

use candle_core::Tensor;
use serde::Deserialize;

use crate::config::read_json;
use crate::{Error, Result};

/// `text_encoder/config.json`, as far as it shapes the model.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub max_position_embeddings: usize,
    #[serde(default = "default_activation")]
    pub hidden_act: String,
    #[serde(default = "default_eps")]
    pub layer_norm_eps: f64,
    #[serde(default = "default_eos")]
    pub eos_token_id: u32,
}

// What transformers' CLIPTextConfig assumes for an absent key.
fn default_activation() -> String {
    "quick_gelu".to_owned()
}
fn default_eps() -> f64 {
    1e-5
}
fn default_eos() -> u32 {
    49407
}

impl Config {
    /// Reads `config.json` of a `text_encoder` folder. Fails when the heads do not divide the width.
    pub(crate) fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let config: Self = read_json(&path)?;
        let (d, heads) = (config.hidden_size, config.num_attention_heads);
        if d == 0 || heads == 0 || d % heads != 0 {
            return Err(Error::file(path, format!("hidden_size {d} cannot be split over num_attention_heads {heads}")));
        }
        Ok(config)
    }
}

/// What the perceptrons apply between their two layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Activation {
    /// `x sigmoid(1.702 x)`, OpenAI's CLIP (SD 1.x).
    QuickGelu,
    /// The exact GELU, with erf (SD 2.x).
    Gelu,
}

impl Activation {
    /// The activation that a configuration calls `name`.
    pub fn named(name: &str) -> Result<Self> {
        match name {
            "quick_gelu" => Ok(Self::QuickGelu),
            "gelu" => Ok(Self::Gelu),
            _ => Err(Error::Unsupported(format!(
                "text encoder: hidden_act `{name}` is not supported; expected `quick_gelu` or `gelu`"
            ))),
        }
    }

    /// Elementwise; keeps shape and dtype.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::QuickGelu => (x * candle_nn::ops::sigmoid(&(x * 1.702)?)?)?,
            Self::Gelu => x.gelu_erf()?,
        })
    }
}
