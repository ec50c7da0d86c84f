use candle_core::Tensor;
use diffusion::Scope;

use super::AdapterSizes;
use super::dropout::Dropout;
use super::fused;
use super::layers::{Linear, softmax};
use crate::Result;

/// PyTorch's `nn.MultiheadAttention`, batch first: the input projections of q, k and v lie in one tensor.
pub(super) struct MultiheadAttention {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    heads: usize,
}

impl MultiheadAttention {
    pub(super) fn load(scope: &Scope, sizes: &AdapterSizes) -> Result<Self> {
        let d = sizes.d_model;
        let weight = scope.tensor("in_proj_weight", &[3 * d, d])?;
        let bias = scope.tensor("in_proj_bias", &[3 * d])?;
        let part =
            |i: usize| -> Result<Linear> { Ok(Linear::new(weight.narrow(0, i * d, d)?, bias.narrow(0, i * d, d)?)) };
        let out = Linear::load(&scope.enter("out_proj"), d, d)?;
        Ok(Self { q: part(0)?, k: part(1)?, v: part(2)?, out, heads: sizes.heads })
    }

    /// Queries `[B, Q, d]`, keys and values `[B, S, d]` to `[B, Q, d]`.
    pub(super) fn forward(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        dropout: &mut Dropout,
    ) -> Result<Tensor> {
        let (q, k, v) = (self.q.forward(query)?, self.k.forward(key)?, self.v.forward(value)?);
        self.out.forward(&attend(&q, &k, &v, self.heads, dropout)?)
    }
}

/// What each head of queries `[B, Q, d]` attends to in keys and values `[B, S, d]`, `[B, Q, d]`.
pub(super) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, dropout: &mut Dropout) -> Result<Tensor> {
    if !dropout.drops() && [q, k, v].into_iter().all(fused::takes_attention) {
        return Ok(q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, fused::Attention { heads })?);
    }
    let (b, tokens, d) = q.dims3()?;
    let split = |x: &Tensor| -> Result<Tensor> {
        let tokens = x.dim(1)?;
        Ok(x.reshape((b, tokens, heads, d / heads))?.transpose(1, 2)?.contiguous()?)
    };
    let (q, k, v) = (split(&(q * (1. / ((d / heads) as f64).sqrt()))?)?, split(k)?, split(v)?);
    let weights = dropout.apply(softmax(&q.matmul(&k.transpose(2, 3)?.contiguous()?)?)?)?;
    Ok(weights.matmul(&v)?.transpose(1, 2)?.contiguous()?.reshape((b, tokens, d))?)
}
