use candle_core::Tensor;

use super::config::VaeConfig;
use crate::layers::{Attended, GroupNorm, Linear, ResnetBlock, ResnetSizes};
use crate::{Result, Scope};

/// Epsilon of every group norm in the autoencoder.
pub(super) const EPS: f64 = 1e-6;

pub(super) fn resnet(scope: &Scope, config: &VaeConfig, inputs: usize, outputs: usize) -> Result<ResnetBlock> {
    let sizes = ResnetSizes { inputs, outputs, groups: config.norm_num_groups, eps: EPS, time: None };
    ResnetBlock::load(scope, sizes)
}

/// ResNet block, attention where the configuration has it, ResNet block.
pub(super) struct MidBlock {
    first: ResnetBlock,
    attention: Option<SpatialAttention>,
    second: ResnetBlock,
}

impl MidBlock {
    pub(super) fn load(scope: &Scope, config: &VaeConfig) -> Result<Self> {
        let channels = config.block_out_channels[config.block_out_channels.len() - 1];
        let attention = config
            .mid_block_add_attention
            .then(|| SpatialAttention::load(&scope.enter("attentions.0"), channels, config.norm_num_groups));
        Ok(Self {
            first: resnet(&scope.enter("resnets.0"), config, channels, channels)?,
            attention: attention.transpose()?,
            second: resnet(&scope.enter("resnets.1"), config, channels, channels)?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.first.forward(x, None)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.second.forward(&x, None)
    }
}

/// Self-attention with one head over all pixels.
struct SpatialAttention {
    norm: GroupNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
}

impl SpatialAttention {
    fn load(scope: &Scope, channels: usize, groups: usize) -> Result<Self> {
        // Folders written by older libraries have the second name.
        let projection = |new: &str, old: &str| {
            let name = if scope.enter(old).contains("weight") { old } else { new };
            Linear::load(&scope.enter(name), channels, channels)
        };
        Ok(Self {
            norm: GroupNorm::load(&scope.enter("group_norm"), channels, groups, EPS)?,
            query: projection("to_q", "query")?,
            key: projection("to_k", "key")?,
            value: projection("to_v", "value")?,
            out: projection("to_out.0", "proj_attn")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let tokens = self.norm.forward(x)?.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
        let [q, k, v] = [&self.query, &self.key, &self.value].map(|projection| projection.forward(&tokens));
        let attended = Attended { q: &q?, k: &k?, v: &v?, heads: 1, upcast: false };
        let y = self.out.forward(&attended.attend()?.y)?;
        Ok((y.transpose(1, 2)?.contiguous()?.reshape(x.shape())? + x)?)
    }
}
