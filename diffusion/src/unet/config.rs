use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::Tap;
use crate::{Error, Result};

/// The sizes of a Stable Diffusion U-Net, from diffusers' `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct UNetConfig {
    /// Channels of the input; 4, or 9 for inpainting models.
    pub in_channels: usize,
    /// Channels of the predicted noise.
    pub out_channels: usize,
    /// Channels of each level, finest first.
    pub block_out_channels: Vec<usize>,
    /// Whether the down block of each level has attention.
    pub down_attention: Vec<bool>,
    /// Whether each up block, coarsest level first, has attention.
    pub up_attention: Vec<bool>,
    /// ResNet blocks of each down block; up blocks have one more.
    pub layers_per_block: usize,
    /// Transformer blocks of each attention.
    pub transformer_layers: usize,
    /// Attention heads of each level, finest first.
    pub heads: Vec<usize>,
    /// Width of the text embeddings.
    pub cross_attention_dim: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Epsilon of the ResNet blocks' group norms.
    pub norm_eps: f64,
    /// Projections around attention as linear layers (SD 2) instead of 1x1 convolutions (SD 1).
    pub use_linear_projection: bool,
    /// Attention scores of half-precision models in f32.
    pub upcast_attention: bool,
    /// Cosine half of the timestep sinusoid first.
    pub flip_sin_to_cos: bool,
    /// Offset in the timestep sinusoid's frequencies.
    pub freq_shift: f64,
    /// Height and width of the latents that the model was trained on.
    pub sample_size: Option<usize>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum PerLevel {
    One(usize),
    Each(Vec<usize>),
}

impl PerLevel {
    fn levels(self, count: usize, key: &str) -> std::result::Result<Vec<usize>, String> {
        match self {
            PerLevel::One(value) => Ok(vec![value; count]),
            PerLevel::Each(values) if values.len() == count => Ok(values),
            PerLevel::Each(values) => Err(format!("`{key}` has {} entries, expected {count}", values.len())),
        }
    }
}

/// The keys as diffusers writes them; those that are absent have diffusers' defaults.
#[derive(Deserialize)]
struct File {
    in_channels: usize,
    out_channels: usize,
    block_out_channels: Vec<usize>,
    down_block_types: Vec<String>,
    up_block_types: Vec<String>,
    layers_per_block: PerLevel,
    #[serde(default)]
    transformer_layers_per_block: Option<PerLevel>,
    attention_head_dim: PerLevel,
    #[serde(default)]
    num_attention_heads: Option<PerLevel>,
    cross_attention_dim: usize,
    norm_num_groups: usize,
    norm_eps: f64,
    #[serde(default)]
    use_linear_projection: bool,
    #[serde(default)]
    upcast_attention: bool,
    flip_sin_to_cos: bool,
    freq_shift: f64,
    #[serde(default)]
    sample_size: Option<usize>,
}

/// Options of diffusers' U-Net that Stable Diffusion 1 and 2 leave at these values.
const FIXED: &[(&str, &[&str])] = &[
    ("act_fn", &["\"silu\""]),
    ("addition_embed_type", &["null"]),
    ("attention_type", &["\"default\""]),
    ("center_input_sample", &["false"]),
    ("class_embed_type", &["null"]),
    ("conv_in_kernel", &["3"]),
    ("conv_out_kernel", &["3"]),
    ("cross_attention_norm", &["null"]),
    ("downsample_padding", &["1"]),
    ("dual_cross_attention", &["false"]),
    ("encoder_hid_dim", &["null"]),
    ("encoder_hid_dim_type", &["null"]),
    ("mid_block_only_cross_attention", &["null"]),
    ("mid_block_scale_factor", &["1", "1.0"]),
    ("mid_block_type", &["\"UNetMidBlock2DCrossAttn\""]),
    ("num_class_embeds", &["null"]),
    ("only_cross_attention", &["false"]),
    ("resnet_out_scale_factor", &["1", "1.0"]),
    ("resnet_skip_time_act", &["false"]),
    ("resnet_time_scale_shift", &["\"default\""]),
    ("reverse_transformer_layers_per_block", &["null"]),
    ("time_cond_proj_dim", &["null"]),
    ("time_embedding_act_fn", &["null"]),
    ("time_embedding_dim", &["null"]),
    ("time_embedding_type", &["\"positional\""]),
    ("timestep_post_act", &["null"]),
];

