//! Checkpoints in one file under LDM's names: `model.diffusion_model.`, `first_stage_model.`, `cond_stage_model.`.
//!
//! Sizes are read off the tensors' shapes, or taken from a folder of configurations in the diffusers layout for models that are
//! not of Stable Diffusion's sizes. Every tensor is accounted for.

mod infer;
mod names;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use crate::checkpoint::Stored;
use crate::scheduler::{Prediction, SchedulerConfig};
use crate::text::{TextConfig, TextEncoder, Tokenizer};
use crate::{Checkpoint, Error, Result, TextModel, UNet, UNetConfig, Vae, VaeConfig};
use infer::Shapes;
use names::{Names, is_known_leftover};
pub use write::write_single_file;

/// What Stable Diffusion 2 pads prompts with.
const OPEN_CLIP_PAD: &str = "!";

/// What a single file does not say of itself.
#[derive(Clone, Debug, Default)]
pub struct SingleFileOptions {
    /// What the U-Net predicts. Absent: what the header's `modelspec.prediction_type` says, else the noise; the shapes of
    /// SD 2.1's two kinds are the same.
    pub prediction: Option<Prediction>,
    /// A folder with `unet/config.json`, `vae/config.json`, `text_encoder/config.json` and, where the vocabulary is not
    /// CLIP's, `tokenizer`: for models that are not of Stable Diffusion's sizes.
    pub configs: Option<PathBuf>,
}

/// An opened single file: which model it holds, and which of its tensors make which part. Nothing is loaded yet.
pub(crate) struct SingleFile {
    pub(crate) unet: UNetPart,
    pub(crate) vae: VaePart,
    pub(crate) text: TextPart,
    pub(crate) scheduler: SchedulerConfig,
}

/// The U-Net under diffusers' names.
pub(crate) struct UNetPart {
    checkpoint: Checkpoint,
    config: UNetConfig,
}

/// The autoencoder under diffusers' names.
pub(crate) struct VaePart {
    checkpoint: Checkpoint,
    config: VaeConfig,
}

/// The text encoder under transformers' names, and its tokenizer.
pub(crate) struct TextPart {
    checkpoint: Checkpoint,
    config: TextConfig,
    /// The padding token of CLIP's vocabulary.
    pad: &'static str,
    /// A folder that holds another tokenizer.
    tokenizer: Option<PathBuf>,
}

impl UNetPart {
    /// Loads it, whole or up to a tap.
    pub(crate) fn load(self, tap: Option<&str>) -> Result<UNet> {
        UNet::from_checkpoint(self.checkpoint, self.config, tap)
    }
}

impl VaePart {
    pub(crate) fn load(self) -> Result<Vae> {
        Vae::from_checkpoint(self.checkpoint, self.config)
    }
}

impl TextPart {
    pub(crate) fn load(self) -> Result<TextModel> {
        let encoder = TextEncoder::from_checkpoint(self.checkpoint, self.config)?;
        Ok(TextModel::new(tokenizer(&encoder, self.tokenizer.as_deref(), self.pad)?, encoder))
    }
}

impl SingleFile {
    /// Opens `path` and accounts for all of its tensors.
    pub(crate) fn open(path: &Path, options: &SingleFileOptions, dtype: DType, device: &Device) -> Result<Self> {
        let file = Checkpoint::open(path, dtype, device)?;
        let shapes = Shapes(&file);
        shapes.check_kind()?;
        let open_clip = file.shape("cond_stage_model.model.token_embedding.weight").is_some();
        let configs = Configs::read(&shapes, options, open_clip)?;
        let layers = configs.text.num_hidden_layers;
        let views = [
            view(&file, &Names::unet(&configs.unet), &[])?,
            view(&file, &Names::vae(&configs.vae), &matrices_of_vae())?,
            if open_clip { open_clip_view(&file, layers)? } else { view(&file, &Names::clip(), &[])? },
        ];
        account(&file, &views, open_clip.then_some(layers))?;
        let [unet, vae, text] = views.map(|view| file.view(view));
        let pad = if open_clip { OPEN_CLIP_PAD } else { "<|endoftext|>" };
        let Configs { unet: unet_config, vae: vae_config, text: text_config, tokenizer, scheduler } = configs;
        Ok(Self {
            unet: UNetPart { checkpoint: unet, config: unet_config },
            vae: VaePart { checkpoint: vae, config: vae_config },
            text: TextPart { checkpoint: text, config: text_config, pad, tokenizer },
            scheduler,
        })
    }
}

