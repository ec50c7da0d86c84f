//! Scaled dot-product attention, forward and backward in blocks of query rows: the score matrix is never whole in memory, and
//! the backward pass recomputes it instead of keeping it.

use candle_core::{D, Tensor};
use candle_nn::ops::softmax_last_dim;

use super::cpu::{self, Cotangents};
#[cfg(feature = "cuda")]
use super::cuda;
use super::norm::statistics_dtype;
use crate::Result;

/// Scores held at a time: 2^24 values, 64 MB in f32.
pub(super) const BLOCK: usize = 1 << 24;

/// `[B, tokens, heads * width]` to `[B * heads, tokens, width]`.
fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, tokens, channels) = x.dims3()?;
    let x = x.reshape((b, tokens, heads, channels / heads))?.transpose(1, 2)?;
    Ok(x.contiguous()?.reshape((b * heads, tokens, channels / heads))?)
}

/// The inverse of [`split_heads`].
fn merge_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, tokens, width) = x.dims3()?;
    let x = x.reshape((rows / heads, heads, tokens, width))?.transpose(1, 2)?;
    Ok(x.contiguous()?.reshape((rows / heads, tokens, heads * width))?)
}

/// Queries `[B, queries, heads * width]`, keys and values `[B, keys, heads * width]`.
#[derive(Clone, Copy)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Attended<'a> {
    pub q: &'a Tensor,
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    pub heads: usize,
    /// Whether the products of half-precision q and k are formed in f32.
    pub upcast: bool,
}

/// What attention gave.
pub struct Attention {
    /// In the shape of q.
    pub y: Tensor,
    /// `[B, heads, queries]`, of the sums that the softmax divides by; kept where kernels of our own compute.
    log_sums: Option<Tensor>,
}

impl Attended<'_> {
    /// `softmax(q k^T / sqrt(width)) v` of each head.
    pub fn attend(self) -> Result<Attention> {
        let Self { q, k, v, heads, upcast } = self;
        if let Some((y, log_sums)) = cpu::attend((q, k, v), heads)? {
            return Ok(Attention { y, log_sums: Some(log_sums) });
        }
        #[cfg(feature = "cuda")]
        if let Some((y, log_sums)) = cuda::attend((q, k, v), heads)? {
            return Ok(Attention { y, log_sums: Some(log_sums) });
        }
        #[cfg(feature = "cuda")]
        if let Some(y) = cuda::attend_heads((q, k, v), heads)? {
            return Ok(Attention { y, log_sums: None });
        }
        let [q, k, v] = [q, k, v].map(|t| split_heads(t, heads));
        let y = merge_heads(&attend_by(BLOCK, (&q?, &k?, &v?), upcast)?, heads)?;
        Ok(Attention { y, log_sums: None })
    }

    /// The cotangents of q, and of k and v if wanted, from that of the result.
    ///
    /// With `P = softmax(S)` and `dP = dy v^T`: `dS = P (dP - rowsum(P dP))`, `dq = dS k`, `dk = dS^T q`, `dv = P^T dy`.
    pub fn vjp(self, attention: &Attention, dy: &Tensor, of_keys: bool) -> Result<Cotangents<Tensor>> {
        let Self { q, k, v, heads, upcast } = self;
        let dy = dy.contiguous()?;
        if let Attention { y, log_sums: Some(log_sums) } = attention
            && let Some(cotangents) = cpu::attend_vjp((q, k, v), (y, log_sums), &dy, heads, of_keys)?
        {
            return Ok(cotangents);
        }
        #[cfg(feature = "cuda")]
        if let Attention { y, log_sums: Some(log_sums) } = attention
            && let Some(cotangents) = cuda::attend_vjp((q, k, v), (y, log_sums), &dy, heads, of_keys)?
        {
            return Ok(cotangents);
        }
        #[cfg(feature = "cuda")]
        if let Some(cotangents) = cuda::attend_heads_vjp((q, k, v), &dy, heads, of_keys)? {
            return Ok(cotangents);
        }
        let [q, k, v, dy] = [q, k, v, &dy].map(|t| split_heads(t, heads));
        let Cotangents { q, kv } = attend_vjp_by(BLOCK, (&q?, &k?, &v?), &dy?, upcast, of_keys)?;
        let merged =
            |(dk, dv): (Tensor, Tensor)| Ok::<_, crate::Error>((merge_heads(&dk, heads)?, merge_heads(&dv, heads)?));
        Ok(Cotangents { q: merge_heads(&q, heads)?, kv: kv.map(merged).transpose()? })
    }
}

