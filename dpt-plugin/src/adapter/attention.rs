use candle_core::Tensor;
use diffusion::Scope;
use diffusion::layers::{Attended, Cotangents, softmax, softmax_vjp};

use super::AdapterSizes;
use super::dropout::Dropout;
use super::graph::{Graph, Parameter, Value};
use super::layers::Linear;
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
        let weight = Parameter::load(scope, "in_proj_weight", &[3 * d, d])?;
        let bias = Parameter::load(scope, "in_proj_bias", &[3 * d])?;
        let part = |i: usize| -> Result<Linear> { Ok(Linear::new(weight.rows(i * d, d)?, bias.rows(i * d, d)?)) };
        let out = Linear::load(&scope.enter("out_proj"), d, d)?;
        Ok(Self { q: part(0)?, k: part(1)?, v: part(2)?, out, heads: sizes.heads })
    }

    /// `residual` `[B, Q, d]` and what queries of its shape attend to in keys and values `[B, S, d]`, which is dropped from.
    pub(super) fn forward_onto<'a>(
        &'a self,
        graph: &mut Graph<'a>,
        residual: &Value,
        [query, key, value]: [&Value; 3],
        dropout: &mut Dropout,
    ) -> Result<Value> {
        let q = self.q.forward(graph, query)?;
        let (k, v) = (self.k.forward(graph, key)?, self.v.forward(graph, value)?);
        let attended = attend(graph, [&q, &k, &v], self.heads, dropout)?;
        dropout.forward_onto(graph, &self.out, residual, &attended)
    }
}

/// What each head of queries `[B, Q, d]` attends to in keys and values `[B, S, d]`, `[B, Q, d]`.
pub(super) fn attend<'a>(
    graph: &mut Graph<'a>,
    [q, k, v]: [&Value; 3],
    heads: usize,
    dropout: &mut Dropout,
) -> Result<Value> {
    let followed = q.is_followed() || k.is_followed() || v.is_followed();
    let [q, k, v] = [q, k, v].map(Value::clone);
    if dropout.drops() {
        let dropped = Dropped::new([&q, &k, &v].map(Value::tensor), heads, dropout)?;
        let y = dropped.attended()?;
        return Ok(graph.record(y, followed, move |dy, found| {
            let [dq, dk, dv] = dropped.vjp(&dy)?;
            found.add(&q, || Ok(dq))?;
            found.add(&k, || Ok(dk))?;
            found.add(&v, || Ok(dv))
        }));
    }
    let attended = Attended { q: q.tensor(), k: k.tensor(), v: v.tensor(), heads, upcast: false };
    let attention = attended.attend()?;
    let y = attention.y.clone();
    Ok(graph.record(y, followed, move |dy, found| {
        let attended = Attended { q: q.tensor(), k: k.tensor(), v: v.tensor(), heads, upcast: false };
        let of_keys = k.is_followed() || v.is_followed();
        let Cotangents { q: dq, kv } = attended.vjp(&attention, &dy, of_keys)?;
        found.add(&q, || Ok(dq))?;
        if let Some((dk, dv)) = kv {
            found.add(&k, || Ok(dk))?;
            found.add(&v, || Ok(dv))?;
        }
        Ok(())
    }))
}

/// Attention whose weights are dropped from, in training: they are kept.
struct Dropped {
    /// `[B, heads, tokens, width]`, the queries scaled.
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// 1 / sqrt(width).
    scale: f64,
    /// `[B, heads, Q, S]`.
    weights: Tensor,
    /// What they are multiplied by.
    mask: Tensor,
}

impl Dropped {
    fn new([q, k, v]: [&Tensor; 3], heads: usize, dropout: &mut Dropout) -> Result<Self> {
        let scale = 1. / ((q.dim(2)? / heads) as f64).sqrt();
        let (q, k, v) = ((split(q, heads)? * scale)?, split(k, heads)?, split(v, heads)?);
        let weights = softmax(&q.matmul(&k.t()?)?)?;
        let mask = dropout.mask(&weights)?;
        Ok(Self { q, k, v, scale, weights, mask })
    }

    fn attended(&self) -> Result<Tensor> {
        merge(&(&self.weights * &self.mask)?.matmul(&self.v)?)
    }

    /// The cotangents of queries, keys and values.
    fn vjp(&self, dy: &Tensor) -> Result<[Tensor; 3]> {
        let Self { q, k, v, scale, weights, mask } = self;
        let dy = split(dy, q.dim(1)?)?;
        let dv = (weights * mask)?.t()?.matmul(&dy)?;
        let d_scores = softmax_vjp(weights, &(dy.matmul(&v.t()?)? * mask)?)?;
        let (dq, dk) = ((d_scores.matmul(k)? * *scale)?, d_scores.t()?.matmul(q)?);
        Ok([merge(&dq)?, merge(&dk)?, merge(&dv)?])
    }
}

/// `[B, tokens, heads * width]` to `[B, heads, tokens, width]`.
fn split(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, tokens, d) = x.dims3()?;
    Ok(x.reshape((b, tokens, heads, d / heads))?.transpose(1, 2)?.contiguous()?)
}

/// The inverse of [`split`].
fn merge(x: &Tensor) -> Result<Tensor> {
    let (b, heads, tokens, width) = x.dims4()?;
    Ok(x.transpose(1, 2)?.contiguous()?.reshape((b, tokens, heads * width))?)
}
