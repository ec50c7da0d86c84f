//! A whole Stable Diffusion pipeline, from a folder in the diffusers layout or from a single file under LDM's names.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};
use serde_json::Value;

use crate::config::read_json;
use crate::scheduler::SchedulerConfig;
use crate::single_file::{SingleFile, SingleFileOptions};
use crate::text::{TextEmbedding, TextEncoder, Tokenizer};
use crate::{Error, Result, UNet, Vae};

/// Tokenizer and text encoder.
pub struct TextModel {
    tokenizer: Tokenizer,
    encoder: TextEncoder,
}

impl TextModel {
    /// Loads the `tokenizer` and `text_encoder` folders of a pipeline.
    pub fn load(folder: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let encoder = TextEncoder::load(&folder.join("text_encoder"), dtype, device)?;
        Ok(Self { tokenizer: Tokenizer::load(&folder.join("tokenizer"), encoder.max_positions())?, encoder })
    }

    pub(crate) fn new(tokenizer: Tokenizer, encoder: TextEncoder) -> Self {
        Self { tokenizer, encoder }
    }

    /// Tokens of a prompt that do not fit and are cut.
    pub fn dropped(&self, prompt: &str) -> Result<usize> {
        Ok(self.tokenizer.encode(prompt)?.dropped)
    }

    /// Bytes of the weights.
    pub fn weight_bytes(&self) -> u64 {
        self.encoder.weight_bytes()
    }

    /// The last hidden state and the pooled embedding of each prompt. Too long prompts are cut, with a warning.
    pub fn encode(&self, prompts: &[&str]) -> Result<TextEmbedding> {
        let ids = prompts.iter().map(|prompt| Ok(self.tokenizer.encode(prompt)?.ids)).collect::<Result<Vec<_>>>()?;
        self.encoder.encode(&ids)
    }
}

/// Everything that a text-to-image run needs.
pub struct Pipeline {
    /// Prompts to embeddings.
    pub text: TextModel,
    /// Predicts noise.
    pub unet: UNet,
    /// Latents to pixels and back.
    pub vae: Vae,
    /// The noise schedule and the default sampler's settings.
    pub scheduler: SchedulerConfig,
}

/// The parts of a pipeline and the only classes that this crate implements.
const PARTS: [(&str, &str); 4] = [
    ("text_encoder", "CLIPTextModel"),
    ("tokenizer", "CLIPTokenizer"),
    ("unet", "UNet2DConditionModel"),
    ("vae", "AutoencoderKL"),
];

/// What a model does not say of itself; the default asks nothing.
pub type LoadOptions = SingleFileOptions;

impl Pipeline {
    /// Loads the folder that holds `model_index.json`, or a single file. The U-Net, text encoder and VAE compute in `dtype`.
    pub fn load(path: &Path, dtype: DType, device: &Device) -> Result<Self> {
        Self::load_with(path, &LoadOptions::default(), dtype, device)
    }

    /// The same with options. In a folder's case a prediction given overrides the folder's, and configurations are refused.
    pub fn load_with(path: &Path, options: &LoadOptions, dtype: DType, device: &Device) -> Result<Self> {
        let pipeline = if path.is_file() {
            let file = SingleFile::open(path, options, dtype, device)?;
            let SingleFile { unet, vae, text, scheduler } = file;
            Self { text: text.load()?, unet: unet.load(None)?, vae: vae.load()?, scheduler }
        } else {
            Self::load_folder(path, options, dtype, device)?
        };
        let (width, text) = (pipeline.unet.config().cross_attention_dim, pipeline.text.encoder.hidden_size());
        if width != text {
            let message = format!("the U-Net takes text of width {width}, the text encoder makes {text}");
            return Err(Error::file(path, message));
        }
        Ok(pipeline)
    }

    fn load_folder(folder: &Path, options: &LoadOptions, dtype: DType, device: &Device) -> Result<Self> {
        if options.configs.is_some() {
            return Err(Error::Input(format!("{}: a folder has configurations of its own", folder.display())));
        }
        check_index(&folder.join("model_index.json"))?;
        let scheduler = SchedulerConfig::load(&folder.join("scheduler"))?;
        Ok(Self {
            text: TextModel::load(folder, dtype, device)?,
            unet: UNet::load(&folder.join("unet"), dtype, device)?,
            vae: Vae::load(&folder.join("vae"), dtype, device)?,
            scheduler: SchedulerConfig { prediction: options.prediction.unwrap_or(scheduler.prediction), ..scheduler },
        })
    }

    /// `sd1` or `sd2`, told apart by how the U-Net projects to tokens.
    pub fn family(&self) -> &'static str {
        if self.unet.config().use_linear_projection { "sd2" } else { "sd1" }
    }
}

/// The U-Net of a model up to a tap and, where it has one, its text encoder: what a gradient of the U-Net's features needs.
pub fn load_unet_to(
    path: &Path,
    options: &LoadOptions,
    tap: &str,
    dtype: DType,
    device: &Device,
) -> Result<(UNet, Option<TextModel>)> {
    if path.is_file() {
        let SingleFile { unet, text, .. } = SingleFile::open(path, options, dtype, device)?;
        return Ok((unet.load(Some(tap))?, Some(text.load()?)));
    }
    let unet = UNet::load_to(&path.join("unet"), tap, dtype, device)?;
    let text = path.join("text_encoder").is_dir().then(|| TextModel::load(path, dtype, device)).transpose()?;
    Ok((unet, text))
}

/// Every part must be there and of a class that is implemented. Classes are compared without the `Fast` that some
/// tokenizers have.
fn check_index(path: &Path) -> Result<()> {
    let index: BTreeMap<String, Value> = read_json(path)?;
    for (part, expected) in PARTS {
        let found = index.get(part).and_then(|entry| entry.get(1)).and_then(Value::as_str);
        match found {
            Some(class) if class.trim_end_matches("Fast") == expected => {}
            Some(class) => {
                let message = format!("{}: {part} is a {class}; only {expected} is supported", path.display());
                return Err(Error::Unsupported(message));
            }
            None => return Err(Error::file(path, format!("`{part}` is missing; expected a {expected}"))),
        }
    }
    Ok(())
}
