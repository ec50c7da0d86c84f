//! The adapter's operations, each beside its pull-back.

use candle_core::{D, Tensor};
use diffusion::{Scope, layers};

use super::graph::{Graph, Parameter, Value};
use crate::Result;

/// `y = x W^T + b` over the last dimension; `W` is `[out, in]`.
pub(super) struct Linear {
    map: layers::Linear,
    weight: Parameter,
    bias: Parameter,
}

impl Linear {
    pub(super) fn new(weight: Parameter, bias: Parameter) -> Self {
        Self { map: layers::Linear::new(weight.tensor().clone(), Some(bias.tensor().clone())), weight, bias }
    }

    pub(super) fn load(scope: &Scope, inputs: usize, outputs: usize) -> Result<Self> {
        let weight = Parameter::load(scope, "weight", &[outputs, inputs])?;
        Ok(Self::new(weight, Parameter::load(scope, "bias", &[outputs])?))
    }

    /// `[.., in]` to `[.., out]`.
    pub(super) fn forward<'a>(&'a self, graph: &mut Graph<'a>, x: &Value) -> Result<Value> {
        let y = self.map.forward(x.tensor())?;
        Ok(self.record(graph, y, x, None))
    }

    /// `residual + forward(x)`.
    pub(super) fn forward_onto<'a>(&'a self, graph: &mut Graph<'a>, residual: &Value, x: &Value) -> Result<Value> {
        let y = self.map.forward_onto(residual.tensor(), x.tensor())?;
        Ok(self.record(graph, y, x, Some(residual)))
    }

    fn record<'a>(&'a self, graph: &mut Graph<'a>, y: Tensor, x: &Value, residual: Option<&Value>) -> Value {
        let Self { map, weight, bias } = self;
        let followed = x.is_followed() || residual.is_some_and(Value::is_followed);
        let (x, residual) = (x.clone(), residual.cloned());
        graph.record(y, followed || weight.is_trained() || bias.is_trained(), move |dy, found| {
            if let Some(residual) = residual {
                found.add(&residual, || Ok(dy.clone()))?;
            }
            found.add_onto(&x, |before| match before {
                Some(before) => Ok(map.vjp_onto(before, &dy)?),
                None => Ok(map.vjp(&dy)?),
            })?;
            found.add_parameter(weight, || Ok(rows(&dy)?.t()?.matmul(&rows(x.tensor())?)?))?;
            found.add_parameter(bias, || {
                let dy = rows(&dy)?;
                // A sum over rows, as a product: candle's own sum goes element by element.
                Ok(Tensor::ones((1, dy.dim(0)?), dy.dtype(), dy.device())?.matmul(&dy)?.squeeze(0)?)
            })
        })
    }
}

/// Every leading dimension folded into rows.
fn rows(x: &Tensor) -> Result<Tensor> {
    Ok(x.reshape(((), x.dim(D::Minus1)?))?)
}

/// Layer norm over the last dimension.
pub(super) struct LayerNorm {
    norm: layers::LayerNorm,
    weight: Parameter,
    bias: Parameter,
}

impl LayerNorm {
    /// PyTorch's default.
    const EPS: f64 = 1e-5;

    pub(super) fn load(scope: &Scope, width: usize) -> Result<Self> {
        Ok(Self::new(Parameter::load(scope, "weight", &[width])?, Parameter::load(scope, "bias", &[width])?))
    }

    pub(super) fn new(weight: Parameter, bias: Parameter) -> Self {
        let norm = layers::LayerNorm::new(weight.tensor().clone(), bias.tensor().clone(), Self::EPS);
        Self { norm, weight, bias }
    }

