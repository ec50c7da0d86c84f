//! LDM's names for the tensors of Stable Diffusion, and diffusers': one table per part, read in either direction.

use crate::{UNetConfig, VaeConfig};

/// A renamed place in the name tree: LDM's prefix, diffusers' prefix, and the names below it.
struct Place {
    ldm: String,
    diffusers: String,
    inner: &'static [(&'static str, &'static str)],
}

/// The names of one part.
pub(super) struct Names {
    /// Everything of the part lies below it in the single file.
    root: &'static str,
    places: Vec<Place>,
}

/// Below a place whose names are the same in both.
const SAME: &[(&str, &str)] = &[];

/// Inside a ResNet block of the U-Net.
const UNET_RESNET: &[(&str, &str)] = &[
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
];

/// Inside a ResNet block of the autoencoder.
const VAE_RESNET: &[(&str, &str)] = &[("nin_shortcut", "conv_shortcut")];

/// Inside its attention.
const VAE_ATTENTION: &[(&str, &str)] =
    &[("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")];

/// What folders written by older libraries call the same.
const OLD_VAE_ATTENTION: &[(&str, &str)] = &[("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "proj_attn")];

/// Inside a layer of OpenCLIP's text transformer; query, key and value are one tensor there.
const OPEN_CLIP_LAYER: &[(&str, &str)] = &[
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
];

fn place(ldm: impl Into<String>, diffusers: impl Into<String>, inner: &'static [(&str, &str)]) -> Place {
    Place { ldm: ldm.into(), diffusers: diffusers.into(), inner }
}

/// The part of `name` below `prefix`; empty at the place itself.
fn below<'a>(name: &'a str, prefix: &str) -> Option<&'a str> {
    let rest = name.strip_prefix(prefix)?;
    if rest.is_empty() { Some(rest) } else { rest.strip_prefix('.') }
}

fn join(prefix: &str, rest: &str) -> String {
    if rest.is_empty() { prefix.to_owned() } else { format!("{prefix}.{rest}") }
}

impl Names {
    /// The U-Net's: LDM numbers its blocks in the order of computation.
    pub(super) fn unet(config: &UNetConfig) -> Self {
        let (levels, layers) = (config.levels(), config.layers_per_block);
        let mut places = vec![
            place("time_embed.0", "time_embedding.linear_1", SAME),
            place("time_embed.2", "time_embedding.linear_2", SAME),
            place("input_blocks.0.0", "conv_in", SAME),
            place("middle_block.0", "mid_block.resnets.0", UNET_RESNET),
            place("middle_block.1", "mid_block.attentions.0", SAME),
            place("middle_block.2", "mid_block.resnets.1", UNET_RESNET),
            place("out.0", "conv_norm_out", SAME),
            place("out.2", "conv_out", SAME),
        ];
        let mut number = 1;
        for level in 0..levels {
            let block = format!("down_blocks.{level}");
            for layer in 0..layers {
                places.push(place(format!("input_blocks.{number}.0"), format!("{block}.resnets.{layer}"), UNET_RESNET));
                if config.down_attention[level] {
                    places.push(place(format!("input_blocks.{number}.1"), format!("{block}.attentions.{layer}"), SAME));
                }
                number += 1;
            }
            if level + 1 < levels {
                let conv = format!("{block}.downsamplers.0.conv");
                places.push(place(format!("input_blocks.{number}.0.op"), conv, SAME));
                number += 1;
            }
        }
        let mut number = 0;
        for up in 0..levels {
            let (block, attention) = (format!("up_blocks.{up}"), config.up_attention[up]);
            for layer in 0..=layers {
                places.push(place(
                    format!("output_blocks.{number}.0"),
                    format!("{block}.resnets.{layer}"),
                    UNET_RESNET,
                ));
                if attention {
                    places.push(place(
                        format!("output_blocks.{number}.1"),
                        format!("{block}.attentions.{layer}"),
                        SAME,
                    ));
                }
                if layer == layers && up + 1 < levels {
                    let ldm = format!("output_blocks.{number}.{}.conv", 1 + usize::from(attention));
                    places.push(place(ldm, format!("{block}.upsamplers.0.conv"), SAME));
                }
                number += 1;
            }
        }
        Self { root: "model.diffusion_model", places }
    }

