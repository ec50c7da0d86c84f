//! One layer of CLIP's text transformer: pre-norm self-attention and a two-layer perceptron.

use candle_core::Tensor;
use candle_nn::ops;

use super::config::Activation;
use crate::layers::{LayerNorm, Linear};
use crate::{Result, Scope};

/// `text_model.encoder.layers.N`.
pub(super) struct Layer {
    norm1: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    heads: usize,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    activation: Activation,
}

impl Layer {
    /// Takes the layer's tensors: width `d`, perceptron width `ff`.
    pub fn load(scope: &Scope, d: usize, ff: usize, heads: usize, eps: f64, activation: Activation) -> Result<Self> {
        let (attention, mlp) = (scope.enter("self_attn"), scope.enter("mlp"));
        Ok(Self {
            norm1: LayerNorm::load(&scope.enter("layer_norm1"), d, eps)?,
            query: Linear::load(&attention.enter("q_proj"), d, d)?,
            key: Linear::load(&attention.enter("k_proj"), d, d)?,
            value: Linear::load(&attention.enter("v_proj"), d, d)?,
            out: Linear::load(&attention.enter("out_proj"), d, d)?,
            heads,
            norm2: LayerNorm::load(&scope.enter("layer_norm2"), d, eps)?,
            fc1: Linear::load(&mlp.enter("fc1"), d, ff)?,
            fc2: Linear::load(&mlp.enter("fc2"), ff, d)?,
            activation,
        })
    }

    /// `[B, S, D] -> [B, S, D]`; `mask` is `[S, S]` in the precision of statistics, added to the scores.
    pub fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let x = (x + self.attend(&self.norm1.forward(x)?, mask)?)?;
        let hidden = self.activation.forward(&self.fc1.forward(&self.norm2.forward(&x)?)?)?;
        Ok((&x + self.fc2.forward(&hidden)?)?)
    }

    fn attend(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (batch, positions, d) = x.dims3()?;
        let split = |x: Tensor| -> Result<Tensor> {
            Ok(x.reshape((batch, positions, self.heads, ()))?.transpose(1, 2)?.contiguous()?)
        };
        let scale = ((d / self.heads) as f64).powf(-0.5);
        // The query is scaled rather than the scores: half precision holds the products then.
        let query = split((self.query.forward(x)? * scale)?)?;
        let key = split(self.key.forward(x)?)?;
        let value = split(self.value.forward(x)?)?;
        let scores = query.matmul(&key.t()?)?.to_dtype(mask.dtype())?.broadcast_add(mask)?;
        let weights = ops::softmax_last_dim(&scores)?.to_dtype(x.dtype())?;
        let mixed = weights.matmul(&value)?.transpose(1, 2)?.reshape((batch, positions, d))?;
        self.out.forward(&mixed)
    }
}