fn attend_by(block: usize, (q, k, v): (&Tensor, &Tensor, &Tensor), upcast: bool) -> Result<Tensor> {
    let (n, queries, _) = q.dims3()?;
    let keys = Keys::new(k, upcast)?;
    let mut blocks = Vec::new();
    for (start, len) in row_blocks(block, n, queries, k.dim(1)?) {
        blocks.push(keys.weights(&q.narrow(1, start, len)?)?.to_dtype(v.dtype())?.matmul(v)?);
    }
    concatenate(blocks)
}

fn attend_vjp_by(
    block: usize,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    dy: &Tensor,
    upcast: bool,
    of_keys: bool,
) -> Result<Cotangents<Tensor>> {
    let (n, queries, _) = q.dims3()?;
    let keys = Keys::new(k, upcast)?;
    let dtype = q.dtype();
    let v_t = v.t()?;
    let mut dq = Vec::new();
    let mut dkv: Option<(Tensor, Tensor)> = None;
    for (start, len) in row_blocks(block, n, queries, k.dim(1)?) {
        let (q, dy) = (q.narrow(1, start, len)?.contiguous()?, dy.narrow(1, start, len)?.contiguous()?);
        let p = keys.weights(&q)?;
        let dp = dy.matmul(&v_t)?.to_dtype(p.dtype())?;
        let ds = (softmax_vjp(&p, &dp)? * keys.scale)?.to_dtype(dtype)?;
        dq.push(ds.matmul(k)?);
        if of_keys {
            let dk = ds.t()?.matmul(&q)?;
            let dv = p.to_dtype(dtype)?.t()?.matmul(&dy)?;
            dkv = Some(match dkv {
                None => (dk, dv),
                Some((k_sum, v_sum)) => ((k_sum + dk)?, (v_sum + dv)?),
            });
        }
    }
    Ok(Cotangents { q: concatenate(dq)?, kv: dkv })
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
        softmax(&scores.to_dtype(statistics_dtype(scores.dtype()))?.contiguous()?)
    }
}

/// Over the last dimension.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    if let Some(y) = cpu::softmax(x)? {
        return Ok(y);
    }
    #[cfg(feature = "cuda")]
    if let Some(y) = cuda::softmax(x)? {
        return Ok(y);
    }
    Ok(softmax_last_dim(x)?)
}

/// The gradient for [`softmax`]'s input from its result: `P (dP - rowsum(P dP))`.
pub fn softmax_vjp(p: &Tensor, dp: &Tensor) -> Result<Tensor> {
    if let Some(ds) = cpu::softmax_vjp(p, dp)? {
        return Ok(ds);
    }
    #[cfg(feature = "cuda")]
    if let Some(ds) = cuda::softmax_vjp(p, dp)? {
        return Ok(ds);
    }
    let weighted = (p * dp)?;
    Ok((&weighted - p.broadcast_mul(&weighted.sum_keepdim(D::Minus1)?)?)?)
}

/// Starts and lengths of blocks of query rows that have up to `block` scores, and at least one row.
pub(super) fn row_blocks(block: usize, n: usize, queries: usize, keys: usize) -> impl Iterator<Item = (usize, usize)> {
    let len = (block / (n * keys).max(1)).clamp(1, queries.max(1));
    (0..queries).step_by(len).map(move |start| (start, len.min(queries - start)))
}

