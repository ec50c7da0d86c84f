use candle_core::Tensor;

use super::config::VaeConfig;
use super::mid::{EPS, MidBlock, resnet};
use crate::layers::{Conv2d, GroupNorm, ResnetBlock, upsample_nearest};
use crate::{Result, Scope};

/// Latents to pixels.
pub(super) struct Decoder {
    conv_in: Conv2d,
    mid: MidBlock,
    levels: Vec<(Vec<ResnetBlock>, Option<Conv2d>)>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    pub(super) fn load(scope: &Scope, config: &VaeConfig) -> Result<Self> {
        let coarsest_first: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let mut inputs = coarsest_first[0];
        let mut levels = Vec::new();
        for (index, &outputs) in coarsest_first.iter().enumerate() {
            let scope = scope.enter(format_args!("up_blocks.{index}"));
            let mut resnets = Vec::new();
            for i in 0..=config.layers_per_block {
                resnets.push(resnet(&scope.enter(format_args!("resnets.{i}")), config, inputs, outputs)?);
                inputs = outputs;
            }
            let upsampler = (index + 1 < coarsest_first.len())
                .then(|| Conv2d::load(&scope.enter("upsamplers.0.conv"), outputs, outputs, 1))
                .transpose()?;
            levels.push((resnets, upsampler));
        }
        Ok(Self {
            conv_in: Conv2d::load(&scope.enter("conv_in"), config.latent_channels, coarsest_first[0], 1)?,
            mid: MidBlock::load(&scope.enter("mid_block"), config)?,
            levels,
            norm_out: GroupNorm::load(&scope.enter("conv_norm_out"), inputs, config.norm_num_groups, EPS)?,
            conv_out: Conv2d::load(&scope.enter("conv_out"), inputs, config.out_channels, 1)?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.mid.forward(&self.conv_in.forward(x)?)?;
        for (resnets, upsampler) in &self.levels {
            for resnet in resnets {
                x = resnet.forward(&x, None)?;
            }
            if let Some(upsampler) = upsampler {
                let size = (2 * x.dim(2)?, 2 * x.dim(3)?);
                x = upsampler.forward(&upsample_nearest(&x, size)?)?;
            }
        }
        self.conv_out.forward(&self.norm_out.forward_silu(&x)?)
    }
}
