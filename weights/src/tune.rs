//! `weights tune`: the second stage, adapter, heads and low-rank changes of the U-Net's attention, with the denoising loss.

use std::path::PathBuf;

use candle_core::DType;
use clap::Args;
use diffusion::Checkpoint;
use diffusion::lora::LoraFile;
use dpt_plugin::{AdapterSizes, SizeHints};
use serde_json::json;
use weights::train::{Decay, LoraLayers, Model, untrained_lora};
use weights::world::Random;
use weights::{Error, Result};

use crate::training::{StageDefaults, Training, is_small, not_negative};

#[derive(Args)]
pub(crate) struct Tune {
    #[command(flatten)]
    training: Training,
    /// The adapter of the first stage; LoRA in the file is trained on
    #[arg(long, value_name = "FILE")]
    adapter: PathBuf,
    /// Rank of the low-rank changes [default: 4; that of the file where it holds LoRA]
    #[arg(long)]
    rank: Option<usize>,
    /// Which attention gets them [default: cross; that of the file where it holds LoRA]
    #[arg(long, value_enum)]
    layers: Option<LoraLayers>,
    /// Weight of the denoising loss [default: 1; 200 for smaller models, whose errors in predicting noise are so much smaller
    /// that the factors would not feel them beside the other losses]
    #[arg(long, value_parser = not_negative)]
    denoising: Option<f64>,
    /// Name of the U-Net block that the adapter reads, where its file does not say
    #[arg(long)]
    tap: Option<String>,
}

impl Tune {
    const DEFAULTS: StageDefaults = StageDefaults {
        steps: [5_000, 1_000],
        batch: [8, 16],
        accumulate: [8, 1],
        lr: [1e-4, 5e-4],
        warmup: [0, 0],
        decay: [Decay::Cosine, Decay::Cosine],
        dropout: [0.1, 0.],
    };

    pub(crate) fn run(&self) -> Result<()> {
        if self.rank == Some(0) {
            return Err(Error::Request("--rank starts at 1".into()));
        }
        let prepared = self.training.prepare()?;
        let denoising = self.denoising.unwrap_or(if is_small(&prepared.pipeline) { 200. } else { 1. });
        let device = prepared.device.clone();
        let file = Checkpoint::open(&self.adapter, DType::F32, &device)?;
        let before = LoraFile::read(&file)?;
        if let Some(warning) = before.warning() {
            eprintln!("warning: {warning}");
        }
        let hints = SizeHints { tap: self.tap.clone(), ..SizeHints::default() }.or(SizeHints::of_header(&file)?);
        let sizes = AdapterSizes::infer(&file.root(), hints).map_err(|e| Error::file(&self.adapter, e))?;
        let tensor = |name: String| -> Result<_> {
            let shape = file.root().shape(&name).unwrap_or_default();
            let tensor = file.root().tensor(&name, &shape)?;
            Ok((name, tensor))
        };
        // The release's head for RoBERTa tokens is not trained.
        let of_adapter = |name: &String| !name.starts_with("contrastive_align_projection_");
        let adapter = file.unclaimed().into_iter().filter(of_adapter).map(tensor).collect::<Result<_>>()?;
        let lora = match (before.entries.is_empty(), self.rank, self.layers) {
            (true, rank, layers) => {
                let mut random = Random::new(self.training.seed, u64::MAX - 1);
                let layers = layers.unwrap_or(LoraLayers::Cross);
                untrained_lora(&prepared.pipeline.unet, layers, rank.unwrap_or(4), &mut random)?
            }
            (false, None, None) => before.entries,
            (false, ..) => {
                let message = "holds LoRA, which is trained on as it is: --rank and --layers are for new ones";
                return Err(Error::file(&self.adapter, message));
            }
        };
        self.training.train("tune", Self::DEFAULTS, denoising, prepared, |unet, scheduler| {
            let rank = lora.first().map_or(Ok(0), |entry| entry.down.dim(0))?;
            let modules = lora.len();
            let settings = json!({"tap": sizes.tap, "adapter": self.adapter, "rank": rank, "lora_modules": modules});
            Ok((Model::new(unet, sizes, adapter, lora, scheduler)?, settings))
        })
    }
}
