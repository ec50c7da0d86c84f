use diffusion::Scope;

use super::AdapterSizes;
use super::attention::MultiheadAttention;
use super::dropout::Dropout;
use super::graph::{Graph, Value};
use super::layers::{LayerNorm, Linear, add, relu};
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
    pub(super) fn forward<'a>(
        &'a self,
        graph: &mut Graph<'a>,
        [x, query]: [&Value; 2],
        [memory, positions]: [&Value; 2],
        dropout: &mut Dropout,
    ) -> Result<Value> {
        let q = add(graph, x, query)?;
        let x = self.self_attn.forward_onto(graph, x, [&q, &q, x], dropout)?;
        let x = self.norm1.forward(graph, &x)?;
        let (q, k) = (add(graph, &x, query)?, add(graph, memory, positions)?);
        let x = self.cross_attn.forward_onto(graph, &x, [&q, &k, memory], dropout)?;
        let x = self.norm2.forward(graph, &x)?;
        let x = self.feed_forward.forward_onto(graph, &x, dropout)?;
        self.norm3.forward(graph, &x)
    }
}

/// Linear, ReLU, linear.
pub(super) struct FeedForward(Linear, Linear);

impl FeedForward {
    pub(super) fn load(scope: &Scope, sizes: &AdapterSizes) -> Result<Self> {
        let (d, hidden) = (sizes.d_model, sizes.feedforward);
        Ok(Self(Linear::load(&scope.enter("linear1"), d, hidden)?, Linear::load(&scope.enter("linear2"), hidden, d)?))
    }

    /// `x` and what it is mapped to, which is dropped from.
    pub(super) fn forward_onto<'a>(&'a self, graph: &mut Graph<'a>, x: &Value, dropout: &mut Dropout) -> Result<Value> {
        let hidden = self.0.forward(graph, x)?;
        let hidden = relu(graph, &hidden)?;
        let hidden = dropout.apply(graph, hidden)?;
        dropout.forward_onto(graph, &self.1, x, &hidden)
    }
}
