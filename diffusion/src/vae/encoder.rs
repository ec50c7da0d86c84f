use candle_core::Tensor;

use super::config::VaeConfig;
use super::mid::{EPS, MidBlock, resnet};
use crate::layers::{Conv2d, GroupNorm, ResnetBlock};
use crate::{Result, Scope};

/// Pixels to the two halves of the latent distribution.
pub(super) struct Encoder {
    conv_in: Conv2d,
    levels: Vec<(Vec<ResnetBlock>, Option<Conv2d>)>,
    mid: MidBlock,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    pub(super) fn load(scope: &Scope, config: &VaeConfig) -> Result<Self> {
        let widths = &config.block_out_channels;
        let mut inputs = widths[0];
        let mut levels = Vec::new();
        for (level, &outputs) in widths.iter().enumerate() {
            let scope = scope.enter(format_args!("down_blocks.{level}"));
            let mut resnets = Vec::new();
            for i in 0..config.layers_per_block {
                resnets.push(resnet(&scope.enter(format_args!("resnets.{i}")), config, inputs, outputs)?);
                inputs = outputs;
            }
            let downsampler = (level + 1 < widths.len())
                .then(|| Conv2d::load(&scope.enter("downsamplers.0.conv"), outputs, outputs, 2))
                .transpose()?;
            levels.push((resnets, downsampler));
        }
        Ok(Self {
            conv_in: Conv2d::load(&scope.enter("conv_in"), config.in_channels, widths[0], 1)?,
            levels,
            mid: MidBlock::load(&scope.enter("mid_block"), config)?,
            norm_out: GroupNorm::load(&scope.enter("conv_norm_out"), inputs, config.norm_num_groups, EPS)?,
            conv_out: Conv2d::load(&scope.enter("conv_out"), inputs, 2 * config.latent_channels, 1)?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(x)?;
        for (resnets, downsampler) in &self.levels {
            for resnet in resnets {
                x = resnet.forward(&x, None)?;
            }
            if let Some(downsampler) = downsampler {
                x = downsampler.forward_padded_end(&x)?;
            }
        }
        self.conv_out.forward(&self.norm_out.forward_silu(&self.mid.forward(&x)?)?)
    }
}
