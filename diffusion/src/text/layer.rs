//! One layer of CLIP's text transformer: pre-norm self-attention and a two-layer perceptron.

use candle_core::{D, DType, Tensor};
use candle_nn::{Linear, Module, ops};

use super::config::Activation;
use crate::{Result, Scope};

/// The dtype of sums and exponentials: f32 where the model's own is narrower.
pub(super) fn statistics_dtype(dtype: DType) -> DType {
    if matches!(dtype, DType::F16 | DType::BF16) { DType::F32 } else { dtype }
}

/// Layer norm over the last dimension, computed in [`statistics_dtype`].
pub(super) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Takes `weight` and `bias`, both `[size]`.
    pub fn load(scope: &Scope, size: usize, eps: f64) -> Result<Self> {
        let dtype = statistics_dtype(scope.dtype());
        let weight = scope.tensor("weight", &[size])?.to_dtype(dtype)?;
        let bias = scope.tensor("bias", &[size])?.to_dtype(dtype)?;
        Ok(Self { weight, bias, eps })
    }

    /// `[B, S, D] -> [B, S, D]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let dtype = x.dtype();
        let x = x.to_dtype(self.weight.dtype())?;
        let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let deviation = (x.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?;
        let x = x.broadcast_div(&deviation)?.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)?;
        Ok(x.to_dtype(dtype)?)
    }
}

fn linear(scope: &Scope, inputs: usize, outputs: usize) -> Result<Linear> {
    Ok(Linear::new(scope.tensor("weight", &[outputs, inputs])?, Some(scope.tensor("bias", &[outputs])?)))
}

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
            query: linear(&attention.enter("q_proj"), d, d)?,
            key: linear(&attention.enter("k_proj"), d, d)?,
            value: linear(&attention.enter("v_proj"), d, d)?,
            out: linear(&attention.enter("out_proj"), d, d)?,
            heads,
            norm2: LayerNorm::load(&scope.enter("layer_norm2"), d, eps)?,
            fc1: linear(&mlp.enter("fc1"), d, ff)?,
            fc2: linear(&mlp.enter("fc2"), ff, d)?,
            activation,
        })
    }

    /// `[B, S, D] -> [B, S, D]`; `mask` is `[S, S]` in [`statistics_dtype`], added to the scores.
    pub fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let x = (x + self.attend(&self.norm1.forward(x)?, mask)?)?;
        let hidden = self.activation.forward(&self.fc1.forward(&self.norm2.forward(&x)?)?)?;
        Ok((&x + self.fc2.forward(&hidden)?)?)
    }

    fn attend(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (batch, positions, d) = x.dims3()?;
        let split = |x: Tensor| x.reshape((batch, positions, self.heads, ()))?.transpose(1, 2)?.contiguous();
        let scale = ((d / self.heads) as f64).powf(-0.5);
        // The query is scaled rather than the scores: half precision holds the products then.
        let query = split((self.query.forward(x)? * scale)?)?;
        let key = split(self.key.forward(x)?)?;
        let value = split(self.value.forward(x)?)?;
        let scores = query.matmul(&key.t()?)?.to_dtype(mask.dtype())?.broadcast_add(mask)?;
        let weights = ops::softmax_last_dim(&scores)?.to_dtype(x.dtype())?;
        let mixed = weights.matmul(&value)?.transpose(1, 2)?.reshape((batch, positions, d))?;
        Ok(self.out.forward(&mixed)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn norm(weight: Tensor, bias: Tensor) -> LayerNorm {
        let dtype = statistics_dtype(weight.dtype());
        LayerNorm { weight: weight.to_dtype(dtype).unwrap(), bias: bias.to_dtype(dtype).unwrap(), eps: 1e-5 }
    }

    #[test]
    fn layer_norm_by_hand() {
        let d = Device::Cpu;
        let x = Tensor::new(&[[[1f64, 3.0]]], &d).unwrap();
        let norm = norm(Tensor::new(&[2f64, 5.0], &d).unwrap(), Tensor::new(&[0.5f64, -1.0], &d).unwrap());
        let y = norm.forward(&x).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let unit = 1.0 / (1.0f64 + 1e-5).sqrt();
        assert!((y[0] - (0.5 - 2.0 * unit)).abs() < 1e-12 && (y[1] - (5.0 * unit - 1.0)).abs() < 1e-12, "{y:?}");
    }

    #[test]
    fn half_precision_statistics_do_not_overflow() {
        // The squares of these values exceed the largest f16, 65504.
        let d = Device::Cpu;
        let x = Tensor::new(&[[[-600f32, 600.0, -600.0, 600.0]]], &d).unwrap().to_dtype(DType::F16).unwrap();
        let ones = Tensor::ones(4, DType::F16, &d).unwrap();
        let y = norm(ones.clone(), ones.zeros_like().unwrap()).forward(&x).unwrap();
        assert_eq!(y.dtype(), DType::F16);
        let y = y.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(y, [-1.0, 1.0, -1.0, 1.0]);
    }
}
