//! What `weights score`, `weights ground` and `weights eval discriminate` have in common: a model and an adapter, ready to judge.

use std::path::PathBuf;

use candle_core::{DType, Device};
use clap::Args;
use diffusion::lora::LoraFile;
use diffusion::{Checkpoint, Pipeline};
use dpt_plugin::{Adapter, AdapterSizes, SizeHints};
use weights::data::Encoder;
use weights::{Discriminator, Error, Result};

use crate::training::{model_or_shipped, native_size};

/// The flags.
#[derive(Args, Clone)]
pub(crate) struct Judge {
    /// The base model: a folder in the diffusers layout, or a single file [default: the shipped weights/shapes]
    #[arg(long, value_name = "DIR|FILE")]
    pub(crate) model: Option<PathBuf>,
    /// The adapter, with LoRA where the file holds it [default: the shipped model's]
    #[arg(long, value_name = "FILE")]
    adapter: Option<PathBuf>,
    /// Name of the U-Net block that the adapter reads, where its file does not say
    #[arg(long)]
    tap: Option<String>,
    /// The adapter's attention heads, where its file does not say
    #[arg(long)]
    heads: Option<usize>,
    /// The adapter's matching queries, where its file does not say
    #[arg(long)]
    matching_queries: Option<usize>,
    /// Keep latents in this folder, for later runs
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Where to compute: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// A loaded judge.
pub(crate) struct Bench {
    pub(crate) discriminator: Discriminator,
    pub(crate) encoder: Encoder,
    pub(crate) device: Device,
    pub(crate) adapter_path: PathBuf,
    pub(crate) model_path: PathBuf,
}

impl Judge {
    pub(crate) fn load(&self) -> Result<Bench> {
        let device = diffusion::device(&self.device)?;
        let model_path = model_or_shipped(self.model.as_deref())?;
        let adapter_path = match (&self.adapter, &self.model) {
            (Some(path), _) => path.clone(),
            (None, None) => host_demo::default_adapter()?,
            (None, Some(_)) => {
                let message = "an adapter belongs to the model it was trained on: give --adapter with --model";
                return Err(Error::Request(message.into()));
            }
        };
        let Pipeline { text, mut unet, vae, scheduler } = Pipeline::load(&model_path, DType::F32, &device)?;
        let file = Checkpoint::open(&adapter_path, DType::F32, &device)?;
        let lora = LoraFile::read(&file)?;
        if let Some(warning) = lora.warning() {
            eprintln!("warning: {warning}");
        }
        unet.merge_lora(&lora.entries, 1.)?;
        let given = SizeHints { tap: self.tap.clone(), heads: self.heads, matching_queries: self.matching_queries };
        let hints = given.or(SizeHints::of_header(&file)?);
        let sizes = AdapterSizes::infer(&file.root(), hints).map_err(|e| Error::file(&adapter_path, e))?;
        let adapter = Adapter::load(&file.root(), sizes)?;
        // The release's head for RoBERTa tokens; nothing here asks it.
        file.ignore_below("contrastive_align_projection_");
        file.finish()?;
        let size = native_size(&unet, &vae)?;
        let encoder = Encoder::new(text, vae, size, &device, self.cache.clone())?;
        let discriminator = Discriminator::new(unet, adapter, &scheduler)?;
        Ok(Bench { discriminator, encoder, device, adapter_path, model_path })
    }
}