impl UNetConfig {
    /// Stable Diffusion 1.x.
    pub fn stable_diffusion_1() -> Self {
        Self {
            in_channels: 4,
            out_channels: 4,
            block_out_channels: vec![320, 640, 1280, 1280],
            down_attention: vec![true, true, true, false],
            up_attention: vec![false, true, true, true],
            layers_per_block: 2,
            transformer_layers: 1,
            heads: vec![8; 4],
            cross_attention_dim: 768,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            use_linear_projection: false,
            upcast_attention: false,
            flip_sin_to_cos: true,
            freq_shift: 0.,
            sample_size: Some(64),
        }
    }

    /// Stable Diffusion 2.x.
    pub fn stable_diffusion_2() -> Self {
        Self {
            heads: vec![5, 10, 20, 20],
            cross_attention_dim: 1024,
            use_linear_projection: true,
            // In half precision its attention overflows otherwise.
            upcast_attention: true,
            ..Self::stable_diffusion_1()
        }
    }

    /// The configuration as diffusers' `config.json` has it; [`Self::parse`] reads it back.
    pub fn to_json(&self) -> String {
        let blocks = |attention: &[bool], with: &str, without: &str| -> Vec<String> {
            attention.iter().map(|has| if *has { with } else { without }.to_owned()).collect()
        };
        json!({
            "_class_name": "UNet2DConditionModel",
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": self.block_out_channels,
            "down_block_types": blocks(&self.down_attention, "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": blocks(&self.up_attention, "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": self.layers_per_block,
            "transformer_layers_per_block": self.transformer_layers,
            // Named for the width, but diffusers takes it as the number of heads.
            "attention_head_dim": self.heads,
            "cross_attention_dim": self.cross_attention_dim,
            "norm_num_groups": self.norm_num_groups,
            "norm_eps": self.norm_eps,
            "use_linear_projection": self.use_linear_projection,
            "upcast_attention": self.upcast_attention,
            "flip_sin_to_cos": self.flip_sin_to_cos,
            "freq_shift": self.freq_shift,
            "sample_size": self.sample_size,
        })
        .to_string()
    }

    /// Reads `config.json`; a key with a value that Stable Diffusion 1 and 2 do not use is [`Error::Unsupported`].
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Self::parse(&text).map_err(|message| Error::file(path, message))
    }

    /// The same from the text of a `config.json`; the error says which key is wrong.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let value: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
        for (key, allowed) in FIXED {
            if let Some(found) = value.get(key).map(Value::to_string).filter(|v| !allowed.contains(&v.as_str())) {
                return Err(format!("`{key}` is {found}; only {} is supported", allowed[0]));
            }
        }
        let file: File = serde_json::from_value(value).map_err(|e| e.to_string())?;
        let levels = file.block_out_channels.len();
        if levels == 0 {
            return Err("`block_out_channels` is empty".into());
        }
        let attention = |key: &str, types: &[String], with: &str, without: &str| {
            if types.len() != levels {
                return Err(format!("`{key}` has {} entries, expected {levels}", types.len()));
            }
            let block = |t: &String| match t.as_str() {
                t if t == with => Ok(true),
                t if t == without => Ok(false),
                _ => Err(format!("`{key}` has \"{t}\"; supported are \"{with}\" and \"{without}\"")),
            };
            types.iter().map(block).collect::<std::result::Result<Vec<_>, _>>()
        };
        let same = |key: &str, value: Option<PerLevel>| {
            let values = value.unwrap_or(PerLevel::One(1)).levels(levels, key)?;
            match values.iter().all(|v| *v == values[0] && *v > 0) {
                true => Ok(values[0]),
                false => Err(format!("`{key}` is {values:?}; one positive number for all levels is supported")),
            }
        };
        let config = Self {
            in_channels: file.in_channels,
            out_channels: file.out_channels,
            down_attention: attention(
                "down_block_types",
                &file.down_block_types,
                "CrossAttnDownBlock2D",
                "DownBlock2D",
            )?,
            up_attention: attention("up_block_types", &file.up_block_types, "CrossAttnUpBlock2D", "UpBlock2D")?,
            layers_per_block: same("layers_per_block", Some(file.layers_per_block))?,
            transformer_layers: same("transformer_layers_per_block", file.transformer_layers_per_block)?,
            // Named for the width, but diffusers takes it as the number of heads.
            heads: file.num_attention_heads.unwrap_or(file.attention_head_dim).levels(levels, "attention_head_dim")?,
            cross_attention_dim: file.cross_attention_dim,
            norm_num_groups: file.norm_num_groups,
            norm_eps: file.norm_eps,
            use_linear_projection: file.use_linear_projection,
            upcast_attention: file.upcast_attention,
            flip_sin_to_cos: file.flip_sin_to_cos,
            freq_shift: file.freq_shift,
            sample_size: file.sample_size,
            block_out_channels: file.block_out_channels,
        };
        config.check_widths()?;
        Ok(config)
    }

