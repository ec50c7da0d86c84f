use candle_core::{D, Tensor};
use diffusion::Scope;

use super::fused;
use crate::Result;

/// `y = x W^T + b` over the last dimension; `W` is `[out, in]`.
pub(super) struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    pub(super) fn new(weight: Tensor, bias: Tensor) -> Self {
        Self { weight, bias }
    }

    pub(super) fn load(scope: &Scope, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self::new(scope.tensor("weight", &[outputs, inputs])?, scope.tensor("bias", &[outputs])?))
    }

    /// `[.., in]` to `[.., out]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (outputs, inputs) = self.weight.dims2()?;
        let mut shape = x.dims().to_vec();
        *shape.last_mut().expect("a tensor with at least one dimension") = outputs;
        let rows = x.contiguous()?.reshape(((), inputs))?;
        if fused::takes(&rows) {
            let y = rows.apply_op3(&self.weight, &self.bias, fused::Linear)?;
            return Ok(y.reshape(shape)?);
        }
        let y = rows.matmul(&self.weight.t()?)?;
        let bias = in_every_row(&self.bias, rows.dim(0)?)?;
        Ok((y + bias)?.reshape(shape)?)
    }
}

/// Layer norm over the last dimension, of operations that autograd follows; candle's fused one is not.
pub(super) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    /// PyTorch's default.
    const EPS: f64 = 1e-5;

    pub(super) fn new(weight: Tensor, bias: Tensor) -> Self {
        Self { weight, bias }
    }

    pub(super) fn load(scope: &Scope, width: usize) -> Result<Self> {
        Ok(Self::new(scope.tensor("weight", &[width])?, scope.tensor("bias", &[width])?))
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let rows = x.contiguous()?.reshape(((), x.dim(D::Minus1)?))?;
        if fused::takes(&rows) {
            let y = rows.apply_op3(&self.weight, &self.bias, fused::LayerNorm { eps: Self::EPS })?;
            return Ok(y.reshape(x.shape())?);
        }
        let centred = rows.broadcast_sub(&rows.mean_keepdim(1)?)?;
        let inverse = (centred.sqr()?.mean_keepdim(1)? + Self::EPS)?.sqrt()?.recip()?;
        let count = rows.dim(0)?;
        let scaled = (centred.broadcast_mul(&inverse)? * in_every_row(&self.weight, count)?)?;
        Ok((scaled + in_every_row(&self.bias, count)?)?.reshape(x.shape())?)
    }
}

/// Softmax over the last dimension, which autograd follows.
pub(super) fn softmax(x: &Tensor) -> Result<Tensor> {
    match fused::takes(x) {
        true => Ok(x.contiguous()?.apply_op1(fused::Softmax)?),
        false => Ok(candle_nn::ops::softmax(x, D::Minus1)?),
    }
}

/// A row `[n]` as `[rows, n]`. A product with ones, and not a broadcast: the gradient of a broadcast is a sum over rows, which
/// candle computes element by element, that of a product is one.
fn in_every_row(row: &Tensor, rows: usize) -> Result<Tensor> {
    let ones = Tensor::ones((rows, 1), row.dtype(), row.device())?;
    Ok(ones.matmul(&row.unsqueeze(0)?)?)
}
