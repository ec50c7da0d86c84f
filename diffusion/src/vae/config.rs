use std::path::Path;

use serde::Deserialize;

use crate::{Error, Result};

/// The sizes of an autoencoder, from diffusers' `config.json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct VaeConfig {
    /// Channels of the image; 3.
    pub in_channels: usize,
    /// Channels of the decoded image; 3.
    pub out_channels: usize,
    /// Channels of the latents; 4.
    pub latent_channels: usize,
    /// Channels of each level, finest first.
    pub block_out_channels: Vec<usize>,
    /// ResNet blocks of each encoder level; decoder levels have one more.
    pub layers_per_block: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// What the U-Net's latents are divided by before decoding; 0.18215 for Stable Diffusion.
    #[serde(default = "default_scaling_factor")]
    pub scaling_factor: f64,
    /// Attention in the middle block.
    #[serde(default = "yes")]
    pub mid_block_add_attention: bool,
    /// A 1x1 convolution after the encoder.
    #[serde(default = "yes")]
    pub use_quant_conv: bool,
    /// A 1x1 convolution before the decoder.
    #[serde(default = "yes")]
    pub use_post_quant_conv: bool,
    #[serde(default = "silu")]
    act_fn: String,
    down_block_types: Vec<String>,
    up_block_types: Vec<String>,
    #[serde(default)]
    shift_factor: Option<f64>,
}

fn default_scaling_factor() -> f64 {
    0.18215
}

fn yes() -> bool {
    true
}

fn silu() -> String {
    "silu".into()
}

impl VaeConfig {
    /// The autoencoder of Stable Diffusion 1.x and 2.x.
    pub fn stable_diffusion() -> Self {
        let blocks = |name: &str| vec![name.to_owned(); 4];
        Self {
            in_channels: 3,
            out_channels: 3,
            latent_channels: 4,
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            norm_num_groups: 32,
            scaling_factor: default_scaling_factor(),
            mid_block_add_attention: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            act_fn: silu(),
            down_block_types: blocks("DownEncoderBlock2D"),
            up_block_types: blocks("UpDecoderBlock2D"),
            shift_factor: None,
        }
    }

    pub(crate) fn load(path: &Path) -> Result<Self> {
        let config: Self = crate::config::read_json(path)?;
        match config.problem() {
            None => Ok(config),
            Some(problem) => Err(Error::file(path, problem)),
        }
    }

    fn problem(&self) -> Option<String> {
        let levels = self.block_out_channels.len();
        let blocks = [
            ("down_block_types", &self.down_block_types, "DownEncoderBlock2D"),
            ("up_block_types", &self.up_block_types, "UpDecoderBlock2D"),
        ];
        for (key, types, supported) in blocks {
            if types.len() != levels || types.iter().any(|t| t != supported) {
                return Some(format!("`{key}` is {types:?}; {levels} of \"{supported}\" are supported"));
            }
        }
        let (inputs, outputs, latents) = (self.in_channels, self.out_channels, self.latent_channels);
        if inputs != 3 || outputs != 3 || !(1..=1024).contains(&latents) {
            return Some(format!(
                "{inputs} channels in, {outputs} out, {latents} of latents; expected 3, 3 and 1 to 1024"
            ));
        }
        if self.act_fn != "silu" {
            return Some(format!("`act_fn` is \"{}\"; only \"silu\" is supported", self.act_fn));
        }
        if self.shift_factor.is_some_and(|shift| shift != 0.) {
            return Some("`shift_factor` is not supported".into());
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor > 0.) {
            return Some(format!("`scaling_factor` is {}, expected a positive number", self.scaling_factor));
        }
        let groups = self.norm_num_groups;
        if levels == 0 || groups == 0 || self.block_out_channels.iter().any(|c| c % groups != 0) {
            let channels = &self.block_out_channels;
            return Some(format!("`block_out_channels` {channels:?} must be divisible by `norm_num_groups` {groups}"));
        }
        None
    }

    /// Pixels per latent in each direction; 8 for Stable Diffusion.
    pub fn latent_scale(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }
}