    fn check_widths(&self) -> std::result::Result<(), String> {
        // Far more than any model has, and nothing computed from it overflows.
        const MOST: usize = 1 << 20;
        for (channels, heads) in self.block_out_channels.iter().zip(&self.heads) {
            if !(1..=MOST).contains(channels) {
                return Err(format!("`block_out_channels` has {channels}; from 1 to {MOST} are supported"));
            }
            for (key, divisor) in [("norm_num_groups", self.norm_num_groups), ("attention_head_dim", *heads)] {
                if divisor == 0 || channels % divisor != 0 {
                    return Err(format!("`{key}` is {divisor}, which does not divide {channels} channels"));
                }
            }
        }
        Ok(())
    }

    /// Resolution levels; every level but the last halves the size.
    pub fn levels(&self) -> usize {
        self.block_out_channels.len()
    }

    /// Every tap, from input to output: `down0 .. mid .. up{L-1}`.
    pub fn taps(&self) -> Vec<Tap> {
        let (down, up) = ((0..self.levels()).map(Tap::Down), (0..self.levels()).map(Tap::Up));
        down.chain([Tap::Mid]).chain(up).collect()
    }

    /// The tap of that name, or an error that lists those that exist.
    pub fn tap(&self, name: &str) -> Result<Tap> {
        let taps = self.taps();
        taps.iter().copied().find(|tap| tap.to_string() == name).ok_or_else(|| {
            let known: Vec<_> = taps.iter().map(Tap::to_string).collect();
            Error::Input(format!("this U-Net has no tap `{name}`; it has {}", known.join(", ")))
        })
    }

    /// Path prefixes, such as `up_blocks.1.`, of what is computed after a tap.
    pub fn prefixes_beyond(&self, tap: Tap) -> Vec<String> {
        let block = |other: Tap| match other {
            Tap::Down(i) => format!("down_blocks.{i}."),
            Tap::Mid => "mid_block.".to_owned(),
            Tap::Up(i) => format!("up_blocks.{i}."),
        };
        let beyond = self.taps().into_iter().filter(|other| *other > tap).map(block);
        beyond.chain(["conv_norm_out.".to_owned(), "conv_out.".to_owned()]).collect()
    }

    /// Channels of a tap's activation.
    pub fn tap_channels(&self, tap: Tap) -> usize {
        match tap {
            Tap::Down(i) => self.block_out_channels[i],
            Tap::Mid => self.block_out_channels[self.levels() - 1],
            Tap::Up(i) => self.block_out_channels[self.levels() - 1 - i],
        }
    }

    /// Width of the timestep embedding.
    pub(super) fn time_width(&self) -> usize {
        4 * self.block_out_channels[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_comes_back_from_its_json() {
        for config in [UNetConfig::stable_diffusion_1(), UNetConfig::stable_diffusion_2()] {
            assert_eq!(UNetConfig::parse(&config.to_json()).unwrap(), config);
        }
    }
}
