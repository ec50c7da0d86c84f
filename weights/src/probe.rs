//! `weights probe`: the first stage, adapter and heads on the frozen U-Net.

use candle_core::Tensor;
use clap::Args;
use dpt_plugin::AdapterSizes;
use serde_json::json;
use weights::train::{Decay, Model, untrained};
use weights::world::Random;
use weights::{Error, Result};

use crate::training::{StageDefaults, Training, is_small, positive};

#[derive(Args)]
pub(crate) struct Probe {
    #[command(flatten)]
    training: Training,
    /// The U-Net block that the adapter reads
    #[arg(long, default_value = "mid")]
    tap: String,
    /// d, the adapter's width [default: 256; 128 for smaller models]
    #[arg(long)]
    width: Option<usize>,
    /// Attention heads
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Hidden width of the feed-forward layers [default: 2048; 256 for smaller models]
    #[arg(long)]
    feedforward: Option<usize>,
    /// Encoder layers
    #[arg(long, default_value_t = 1)]
    encoder_layers: usize,
    /// Decoder layers
    #[arg(long, default_value_t = 1)]
    decoder_layers: usize,
    /// M, the queries for matching [default: 10; 8 for smaller models]
    #[arg(long)]
    matching_queries: Option<usize>,
    /// K, the queries for grounding [default: 100; 12 for smaller models]
    #[arg(long)]
    grounding_queries: Option<usize>,
    /// Temperature of the matching loss before it is learned, at least 0.01
    #[arg(long, default_value_t = 0.07, value_parser = temperature)]
    temperature: f64,
}

impl Probe {
    const DEFAULTS: StageDefaults = StageDefaults {
        steps: [60_000, 800],
        batch: [48, 48],
        accumulate: [1, 1],
        lr: [1e-4, 5e-4],
        warmup: [0, 30],
        decay: [Decay::Constant, Decay::Cosine],
        dropout: [0.1, 0.],
    };

    pub(crate) fn run(&self) -> Result<()> {
        let prepared = self.training.prepare()?;
        let small = is_small(&prepared.pipeline);
        let pick = |given: Option<usize>, paper: usize, less: usize| given.unwrap_or(if small { less } else { paper });
        let unet = prepared.pipeline.unet.config();
        let tap = unet.tap(&self.tap)?;
        let sizes = AdapterSizes {
            tap: self.tap.clone(),
            channels: unet.tap_channels(tap),
            d_model: pick(self.width, 256, 128),
            heads: self.heads,
            feedforward: pick(self.feedforward, 2048, 256),
            encoder_layers: self.encoder_layers,
            decoder_layers: self.decoder_layers,
            matching_queries: pick(self.matching_queries, 10, 8),
            grounding_queries: pick(self.grounding_queries, 100, 12),
            clip_dim: unet.cross_attention_dim,
            classes: 1,
        };
        sizes.check()?;
        if sizes.grounding_queries == 0 && self.training.grounding != 0. {
            return Err(Error::Request("--grounding-queries 0 needs --grounding 0".into()));
        }
        let device = prepared.device.clone();
        let mut tensors = untrained(&sizes, &mut Random::new(self.training.seed, u64::MAX), &device)?;
        tensors.insert("logit_scale".into(), Tensor::new((1. / self.temperature).ln() as f32, &device)?);
        self.training.train("probe", Self::DEFAULTS, 0., prepared, |unet, scheduler| {
            let settings = json!({
                "tap": sizes.tap,
                "width": sizes.d_model,
                "heads": sizes.heads,
                "feedforward": sizes.feedforward,
                "layers": [sizes.encoder_layers, sizes.decoder_layers],
                "queries": [sizes.matching_queries, sizes.grounding_queries],
                "temperature": self.temperature,
            });
            Ok((Model::new(unet, sizes, tensors, Vec::new(), scheduler)?, settings))
        })
    }
}

/// Training keeps 1 / tau at 100 or below, as CLIP does.
fn temperature(text: &str) -> std::result::Result<f64, String> {
    positive(text).ok().filter(|tau| *tau >= 0.01).ok_or_else(|| "expected a finite number from 0.01".into())
}
