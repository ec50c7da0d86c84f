use candle_core::Tensor;

use crate::{Result, Scope};

/// `y = x W^T + b` over the last dimension; `W` is `[out, in]`.
pub(crate) struct Linear {
    pub(crate) weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    pub(crate) fn load(scope: &Scope, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self { bias: Some(scope.tensor("bias", &[outputs])?), ..Self::load_no_bias(scope, inputs, outputs)? })
    }

    pub(crate) fn load_no_bias(scope: &Scope, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self { weight: scope.tensor("weight", &[outputs, inputs])?, bias: None })
    }

    /// A 1x1 convolution's weights, used as a matrix.
    pub(crate) fn load_conv1x1(scope: &Scope, inputs: usize, outputs: usize) -> Result<Self> {
        let weight = scope.tensor("weight", &[outputs, inputs, 1, 1])?.reshape((outputs, inputs))?;
        Ok(Self { weight, bias: Some(scope.tensor("bias", &[outputs])?) })
    }

    /// `[.., in]` to `[.., out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = matmul_last(x, &self.weight.t()?)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }

    /// `[.., out]` to `[.., in]`.
    pub(crate) fn vjp(&self, dy: &Tensor) -> Result<Tensor> {
        matmul_last(dy, &self.weight)
    }

    /// The same map over the channels of an image, `[B, in, h, w]` to `[B, out, h, w]`: a 1x1 convolution.
    pub(crate) fn forward_channels(&self, x: &Tensor) -> Result<Tensor> {
        let y = matmul_channels(&self.weight, x)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?)?,
            None => y,
        })
    }

    /// `[B, out, h, w]` to `[B, in, h, w]`.
    pub(crate) fn vjp_channels(&self, dy: &Tensor) -> Result<Tensor> {
        matmul_channels(&self.weight.t()?, dy)
    }
}

/// Every leading dimension is folded into the rows of one product.
fn matmul_last(x: &Tensor, matrix: &Tensor) -> Result<Tensor> {
    let (inputs, outputs) = matrix.dims2()?;
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("a tensor with at least one dimension") = outputs;
    Ok(x.contiguous()?.reshape(((), inputs))?.matmul(matrix)?.reshape(shape)?)
}

fn matmul_channels(matrix: &Tensor, x: &Tensor) -> Result<Tensor> {
    let (b, _, h, w) = x.dims4()?;
    let (outputs, inputs) = matrix.dims2()?;
    // The matrix is broadcast over the batch with stride zero: no copy.
    let y = matrix.broadcast_as((b, outputs, inputs))?.matmul(&x.contiguous()?.reshape((b, inputs, h * w))?)?;
    Ok(y.reshape((b, outputs, h, w))?)
}