    pub(super) fn forward<'a>(&'a self, graph: &mut Graph<'a>, x: &Value) -> Result<Value> {
        let Self { norm, weight, bias } = self;
        let trained = weight.is_trained() || bias.is_trained();
        let (y, x) = (norm.forward(x.tensor())?, x.clone());
        Ok(graph.record(y, x.is_followed() || trained, move |dy, found| {
            found.add_onto(&x, |before| match before {
                Some(before) => Ok(norm.vjp_onto(before, x.tensor(), &dy)?),
                None => Ok(norm.vjp(x.tensor(), &dy)?),
            })?;
            if trained {
                let (of_weight, of_bias) = norm.parameters_vjp(x.tensor(), &dy)?;
                found.add_parameter(weight, || Ok(of_weight))?;
                found.add_parameter(bias, || Ok(of_bias))?;
            }
            Ok(())
        }))
    }
}

/// `a + b`, of one shape.
pub(super) fn add(graph: &mut Graph, a: &Value, b: &Value) -> Result<Value> {
    let (y, a, b) = ((a.tensor() + b.tensor())?, a.clone(), b.clone());
    Ok(graph.record(y, a.is_followed() || b.is_followed(), move |dy, found| {
        found.add(&a, || Ok(dy.clone()))?;
        found.add(&b, || Ok(dy))
    }))
}

/// `x` times what asks for no gradient, of the same shape.
pub(super) fn scale(graph: &mut Graph, x: &Value, by: Tensor) -> Result<Value> {
    let (y, x) = ((x.tensor() * &by)?, x.clone());
    Ok(graph.record(y, x.is_followed(), move |dy, found| found.add(&x, || Ok((dy * by)?))))
}

pub(super) fn relu(graph: &mut Graph, x: &Value) -> Result<Value> {
    let (y, x) = (x.tensor().relu()?, x.clone());
    // The slope is the sign of the result, which is not negative.
    let result = y.clone();
    Ok(graph.record(y, x.is_followed(), move |dy, found| found.add(&x, || Ok((dy * result.sign()?)?))))
}

pub(super) fn silu(graph: &mut Graph, x: &Value) -> Result<Value> {
    let (y, x) = (layers::silu(x.tensor())?, x.clone());
    Ok(graph.record(y, x.is_followed(), move |dy, found| found.add(&x, || Ok(layers::silu_vjp(x.tensor(), &dy)?))))
}

pub(super) fn sigmoid(graph: &mut Graph, x: &Value) -> Result<Value> {
    let (y, x) = (candle_nn::ops::sigmoid(x.tensor())?, x.clone());
    let result = y.clone();
    Ok(graph.record(y, x.is_followed(), move |dy, found| {
        found.add(&x, || Ok((dy * (&result * result.affine(-1., 1.)?)?)?))
    }))
}

/// `[B, C, h, w]` to `[B, h * w, C]`.
pub(super) fn tokens(graph: &mut Graph, x: &Value) -> Result<Value> {
    let (y, x) = (x.tensor().flatten_from(2)?.transpose(1, 2)?.contiguous()?, x.clone());
    Ok(graph.record(y, x.is_followed(), move |dy, found| {
        found.add(&x, || Ok(dy.transpose(1, 2)?.contiguous()?.reshape(x.tensor().shape())?))
    }))
}

/// A weight `[N, d]` for each of `items`, `[items, N, d]`.
pub(super) fn repeat<'a>(graph: &mut Graph<'a>, weight: &'a Parameter, items: usize) -> Result<Value> {
    let (n, d) = weight.tensor().dims2()?;
    let y = weight.tensor().broadcast_as((items, n, d))?.contiguous()?;
    Ok(graph.record(y, weight.is_trained(), move |dy, found| found.add_parameter(weight, || Ok(dy.sum(0)?))))
}

/// `fixed` `[1, T, d]` plus a row `[B, d]` for each item, `[B, T, d]`.
pub(super) fn add_to_tokens(graph: &mut Graph, fixed: &Tensor, row: &Value) -> Result<Value> {
    let (y, row) = (fixed.broadcast_add(&row.tensor().unsqueeze(1)?)?, row.clone());
    Ok(graph.record(y, row.is_followed(), move |dy, found| found.add(&row, || Ok(dy.sum(1)?))))
}
