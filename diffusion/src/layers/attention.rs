//! Scaled dot-product attention over heads laid out as `[B * heads, tokens, head width]`, forward and backward in blocks of
//! query rows: the score matrix is never whole in memory, and the backward pass recomputes it instead of keeping it.

use candle_core::{D, Tensor};
use candle_nn::ops::softmax_last_dim;

use super::norm::statistics_dtype;
use crate::Result;

/// Scores held at a time: 2^24 values, 64 MB in f32.
const BLOCK: usize = 1 << 24;

/// `[B, tokens, heads * width]` to `[B * heads, tokens, width]`.
pub(crate) fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, tokens, channels) = x.dims3()?;
    let x = x.reshape((b, tokens, heads, channels / heads))?.transpose(1, 2)?;
    Ok(x.contiguous()?.reshape((b * heads, tokens, channels / heads))?)
}

/// The inverse of [`split_heads`].
pub(crate) fn merge_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, tokens, width) = x.dims3()?;
    let x = x.reshape((rows / heads, heads, tokens, width))?.transpose(1, 2)?;
    Ok(x.contiguous()?.reshape((rows / heads, tokens, heads * width))?)
}

/// `softmax(q k^T / sqrt(width)) v`. With `upcast` the products of half-precision q and k are formed in f32.
pub(crate) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, upcast: bool) -> Result<Tensor> {
    let (n, queries, _) = q.dims3()?;
    let keys = Keys::new(k, upcast)?;
    let mut blocks = Vec::new();
    for (start, len) in row_blocks(n, queries, k.dim(1)?) {
        blocks.push(keys.weights(&q.narrow(1, start, len)?)?.to_dtype(v.dtype())?.matmul(v)?);
    }
    concatenate(blocks)
}

/// The cotangents of q, k and v; those of k and v only when `with_keys`.
///
/// With `P = softmax(S)` and `dP = dy v^T`: `dS = P (dP - rowsum(P dP))`, `dq = dS k`, `dk = dS^T q`, `dv = P^T dy`.
pub(crate) fn attend_vjp(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    dy: &Tensor,
    upcast: bool,
    with_keys: bool,
) -> Result<(Tensor, Option<(Tensor, Tensor)>)> {
    let (n, queries, _) = q.dims3()?;
    let keys = Keys::new(k, upcast)?;
    let dtype = q.dtype();
    let v_t = v.t()?;
    let mut dq = Vec::new();
    let mut dkv: Option<(Tensor, Tensor)> = None;
    for (start, len) in row_blocks(n, queries, k.dim(1)?) {
        let (q, dy) = (q.narrow(1, start, len)?.contiguous()?, dy.narrow(1, start, len)?.contiguous()?);
        let p = keys.weights(&q)?;
        let dp = dy.matmul(&v_t)?.to_dtype(p.dtype())?;
        let weighted = (&p * dp)?;
        let ds = (&weighted - p.broadcast_mul(&weighted.sum_keepdim(D::Minus1)?)?)?;
        let ds = (ds * keys.scale)?.to_dtype(dtype)?;
        dq.push(ds.matmul(k)?);
        if with_keys {
            let dk = ds.t()?.matmul(&q)?;
            let dv = p.to_dtype(dtype)?.t()?.matmul(&dy)?;
            dkv = Some(match dkv {
                None => (dk, dv),
                Some((k_sum, v_sum)) => ((k_sum + dk)?, (v_sum + dv)?),
            });
        }
    }
    Ok((concatenate(dq)?, dkv))
}

struct Keys {
    transposed: Tensor,
    scale: f64,
}

impl Keys {
    fn new(k: &Tensor, upcast: bool) -> Result<Self> {
        let width = k.dim(2)?;
        let k = if upcast { k.to_dtype(statistics_dtype(k.dtype()))? } else { k.clone() };
        Ok(Self { transposed: k.t()?, scale: 1. / (width as f64).sqrt() })
    }

    /// Attention weights of a block of queries, in the precision of statistics.
    fn weights(&self, q: &Tensor) -> Result<Tensor> {
        // Scaled before the product, so that half precision does not overflow in it.
        let q = (q.to_dtype(self.transposed.dtype())? * self.scale)?;
        let scores = q.contiguous()?.matmul(&self.transposed)?;
        Ok(softmax_last_dim(&scores.to_dtype(statistics_dtype(scores.dtype()))?.contiguous()?)?)
    }
}

fn row_blocks(n: usize, queries: usize, keys: usize) -> impl Iterator<Item = (usize, usize)> {
    let len = (BLOCK / (n * keys).max(1)).clamp(1, queries.max(1));
    (0..queries).step_by(len).map(move |start| (start, len.min(queries - start)))
}

fn concatenate(mut blocks: Vec<Tensor>) -> Result<Tensor> {
    Ok(if blocks.len() == 1 { blocks.remove(0) } else { Tensor::cat(&blocks, 1)? })
}
