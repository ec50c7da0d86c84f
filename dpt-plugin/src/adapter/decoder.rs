use candle_core::Tensor;
use diffusion::Scope;

use super::AdapterSizes;
use super::attention::MultiheadAttention;
use super::dropout::Dropout;
use super::layers::{LayerNorm, Linear};
use crate::Result;

/// A post-norm Transformer decoder layer; the query embedding is added to queries and keys, not to values.
pub(super) struct DecoderLayer {
    self_attn: MultiheadAttention,
    norm1: LayerNorm,
    cross_attn: MultiheadAttention,
    norm2: LayerNorm,
    feed_forward: FeedForward,
    norm3: LayerNorm,
}

impl DecoderLayer {
    pub(super) fn load(scope: &Scope, sizes: &AdapterSizes) -> Result<Self> {
        let norm = |name| LayerNorm::load(&scope.enter(name), sizes.d_model);
        Ok(Self {
            self_attn: MultiheadAttention::load(&scope.enter("self_attn"), sizes)?,
            norm1: norm("norm1")?,
            cross_attn: MultiheadAttention::load(&scope.enter("multihead_attn"), sizes)?,
            norm2: norm("norm2")?,
            feed_forward: FeedForward::load(scope, sizes)?,
            norm3: norm("norm3")?,
        })
    }

    /// `x` and `query` are `[B, N, d]`, `memory` and `positions` `[B, h * w, d]`.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        memory: &Tensor,
        positions: &Tensor,
        query: &Tensor,
        dropout: &mut Dropout,
    ) -> Result<Tensor> {
        let q = (x + query)?;
        let seen = self.self_attn.forward(&q, &q, x, dropout)?;
        let x = self.norm1.forward(&(x + dropout.apply(seen)?)?)?;
        let seen = self.cross_attn.forward(&(&x + query)?, &(memory + positions)?, memory, dropout)?;
        let x = self.norm2.forward(&(x + dropout.apply(seen)?)?)?;
        let fed = self.feed_forward.forward(&x, dropout)?;
        self.norm3.forward(&(&x + dropout.apply(fed)?)?)
    }
}

/// Linear, ReLU, linear.
pub(super) struct FeedForward(Linear, Linear);

impl FeedForward {
    pub(super) fn load(scope: &Scope, sizes: &AdapterSizes) -> Result<Self> {
        let (d, hidden) = (sizes.d_model, sizes.feedforward);
        Ok(Self(Linear::load(&scope.enter("linear1"), d, hidden)?, Linear::load(&scope.enter("linear2"), hidden, d)?))
    }

    pub(super) fn forward(&self, x: &Tensor, dropout: &mut Dropout) -> Result<Tensor> {
        self.1.forward(&dropout.apply(self.0.forward(x)?.relu()?)?)
    }
}