/// What a single file holds.
#[derive(Clone, Debug, PartialEq)]
pub struct SingleFileSummary {
    /// Sizes of the U-Net.
    pub unet: UNetConfig,
    /// Sizes of the autoencoder.
    pub vae: VaeConfig,
    /// Layers of the text encoder that are run, and its width.
    pub text: (usize, usize),
    /// Whether the text encoder is OpenCLIP's (SD 2) rather than CLIP's (SD 1).
    pub open_clip: bool,
    /// What the U-Net predicts.
    pub prediction: Prediction,
}

/// Reads off a single file what it holds, without loading a tensor. Names that belong to no part are an error; what a part
/// itself does not know is found when it is loaded.
pub fn describe_single_file(path: &Path, options: &SingleFileOptions) -> Result<SingleFileSummary> {
    let SingleFile { unet, vae, text, scheduler } = SingleFile::open(path, options, DType::F32, &Device::Cpu)?;
    Ok(SingleFileSummary {
        unet: unet.config,
        vae: vae.config,
        text: (text.config.num_hidden_layers, text.config.hidden_size),
        open_clip: text.pad == OPEN_CLIP_PAD,
        prediction: scheduler.prediction,
    })
}

/// The sizes of every part, from a folder of configurations or read off the shapes.
struct Configs {
    unet: UNetConfig,
    vae: VaeConfig,
    text: TextConfig,
    tokenizer: Option<PathBuf>,
    scheduler: SchedulerConfig,
}

impl Configs {
    fn read(shapes: &Shapes, options: &SingleFileOptions, open_clip: bool) -> Result<Self> {
        let mut configs = match &options.configs {
            Some(folder) => Self::of_folder(folder, shapes.0)?,
            None => {
                let (unet, vae, text) = (shapes.unet()?, shapes.vae()?, shapes.text(open_clip)?);
                let scheduler = scheduler_of(shapes.0)?;
                Self { unet, vae, text, tokenizer: None, scheduler }
            }
        };
        configs.scheduler.prediction = options.prediction.unwrap_or(configs.scheduler.prediction);
        if options.configs.is_none() && configs.scheduler.prediction == Prediction::Velocity {
            // SD 2.x at 768 pixels.
            configs.unet.sample_size = Some(96);
        }
        Ok(configs)
    }

    fn of_folder(folder: &Path, file: &Checkpoint) -> Result<Self> {
        let existing = |name: &str| Some(folder.join(name)).filter(|folder| folder.is_dir());
        Ok(Self {
            unet: UNetConfig::load(&folder.join("unet/config.json"))?,
            vae: VaeConfig::load(&folder.join("vae/config.json"))?,
            text: TextConfig::load(&folder.join("text_encoder"))?,
            tokenizer: existing("tokenizer"),
            scheduler: existing("scheduler")
                .map_or_else(|| scheduler_of(file), |folder| SchedulerConfig::load(&folder))?,
        })
    }
}

/// Stable Diffusion's schedule, with the prediction that the header names.
fn scheduler_of(file: &Checkpoint) -> Result<SchedulerConfig> {
    let prediction = match file.metadata()?.get("modelspec.prediction_type").map(String::as_str) {
        None | Some("epsilon") => Prediction::Epsilon,
        Some("v") => Prediction::Velocity,
        Some(other) => {
            let message = format!("`modelspec.prediction_type` is `{other}`; expected `epsilon` or `v`");
            return Err(Error::file(file.path(), message));
        }
    };
    Ok(SchedulerConfig { prediction, ..SchedulerConfig::stable_diffusion() })
}