fn concatenate(mut blocks: Vec<Tensor>) -> Result<Tensor> {
    Ok(if blocks.len() == 1 { blocks.remove(0) } else { Tensor::cat(&blocks, 1)? })
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::layers::finite_difference::{assert_values, assert_vjp, numbers, values};

    /// 3 heads in all, 5 queries, 7 keys, width 4. Blocks of 1, 2 (the last one shorter) and all query rows.
    const BLOCKS: [usize; 3] = [1, 2 * 3 * 7 + 1, BLOCK];

    fn inputs() -> (Tensor, Tensor, Tensor) {
        (values(0, (3, 5, 4)), values(10, (3, 7, 4)), values(11, (3, 7, 4)))
    }

    fn by_definition(q: &Tensor, k: &Tensor, v: &Tensor) -> Vec<f64> {
        let ((n, queries, width), keys) = (q.dims3().unwrap(), k.dim(1).unwrap());
        let (q, k, v) = (numbers(q), numbers(k), numbers(v));
        let mut y = Vec::new();
        for (head, query) in (0..n).flat_map(|head| (0..queries).map(move |query| (head, query))) {
            let score = |key: usize| {
                let (a, b) = (&q[(head * queries + query) * width..], &k[(head * keys + key) * width..]);
                a[..width].iter().zip(b).map(|(a, b)| a * b).sum::<f64>() / (width as f64).sqrt()
            };
            let scores: Vec<f64> = (0..keys).map(score).collect();
            let largest = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
            for i in 0..width {
                let sum: f64 = (0..keys).map(|key| weights[key] * v[(head * keys + key) * width + i]).sum();
                y.push(sum / weights.iter().sum::<f64>());
            }
        }
        y
    }

    #[test]
    fn forward_is_the_definition() {
        let (q, k, v) = inputs();
        for (block, upcast) in BLOCKS.map(|block| (block, block == 1)) {
            let y = attend_by(block, (&q, &k, &v), upcast).unwrap();
            assert_values(&y, &by_definition(&q, &k, &v), 1e-14);
        }
    }

    #[test]
    fn rows_are_covered_once() {
        for (block, expected) in BLOCKS.into_iter().zip([vec![1; 5], vec![2, 2, 1], vec![5]]) {
            let mut next = 0;
            for ((start, len), expected) in row_blocks(block, 3, 5, 7).zip(expected) {
                assert_eq!((start, len), (next, expected), "block {block}");
                next += len;
            }
            assert_eq!(next, 5);
        }
    }

    #[test]
    fn gradients_of_queries_keys_and_values() {
        let (q, k, v) = inputs();
        for (block, upcast) in BLOCKS.into_iter().flat_map(|block| [(block, false), (block, true)]) {
            let vjp = |dy: &Tensor, of_keys| attend_vjp_by(block, (&q, &k, &v), dy, upcast, of_keys);
            let keys_values = |dy: &Tensor| -> Result<_> { Ok(vjp(dy, true)?.kv.expect("asked for")) };
            let forward = |q: &Tensor, k: &Tensor, v: &Tensor| attend_by(block, (q, k, v), upcast);
            assert_vjp("queries", &q, |q| forward(q, &k, &v), |dy| Ok(vjp(dy, true)?.q));
            assert_vjp("queries alone", &q, |q| forward(q, &k, &v), |dy| Ok(vjp(dy, false)?.q));
            assert_vjp("keys", &k, |k| forward(&q, k, &v), |dy| Ok(keys_values(dy)?.0));
            assert_vjp("values", &v, |v| forward(&q, &k, v), |dy| Ok(keys_values(dy)?.1));
        }
    }

    #[test]
    fn heads_split_and_merge() {
        let x = values(0, (2, 3, 8));
        let heads = split_heads(&x, 4).unwrap();
        assert_eq!(heads.dims(), [8, 3, 2]);
        // Item 1, head 2, token 0: channels 4 and 5.
        let expected = x.get(1).unwrap().get(0).unwrap().narrow(0, 4, 2).unwrap();
        assert_values(&heads.get(6).unwrap().get(0).unwrap(), &numbers(&expected), 0.);
        assert_values(&merge_heads(&heads, 4).unwrap(), &numbers(&x), 0.);
    }

    /// Scores near 8000 that differ by about 2: f16 holds such numbers to 4, f32 exactly.
    #[test]
    fn upcast_keeps_large_scores_apart() {
        let half = |x: Tensor| x.to_dtype(DType::F16).unwrap();
        let common = (values(0, (1, 1, 64)) * 40.).unwrap();
        let near = |seed, rows| half((values(seed, (1, rows, 64)) * 0.05).unwrap().broadcast_add(&common).unwrap());
        let (q, k, v) = (near(10, 16), near(11, 7), half(values(12, (1, 7, 64))));
        let expected = by_definition(&q, &k, &v);
        let error = |upcast| {
            let y = Attended { q: &q, k: &k, v: &v, heads: 1, upcast }.attend().unwrap().y;
            assert_eq!(y.dtype(), DType::F16);
            numbers(&y).iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0., f64::max)
        };
        assert!(error(true) < 1e-2, "{}", error(true));
        assert!(error(false) > 2. * error(true), "{} without, {} with", error(false), error(true));
    }

    /// `q k^T` alone would be beyond 65504: the scale goes in before the product.
    #[test]
    fn half_precision_does_not_overflow_in_the_product() {
        let q = Tensor::full(40f32, (1, 2, 64), &candle_core::Device::Cpu).unwrap().to_dtype(DType::F16).unwrap();
        let v = values(0, (1, 2, 64)).to_dtype(DType::F16).unwrap();
        let expected = by_definition(&q, &q, &v);
        let attended = Attended { q: &q, k: &q, v: &v, heads: 1, upcast: false };
        assert_values(&attended.attend().unwrap().y, &expected, 2e-3);
    }
}
