use candle_core::Tensor;
use diffusion::Scope;

use super::AdapterSizes;
use super::attention::MultiheadAttention;
use super::decoder::FeedForward;
use super::dropout::Dropout;
use super::layers::LayerNorm;
use crate::Result;

/// A post-norm Transformer encoder layer; positions are added to queries and keys, not to values.
pub(super) struct EncoderLayer {
    self_attn: MultiheadAttention,
    norm1: LayerNorm,
    feed_forward: FeedForward,
    norm2: LayerNorm,
}

impl EncoderLayer {
    pub(super) fn load(scope: &Scope, sizes: &AdapterSizes) -> Result<Self> {
        Ok(Self {
            self_attn: MultiheadAttention::load(&scope.enter("self_attn"), sizes)?,
            norm1: LayerNorm::load(&scope.enter("norm1"), sizes.d_model)?,
            feed_forward: FeedForward::load(scope, sizes)?,
            norm2: LayerNorm::load(&scope.enter("norm2"), sizes.d_model)?,
        })
    }

    /// `x` and `positions` are `[B, h * w, d]`.
    pub(super) fn forward(&self, x: &Tensor, positions: &Tensor, dropout: &mut Dropout) -> Result<Tensor> {
        let q = (x + positions)?;
        let seen = self.self_attn.forward(&q, &q, x, dropout)?;
        let x = self.norm1.forward(&(x + dropout.apply(seen)?)?)?;
        let fed = self.feed_forward.forward(&x, dropout)?;
        self.norm2.forward(&(&x + dropout.apply(fed)?)?)
    }
}
