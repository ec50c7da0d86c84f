//! What a file of weights is, as plain data.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};
use diffusion::lora::{LoraFile, LoraLayout};
use diffusion::scheduler::{Prediction, SchedulerConfig};
use diffusion::{Checkpoint, SingleFileOptions, UNetConfig, describe_single_file};
use dpt_plugin::{Adapter, AdapterSizes, SizeHints};
use serde::Serialize;
use serde_json::{Value, json};

use weights::{Error, Result};

/// A file or folder of weights.
#[derive(Serialize)]
pub(crate) struct Summary {
    pub(crate) path: String,
    /// Everything that it is; a released DPT checkpoint is two things.
    pub(crate) kinds: Vec<&'static str>,
    /// `sd1` or `sd2`, where it shows.
    pub(crate) family: Option<&'static str>,
    pub(crate) bytes: u64,
    pub(crate) tensors: usize,
    pub(crate) values: u64,
    /// Tensors by the type of their elements.
    pub(crate) dtypes: BTreeMap<String, usize>,
    pub(crate) adapter: Option<Value>,
    pub(crate) lora: Option<Value>,
    pub(crate) model: Option<Value>,
    /// The header's texts.
    pub(crate) metadata: BTreeMap<String, String>,
    /// Names that belong to nothing that is known here.
    pub(crate) unknown: Vec<String>,
}

/// How the names of an adapter's tensors begin.
const PARTS: [&str; 10] = [
    "bbox_embed.",
    "class_embed.",
    "contrastive_align_projection_",
    "input_proj.",
    "logit_scale",
    "map_to_clip.",
    "query_embed.",
    "semantic_embed.",
    "timestep_embedding.",
    "transformer.",
];

/// CLIP's widths of the two families.
fn family_of_width(width: usize) -> Option<&'static str> {
    match width {
        768 => Some("sd1"),
        1024 => Some("sd2"),
        _ => None,
    }
}

impl Summary {
    /// Looks into a file, or a folder in the diffusers layout.
    pub(crate) fn of(path: &Path) -> Result<Self> {
        if path.is_dir() { Self::of_folder(path) } else { Self::of_file(path) }
    }

    fn new(path: &Path) -> Self {
        Self {
            path: path.display().to_string(),
            kinds: Vec::new(),
            family: None,
            bytes: 0,
            tensors: 0,
            values: 0,
            dtypes: BTreeMap::new(),
            adapter: None,
            lora: None,
            model: None,
            metadata: BTreeMap::new(),
            unknown: Vec::new(),
        }
    }