/// The folder's tokenizer, else CLIP's own vocabulary where the embeddings are of its size.
fn tokenizer(encoder: &TextEncoder, folder: Option<&Path>, pad: &str) -> Result<Tokenizer> {
    if let Some(folder) = folder {
        return Tokenizer::load(folder, encoder.max_positions());
    }
    let tokenizer = Tokenizer::clip(pad, encoder.max_positions())?;
    let (found, expected) = (encoder.vocab_size(), tokenizer.vocab_size());
    if found != expected {
        let message = format!(
            "the text encoder has {found} tokens, CLIP's vocabulary {expected}; give a folder of configurations with a tokenizer"
        );
        return Err(Error::Unsupported(message));
    }
    Ok(tokenizer)
}

/// Ends of names of the autoencoder's attention weights, which are 1x1 convolutions in the file and matrices here.
fn matrices_of_vae() -> Vec<String> {
    ["to_q", "to_k", "to_v", "to_out.0"].map(|name| format!("attentions.0.{name}.weight")).into()
}

/// One part of the file under diffusers' names; tensors whose names end in one of `matrices` lose their 1x1 extents.
fn view(file: &Checkpoint, names: &Names, matrices: &[String]) -> Result<BTreeMap<String, Stored>> {
    let mut view = BTreeMap::new();
    for name in file.names() {
        let Some(diffusers) = names.to_diffusers(&name) else { continue };
        let mut shape = file.shape(&name).unwrap_or_default();
        if let ([rows, columns, 1, 1], true) = (&shape[..], matrices.iter().any(|end| diffusers.ends_with(end))) {
            shape = vec![*rows, *columns];
        }
        view.insert(diffusers, Stored { name, rows: None, shape });
    }
    Ok(view)
}

/// OpenCLIP's text encoder: the rows of its fused projections are query, key and value.
fn open_clip_view(file: &Checkpoint, layers: usize) -> Result<BTreeMap<String, Stored>> {
    let names = Names::open_clip(layers);
    let mut view = view(file, &names, &[])?;
    for i in 0..layers {
        for part in ["weight", "bias"] {
            // The table gives the fused tensor the name that the layer would have if it were one of its own.
            let fused = format!("encoder.layers.{i}.attn.in_proj_{part}");
            let Some(Stored { name, shape, .. }) = view.remove(&fused) else { continue };
            if shape.is_empty() || shape[0] % 3 != 0 {
                let message = format!("tensor `{name}` has shape {shape:?}, expected rows for query, key and value");
                return Err(Error::file(file.path(), message));
            }
            let rows = shape[0] / 3;
            for (place, projection) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
                let mut shape = shape.clone();
                shape[0] = rows;
                let stored = Stored { name: name.clone(), rows: Some((place * rows, rows)), shape };
                view.insert(format!("encoder.layers.{i}.self_attn.{projection}.{part}"), stored);
            }
        }
    }
    Ok(view)
}

/// Fails when a tensor of the file is in no view and is not known to be of no use.
fn account(file: &Checkpoint, views: &[BTreeMap<String, Stored>; 3], open_clip: Option<usize>) -> Result<()> {
    views.iter().flat_map(BTreeMap::values).for_each(|stored| file.ignore(&stored.name));
    // The layer behind the one whose output is taken.
    let unused = open_clip.map(|layers| format!("cond_stage_model.model.transformer.resblocks.{layers}."));
    let leftover =
        |name: &String| is_known_leftover(name) || unused.as_ref().is_some_and(|prefix| name.starts_with(prefix));
    let left: Vec<_> = file.unclaimed().into_iter().filter(|name| !leftover(name)).collect();
    match left.first() {
        None => Ok(()),
        Some(name) => Err(Error::UnexpectedTensor {
            path: file.path().to_owned(),
            name: name.clone(),
            found: file.shape(name).unwrap_or_default(),
            count: left.len(),
        }),
    }
}