    /// The autoencoder's: LDM numbers the decoder's levels from the finest.
    pub(super) fn vae(config: &VaeConfig) -> Self {
        let levels = config.block_out_channels.len();
        let mut places =
            vec![place("quant_conv", "quant_conv", SAME), place("post_quant_conv", "post_quant_conv", SAME)];
        for part in ["encoder", "decoder"] {
            for (ldm, diffusers, inner) in [
                ("conv_in", "conv_in", SAME),
                ("conv_out", "conv_out", SAME),
                ("norm_out", "conv_norm_out", SAME),
                ("mid.block_1", "mid_block.resnets.0", VAE_RESNET),
                ("mid.block_2", "mid_block.resnets.1", VAE_RESNET),
                ("mid.attn_1", "mid_block.attentions.0", VAE_ATTENTION),
            ] {
                places.push(place(format!("{part}.{ldm}"), format!("{part}.{diffusers}"), inner));
            }
        }
        for level in 0..levels {
            let (down, up) = (format!("encoder.down_blocks.{level}"), format!("decoder.up_blocks.{level}"));
            let (ldm_down, ldm_up) = (format!("encoder.down.{level}"), format!("decoder.up.{}", levels - 1 - level));
            for (ldm, diffusers, layers) in
                [(&ldm_down, &down, config.layers_per_block), (&ldm_up, &up, config.layers_per_block + 1)]
            {
                for i in 0..layers {
                    places.push(place(format!("{ldm}.block.{i}"), format!("{diffusers}.resnets.{i}"), VAE_RESNET));
                }
            }
            places.push(place(format!("{ldm_down}.downsample.conv"), format!("{down}.downsamplers.0.conv"), SAME));
            places.push(place(format!("{ldm_up}.upsample.conv"), format!("{up}.upsamplers.0.conv"), SAME));
        }
        Self { root: "first_stage_model", places }
    }

    /// CLIP's text encoder as Stable Diffusion 1 has it, under transformers' names.
    pub(super) fn clip() -> Self {
        let same = |name: &str| place(format!("text_model.{name}"), name, SAME);
        let places = ["embeddings", "encoder", "final_layer_norm"].map(same).into();
        Self { root: "cond_stage_model.transformer", places }
    }

    /// OpenCLIP's, of Stable Diffusion 2.
    pub(super) fn open_clip(layers: usize) -> Self {
        let mut places = vec![
            place("token_embedding", "embeddings.token_embedding", SAME),
            place("positional_embedding", "embeddings.position_embedding.weight", SAME),
            place("ln_final", "final_layer_norm", SAME),
        ];
        for i in 0..layers {
            let (ldm, layer) = (format!("transformer.resblocks.{i}"), format!("encoder.layers.{i}"));
            places.push(place(ldm, layer, OPEN_CLIP_LAYER));
        }
        Self { root: "cond_stage_model.model", places }
    }

    /// diffusers' name of a tensor of the single file; `None` for one that is not this part's or has no place in it.
    pub(super) fn to_diffusers(&self, name: &str) -> Option<String> {
        let name = below(name, self.root)?;
        self.places.iter().find_map(|place| {
            let rest = below(name, &place.ldm)?;
            let renamed = place.inner.iter().find_map(|(ldm, diffusers)| Some(join(diffusers, below(rest, ldm)?)));
            Some(join(&place.diffusers, renamed.as_deref().unwrap_or(rest)))
        })
    }

    /// The single file's name of a tensor of a diffusers folder.
    pub(super) fn to_ldm(&self, name: &str) -> Option<String> {
        let found = self.places.iter().find_map(|place| {
            let rest = below(name, &place.diffusers)?;
            let old = if place.inner == VAE_ATTENTION { OLD_VAE_ATTENTION } else { SAME };
            let renamed = place.inner.iter().chain(old).find_map(|(ldm, inner)| Some(join(ldm, below(rest, inner)?)));
            Some(join(&place.ldm, renamed.as_deref().unwrap_or(rest)))
        });
        Some(join(self.root, &found?))
    }
}

