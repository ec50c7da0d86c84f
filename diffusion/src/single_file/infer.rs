//! What the shapes of a single file's tensors say of its model.

use crate::text::TextConfig;
use crate::{Checkpoint, Error, Result, UNetConfig, VaeConfig};

const UNET: &str = "model.diffusion_model";
const VAE: &str = "first_stage_model";

/// Looks up shapes by name; errors say which tensor the answer would be in.
pub(super) struct Shapes<'a>(pub(super) &'a Checkpoint);

impl Shapes<'_> {
    fn find(&self, name: &str) -> Option<Vec<usize>> {
        self.0.shape(name)
    }

    fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// Extent `axis` of a tensor.
    fn extent(&self, name: &str, axis: usize) -> Result<usize> {
        let found = self.find(name);
        found.as_ref().and_then(|shape| shape.get(axis)).copied().ok_or_else(|| {
            Error::file(self.0.path(), format!("tensor `{name}` is missing or has too few dimensions: {found:?}"))
        })
    }

    fn refuse(&self, message: String) -> Error {
        Error::Unsupported(format!("{}: {message}", self.0.path().display()))
    }

    /// How many of `name(0)`, `name(1)`, .. there are.
    fn count(&self, name: impl Fn(usize) -> String) -> usize {
        (0..).take_while(|i| self.has(&name(*i))).count()
    }

    /// Fails, with what the file seems to be, unless it has a Stable Diffusion 1 or 2 model.
    pub(super) fn check_kind(&self) -> Result<()> {
        let names = self.0.names();
        let any = |prefix: &str| names.iter().any(|name| name.starts_with(prefix));
        let others = [
            ("conditioner.", "Stable Diffusion XL"),
            ("model.diffusion_model.label_emb.", "Stable Diffusion XL or a model of its kind"),
            ("model.diffusion_model.joint_blocks.", "Stable Diffusion 3"),
            ("model.diffusion_model.double_blocks.", "Flux"),
            ("double_blocks.", "Flux"),
            ("control_model.", "a ControlNet"),
            ("lora_unet_", "LoRA weights"),
            ("unet.", "LoRA weights or a DPT checkpoint"),
            ("query_embed.", "a DPT adapter"),
        ];
        if let Some((_, what)) = others.iter().find(|(prefix, _)| any(prefix)) {
            return Err(
                self.refuse(format!("this seems to be {what}; expected a Stable Diffusion 1.x or 2.x checkpoint"))
            );
        }
        let parts = [
            ("U-Net", "model.diffusion_model."),
            ("autoencoder", "first_stage_model."),
            ("text encoder", "cond_stage_model."),
        ];
        match parts.iter().find(|(_, prefix)| !any(prefix)) {
            None => Ok(()),
            Some((part, prefix)) => {
                let message = format!("no {part} in it (`{prefix}..`); expected a whole Stable Diffusion checkpoint");
                Err(Error::file(self.0.path(), message))
            }
        }
    }

    /// The U-Net's sizes. SD 1 has 8 heads everywhere, SD 2 heads of width 64; the shapes do not tell, so a model for which
    /// that does not hold needs a configuration.
    pub(super) fn unet(&self) -> Result<UNetConfig> {
        let input = |block: usize, rest: &str| format!("{UNET}.input_blocks.{block}.{rest}");
        let output = |block: usize, rest: &str| format!("{UNET}.output_blocks.{block}.{rest}");
        let (mut channels, mut down_attention, mut layers) = (Vec::new(), Vec::new(), Vec::new());
        let mut in_level = 0;
        let (mut width, mut attention) = (0, false);
        for block in 1.. {
            if self.has(&input(block, "0.in_layers.0.weight")) {
                width = self.extent(&input(block, "0.out_layers.3.weight"), 0)?;
                attention |= self.has(&input(block, "1.norm.weight"));
                in_level += 1;
                continue;
            }
            let ends = !self.has(&input(block, "0.op.weight"));
            channels.push(width);
            down_attention.push(attention);
            layers.push(in_level);
            (in_level, attention) = (0, false);
            if ends {
                break;
            }
        }
        let layers_per_block = layers[0];
        if layers_per_block == 0 || layers.iter().any(|count| *count != layers_per_block) {
            return Err(
                self.refuse(format!("levels of {layers:?} ResNet blocks; the same number for all is supported"))
            );
        }
        let up_attention: Vec<bool> =
            (0..channels.len()).map(|up| self.has(&output(up * (layers_per_block + 1), "1.norm.weight"))).collect();
        let middle = format!("{UNET}.middle_block.1");
        let block = |i: usize| format!("{middle}.transformer_blocks.{i}.norm1.weight");
        let in_channels = self.extent(&input(0, "0.weight"), 1)?;
        let out_channels = self.extent(&format!("{UNET}.out.2.weight"), 0)?;
        if in_channels != out_channels {
            return Err(self.refuse(format!(
                "the U-Net takes {in_channels} channels for {out_channels}: models with extra inputs (inpainting, depth) are \
                 not supported"
            )));
        }
        let linear = self.find(&format!("{middle}.proj_in.weight")).map(|shape| shape.len()) == Some(2);
        let family = if linear { UNetConfig::stable_diffusion_2() } else { UNetConfig::stable_diffusion_1() };
        let divisor = if linear { 64 } else { 8 };
        if channels.iter().any(|width| width % divisor != 0 || width % family.norm_num_groups != 0) {
            return Err(self.refuse(format!(
                "levels of {channels:?} channels are not those of Stable Diffusion, and the file does not say how many heads \
                 they have; give a folder with configurations"
            )));
        }
        Ok(UNetConfig {
            in_channels,
            out_channels,
            heads: channels.iter().map(|width| if linear { width / 64 } else { 8 }).collect(),
            block_out_channels: channels,
            down_attention,
            up_attention,
            layers_per_block,
            transformer_layers: self.count(block),
            cross_attention_dim: self.extent(&format!("{middle}.transformer_blocks.0.attn2.to_k.weight"), 1)?,
            ..family
        })
    }

    /// The autoencoder's sizes.
    pub(super) fn vae(&self) -> Result<VaeConfig> {
        let level = |level: usize| format!("{VAE}.encoder.down.{level}.block.0.conv2.weight");
        let levels = self.count(level);
        let layers = self.count(|i| format!("{VAE}.encoder.down.0.block.{i}.conv2.weight"));
        let channels = (0..levels).map(|i| self.extent(&level(i), 0)).collect::<Result<Vec<_>>>()?;
        let base = VaeConfig::stable_diffusion();
        if channels != base.block_out_channels || layers != base.layers_per_block {
            return Err(self.refuse(format!(
                "an autoencoder of {layers} ResNet blocks on levels of {channels:?} channels is not Stable Diffusion's; give a \
                 folder with configurations"
            )));
        }
        Ok(base)
    }

    /// The text encoder's sizes, for CLIP's names or OpenCLIP's. The last of OpenCLIP's 24 layers is not run: Stable
    /// Diffusion 2 takes the last but one's output.
    pub(super) fn text(&self, open_clip: bool) -> Result<TextConfig> {
        let (root, embedding, positions, layer, hidden) = match open_clip {
            true => (
                "cond_stage_model.model",
                "token_embedding.weight",
                "positional_embedding",
                "transformer.resblocks",
                "mlp.c_fc.weight",
            ),
            false => (
                "cond_stage_model.transformer.text_model",
                "embeddings.token_embedding.weight",
                "embeddings.position_embedding.weight",
                "encoder.layers",
                "mlp.fc1.weight",
            ),
        };
        let layers = self.count(|i| format!("{root}.{layer}.{i}.{hidden}"));
        let width = self.extent(&format!("{root}.{embedding}"), 1)?;
        if width % 64 != 0 {
            let message = format!(
                "a text encoder of width {width}, whose heads are not 64 wide; give a folder with configurations"
            );
            return Err(self.refuse(message));
        }
        Ok(TextConfig {
            vocab_size: self.extent(&format!("{root}.{embedding}"), 0)?,
            hidden_size: width,
            intermediate_size: self.extent(&format!("{root}.{layer}.0.{hidden}"), 0)?,
            num_hidden_layers: if open_clip && layers == 24 { 23 } else { layers },
            num_attention_heads: width / 64,
            max_position_embeddings: self.extent(&format!("{root}.{positions}"), 0)?,
            hidden_act: if open_clip { "gelu" } else { "quick_gelu" }.to_owned(),
            layer_norm_eps: 1e-5,
            eos_token_id: 49_407,
        })
    }
}
