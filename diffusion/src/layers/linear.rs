use candle_core::Tensor;

use super::cpu;
#[cfg(feature = "cuda")]
use super::cuda;
use crate::{Result, Scope};

/// `y = x W^T + b` over the last dimension; `W` is `[out, in]`.
pub struct Linear {
    pub(crate) weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// Of a weight `[out, in]` and a bias `[out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

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
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_by(x, None)
    }

    /// `residual + forward(x)`.
    pub fn forward_onto(&self, residual: &Tensor, x: &Tensor) -> Result<Tensor> {
        self.forward_by(x, Some(residual))
    }

    fn forward_by(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        let x = x.contiguous()?;
        if let Some(y) = cpu::linear(&x, &self.weight, self.bias.as_ref(), residual)? {
            return Ok(y);
        }
        let mut y = matmul_last(&x, &self.weight.t()?)?;
        #[cfg(feature = "cuda")]
        if (self.bias.is_some() || residual.is_some())
            && let Some(sum) = cuda::add(&y, self.bias.as_ref(), residual)?
        {
            return Ok(sum);
        }
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        Ok(match residual {
            Some(residual) => (residual + y)?,
            None => y,
        })
    }

    /// `[.., out]` to `[.., in]`.
    pub fn vjp(&self, dy: &Tensor) -> Result<Tensor> {
        self.vjp_by(dy, None)
    }

    /// `before + vjp(dy)`.
    pub fn vjp_onto(&self, before: &Tensor, dy: &Tensor) -> Result<Tensor> {
        self.vjp_by(dy, Some(before))
    }

    fn vjp_by(&self, dy: &Tensor, before: Option<&Tensor>) -> Result<Tensor> {
        let dy = dy.contiguous()?;
        if let Some(dx) = cpu::linear_vjp(&dy, &self.weight, before)? {
            return Ok(dx);
        }
        let dx = matmul_last(&dy, &self.weight)?;
        #[cfg(feature = "cuda")]
        if before.is_some()
            && let Some(sum) = cuda::add(&dx, None, before)?
        {
            return Ok(sum);
        }
        Ok(match before {
            Some(before) => (before + dx)?,
            None => dx,
        })
    }

    /// The same map over the channels of an image, `[B, in, h, w]` to `[B, out, h, w]`: a 1x1 convolution.
    pub(crate) fn forward_channels(&self, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if cuda::takes(x) {
            return cuda::channels_first(&self.forward(&cuda::channels_last(x)?)?);
        }
        let x = x.contiguous()?;
        if let Some(y) = cpu::linear_channels(&x, &self.weight, self.bias.as_ref())? {
            return Ok(y);
        }
        let y = matmul_channels(&self.weight, &x)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?)?,
            None => y,
        })
    }

    /// `[B, out, h, w]` to `[B, in, h, w]`.
    pub(crate) fn vjp_channels(&self, dy: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if cuda::takes(dy) {
            return cuda::channels_first(&self.vjp(&cuda::channels_last(dy)?)?);
        }
        let dy = dy.contiguous()?;
        if let Some(dx) = cpu::linear_channels_vjp(&dy, &self.weight)? {
            return Ok(dx);
        }
        matmul_channels(&self.weight.t()?, &dy)
    }
}

/// Every leading dimension is folded into the rows of one product.
fn matmul_last(x: &Tensor, matrix: &Tensor) -> Result<Tensor> {
    let (inputs, outputs) = matrix.dims2()?;
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("a tensor with at least one dimension") = outputs;
    Ok(x.reshape(((), inputs))?.matmul(matrix)?.reshape(shape)?)
}

fn matmul_channels(matrix: &Tensor, x: &Tensor) -> Result<Tensor> {
    let (b, _, h, w) = x.dims4()?;
    let (outputs, inputs) = matrix.dims2()?;
    // The matrix is broadcast over the batch with stride zero: no copy.
    let y = matrix.broadcast_as((b, outputs, inputs))?.matmul(&x.reshape((b, inputs, h * w))?)?;
    Ok(y.reshape((b, outputs, h, w))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::finite_difference::{assert_values, assert_vjp, numbers, values, weights};

    #[test]
    fn tokens() {
        let file = weights(&[("weight", &[5, 4]), ("bias", &[5])]);
        let linear = Linear::load(&file.root(), 4, 5).unwrap();
        let x = values(0, (2, 3, 4));
        let (w, b, xs) = (numbers(&linear.weight), numbers(linear.bias.as_ref().unwrap()), numbers(&x));
        let y = linear.forward(&x).unwrap();
        assert_eq!(y.dims(), [2, 3, 5]);
        let dot = |row: usize, o: usize| (0..4).map(|i| xs[row * 4 + i] * w[o * 4 + i]).sum::<f64>();
        let expected: Vec<f64> = (0..30).map(|at| dot(at / 5, at % 5) + b[at % 5]).collect();
        assert_values(&y, &expected, 1e-14);
        assert_vjp("linear", &x, |x| linear.forward(x), |dy| linear.vjp(dy));
        let (residual, dy) = (values(1, y.shape()), values(2, y.shape()));
        let sum = |a: &Tensor, b: Tensor| numbers(&(a + b).unwrap());
        assert_values(&linear.forward_onto(&residual, &x).unwrap(), &sum(&residual, y), 0.);
        assert_values(&linear.vjp_onto(&x, &dy).unwrap(), &sum(&x, linear.vjp(&dy).unwrap()), 0.);
    }

    #[test]
    fn channels_are_a_1x1_convolution() {
        let file = weights(&[("weight", &[5, 4, 1, 1]), ("bias", &[5])]);
        let linear = Linear::load_conv1x1(&file.root(), 4, 5).unwrap();
        let x = values(0, (2, 4, 3, 2));
        let conv = x.conv2d(&linear.weight.reshape((5, 4, 1, 1)).unwrap(), 0, 1, 1, 1).unwrap();
        let bias = linear.bias.as_ref().unwrap().reshape((1, 5, 1, 1)).unwrap();
        assert_values(&linear.forward_channels(&x).unwrap(), &numbers(&conv.broadcast_add(&bias).unwrap()), 1e-14);
        assert_vjp("1x1 convolution", &x, |x| linear.forward_channels(x), |dy| linear.vjp_channels(dy));
    }

    /// Attention and up blocks hand over transposed and narrowed tensors.
    #[test]
    fn strided_inputs() {
        let file = weights(&[("weight", &[5, 4])]);
        let linear = Linear::load_no_bias(&file.root(), 4, 5).unwrap();
        let x = values(0, (2, 4, 3)).transpose(1, 2).unwrap();
        let copied = linear.forward(&x.contiguous().unwrap()).unwrap();
        assert_values(&linear.forward(&x).unwrap(), &numbers(&copied), 0.);
        let x = values(0, (2, 6, 3, 2)).narrow(1, 1, 4).unwrap();
        let copied = linear.forward_channels(&x.contiguous().unwrap()).unwrap();
        assert_values(&linear.forward_channels(&x).unwrap(), &numbers(&copied), 0.);
    }
}
