use candle_core::{D, Tensor};
use diffusion::Scope;

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

    pub(super) fn load(scope: &Scope, width: usize) -> Result<Self> {
        Ok(Self { weight: scope.tensor("weight", &[width])?, bias: scope.tensor("bias", &[width])? })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let rows = x.contiguous()?.reshape(((), x.dim(D::Minus1)?))?;
        let centred = rows.broadcast_sub(&rows.mean_keepdim(1)?)?;
        let inverse = (centred.sqr()?.mean_keepdim(1)? + Self::EPS)?.sqrt()?.recip()?;
        let count = rows.dim(0)?;
        let scaled = (centred.broadcast_mul(&inverse)? * in_every_row(&self.weight, count)?)?;
        Ok((scaled + in_every_row(&self.bias, count)?)?.reshape(x.shape())?)
    }
}

/// A row `[n]` as `[rows, n]`. A product with ones, and not a broadcast: the gradient of a broadcast is a sum over rows, which
/// candle computes element by element (ten times the time of a whole backward pass, in training), that of a product is one.
pub(super) fn in_every_row(row: &Tensor, rows: usize) -> Result<Tensor> {
    let ones = Tensor::ones((rows, 1), row.dtype(), row.device())?;
    Ok(ones.matmul(&row.unsqueeze(0)?)?)
}