    fn of_folder(folder: &Path) -> Result<Self> {
        if !folder.join("model_index.json").is_file() {
            let message = "no `model_index.json` in it; expected a folder in the diffusers layout, or a file";
            return Err(Error::Request(format!("{}: {message}", folder.display())));
        }
        let mut summary = Self::new(folder);
        let parts =
            [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")];
        for (part, stem) in parts {
            let file = diffusion::weights_file(&folder.join(part), stem)?;
            summary.count(&Checkpoint::open(&file, DType::F32, &Device::Cpu)?)?;
        }
        let unet = UNetConfig::load(&folder.join("unet/config.json"))?;
        let scheduler = SchedulerConfig::load(&folder.join("scheduler"))?;
        summary.kinds = vec!["diffusers pipeline"];
        summary.family = Some(if unet.use_linear_projection { "sd2" } else { "sd1" });
        summary.model = Some(model(&unet, scheduler.prediction, scheduler.scheduler.map(|scheduler| scheduler.name())));
        Ok(summary)
    }

    fn of_file(path: &Path) -> Result<Self> {
        let file = Checkpoint::open(path, DType::F32, &Device::Cpu)?;
        let mut summary = Self::new(path);
        summary.count(&file)?;
        summary.metadata = file.metadata()?;
        let has = |name: &str| file.root().contains(name);
        let any = |prefix: &str| file.names().iter().any(|name| name.starts_with(prefix));
        if any("model.diffusion_model.") || any("cond_stage_model.") || any("first_stage_model.") {
            summary.single_file(path)?;
            return Ok(summary);
        }
        if has("query_embed.weight") {
            summary.adapter(&file)?;
        }
        let lora = LoraFile::read(&file)?;
        if !lora.layouts.is_empty() {
            summary.lora(&lora);
        }
        let text = ["embeddings.token_embedding.weight", "text_model.embeddings.token_embedding.weight"];
        let parts = [
            ("U-Net of a diffusers folder", has("conv_in.weight") && any("mid_block.") && any("time_embedding.")),
            ("autoencoder of a diffusers folder", has("encoder.conv_in.weight") && has("decoder.conv_in.weight")),
            ("text encoder of a diffusers folder", text.iter().any(|name| has(name))),
        ];
        if let Some((kind, _)) = parts.iter().find(|(_, is)| *is) {
            summary.kinds.push(kind);
            let width =
                file.root().shape(&format!("{}attn2.to_k.weight", "mid_block.attentions.0.transformer_blocks.0."));
            let width = width.or_else(|| text.iter().find_map(|name| file.root().shape(name)));
            summary.family = summary.family.or(width.and_then(|shape| family_of_width(*shape.last()?)));
            return Ok(summary);
        }
        summary.unknown = file.unclaimed();
        if summary.kinds.is_empty() {
            summary.kinds.push("unknown");
        }
        Ok(summary)
    }

    fn count(&mut self, file: &Checkpoint) -> Result<()> {
        for name in file.names() {
            let stored = file.raw(&name)?;
            self.tensors += 1;
            self.values += stored.shape.iter().product::<usize>() as u64;
            self.bytes += stored.data.len() as u64;
            *self.dtypes.entry(format!("{:?}", stored.dtype).to_lowercase()).or_default() += 1;
        }
        Ok(())
    }

    fn single_file(&mut self, path: &Path) -> Result<()> {
        self.kinds = vec!["single-file checkpoint"];
        match describe_single_file(path, &SingleFileOptions::default()) {
            Ok(found) => {
                self.family = Some(if found.unet.use_linear_projection { "sd2" } else { "sd1" });
                let mut described = model(&found.unet, found.prediction, None);
                described["text_encoder"] = json!({
                    "names": if found.open_clip { "OpenCLIP" } else { "CLIP" }, "layers": found.text.0, "width": found.text.1,
                });
                self.model = Some(described);
                Ok(())
            }
            // Told apart by its names all the same; what cannot be read off it is said.
            Err(error @ diffusion::Error::Unsupported(_)) => {
                self.model = Some(json!({"problem": error.to_string()}));
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn adapter(&mut self, file: &Checkpoint) -> Result<()> {
        self.kinds.push("DPT adapter");
        let hints = SizeHints::of_header(file)?;
        let tap = hints.tap.clone();
        let known = SizeHints { tap: Some(tap.clone().unwrap_or_default()), ..hints };
        let described = match AdapterSizes::infer(&file.root(), known) {
            Err(error) => json!({"tap": tap, "problem": error.to_string().trim_start_matches("adapter: ")}),
            Ok(sizes) => {
                self.family = family_of_width(sizes.clip_dim);
                let described = json!({
                    "tap": tap, "channels": sizes.channels, "width": sizes.d_model, "heads": sizes.heads,
                    "feedforward": sizes.feedforward, "encoder_layers": sizes.encoder_layers,
                    "decoder_layers": sizes.decoder_layers, "matching_queries": sizes.matching_queries,
                    "grounding_queries": sizes.grounding_queries, "text_width": sizes.clip_dim, "classes": sizes.classes,
                });
                // Takes what an adapter has, so that the rest is unknown.
                Adapter::load(&file.root(), sizes)?;
                described
            }
        };
        // What belongs to an adapter is known, also where its sizes are not.
        PARTS.iter().for_each(|part| file.ignore_below(part));
        self.adapter = Some(described);
        Ok(())
    }

    fn lora(&mut self, lora: &LoraFile) {
        self.kinds.push("LoRA");
        let (mut ranks, mut scales) = (BTreeMap::<usize, usize>::new(), Vec::new());
        for entry in &lora.entries {
            *ranks.entry(entry.down.dims()[0]).or_default() += 1;
            scales.push(entry.scale);
            if let [.., width] = entry.down.dims()
                && entry.module.ends_with("attn2.to_k")
            {
                self.family = self.family.or(family_of_width(*width));
            }
        }
        scales.sort_by(f64::total_cmp);
        scales.dedup();
        let left: Vec<_> =
            lora.not_applied.iter().map(|left| json!({"module": left.module, "reason": left.reason})).collect();
        self.lora = Some(json!({
            "layouts": lora.layouts.iter().map(|layout: &LoraLayout| layout.name()).collect::<Vec<_>>(),
            "modules": lora.entries.len(), "ranks": ranks, "scales": scales, "not_applied": left,
        }));
    }
}

fn model(unet: &UNetConfig, prediction: Prediction, scheduler: Option<&str>) -> Value {
    json!({
        "levels": unet.block_out_channels, "heads": unet.heads, "text_width": unet.cross_attention_dim,
        "in_channels": unet.in_channels, "taps": unet.taps().iter().map(ToString::to_string).collect::<Vec<_>>(),
        "prediction": match prediction {
            Prediction::Epsilon => "epsilon",
            Prediction::Velocity => "v",
        },
        "scheduler": scheduler,
    })
}