/// Tensors that single files carry and that nothing reads: training state, buffers that are computed, a last layer that
/// Stable Diffusion 2 does not run. `model_ema.` weights are an average of the ones that are read, as diffusers reads them.
pub(super) fn is_known_leftover(name: &str) -> bool {
    const PREFIXES: [&str; 4] = ["model_ema.", "first_stage_model.loss.", "loss.", "denoiser."];
    const NAMES: [&str; 23] = [
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "betas",
        "cond_stage_model.logit_scale",
        "cond_stage_model.model.attn_mask",
        "cond_stage_model.model.logit_scale",
        "cond_stage_model.model.text_projection",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.transformer.text_projection.weight",
        "global_step",
        "log_one_minus_alphas_cumprod",
        "logvar",
        "lvlb_weights",
        "model_ema_decay",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "posterior_variance",
        "scale_factor",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
    ];
    NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_the_real_unet() {
        let config = UNetConfig::stable_diffusion_1();
        let names = Names::unet(&config);
        // From the files that were released.
        for (ldm, diffusers) in [
            ("input_blocks.0.0.weight", "conv_in.weight"),
            ("input_blocks.3.0.op.bias", "down_blocks.0.downsamplers.0.conv.bias"),
            ("input_blocks.4.0.skip_connection.weight", "down_blocks.1.resnets.0.conv_shortcut.weight"),
            ("input_blocks.11.0.emb_layers.1.bias", "down_blocks.3.resnets.1.time_emb_proj.bias"),
            ("middle_block.1.proj_in.weight", "mid_block.attentions.0.proj_in.weight"),
            ("output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
            ("output_blocks.5.2.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
            ("output_blocks.11.1.norm.weight", "up_blocks.3.attentions.2.norm.weight"),
            ("output_blocks.11.0.out_layers.3.weight", "up_blocks.3.resnets.2.conv2.weight"),
        ] {
            let ldm = format!("model.diffusion_model.{ldm}");
            assert_eq!(names.to_diffusers(&ldm).as_deref(), Some(diffusers));
            assert_eq!(names.to_ldm(diffusers).as_deref(), Some(&*ldm));
        }
        assert_eq!(names.to_diffusers("model.diffusion_model.input_blocks.10.1.norm.weight"), None);
        assert_eq!(names.to_diffusers("first_stage_model.quant_conv.weight"), None);
    }

    #[test]
    fn places_of_the_real_vae() {
        let names = Names::vae(&VaeConfig::stable_diffusion());
        for (ldm, diffusers) in [
            ("encoder.down.0.downsample.conv.weight", "encoder.down_blocks.0.downsamplers.0.conv.weight"),
            ("decoder.up.3.block.0.norm1.weight", "decoder.up_blocks.0.resnets.0.norm1.weight"),
            ("decoder.up.1.upsample.conv.bias", "decoder.up_blocks.2.upsamplers.0.conv.bias"),
            ("decoder.up.0.block.0.nin_shortcut.weight", "decoder.up_blocks.3.resnets.0.conv_shortcut.weight"),
            ("encoder.mid.attn_1.q.weight", "encoder.mid_block.attentions.0.to_q.weight"),
            ("decoder.mid.attn_1.proj_out.bias", "decoder.mid_block.attentions.0.to_out.0.bias"),
            ("decoder.norm_out.weight", "decoder.conv_norm_out.weight"),
        ] {
            let ldm = format!("first_stage_model.{ldm}");
            assert_eq!(names.to_diffusers(&ldm).as_deref(), Some(diffusers));
            assert_eq!(names.to_ldm(diffusers).as_deref(), Some(&*ldm));
        }
        // As older folders have it.
        let old = "encoder.mid_block.attentions.0.proj_attn.weight";
        assert_eq!(names.to_ldm(old).as_deref(), Some("first_stage_model.encoder.mid.attn_1.proj_out.weight"));
    }
}
