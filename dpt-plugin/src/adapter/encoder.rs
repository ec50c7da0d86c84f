use diffusion::Scope;

use super::AdapterSizes;
use super::attention::MultiheadAttention;
use super::decoder::FeedForward;
use super::dropout::Dropout;
use super::graph::{Graph, Value};
use super::layers::{LayerNorm, add};
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
    pub(super) fn forward<'a>(
        &'a self,
        graph: &mut Graph<'a>,
        x: &Value,
        positions: &Value,
        dropout: &mut Dropout,
    ) -> Result<Value> {
        let q = add(graph, x, positions)?;
        let x = self.self_attn.forward_onto(graph, x, [&q, &q, x], dropout)?;
        let x = self.norm1.forward(graph, &x)?;
        let x = self.feed_forward.forward_onto(graph, &x, dropout)?;
        self.norm2.forward(graph, &x)
    }
}
