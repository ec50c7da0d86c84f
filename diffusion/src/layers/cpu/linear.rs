use candle_core::{D, Tensor};

use super::product::{Before, Matrix, parallel_product};
use super::{Values, tensor};
use crate::Result;

/// `x W^T + b` over the last dimension.
pub(in crate::layers) fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Option<Tensor>> {
    let (outputs, inputs) = weight.dims2()?;
    if x.dim(D::Minus1)? != inputs {
        // The product of tensors says what does not fit.
        return Ok(None);
    }
    let (Some(xs), Some(weight), Some(bias)) = (Values::of(x), Values::of(weight), Values::of(bias)) else {
        return Ok(None);
    };
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("at least one dimension") = outputs;
    tensor(linear_rows(&xs, &weight, &bias, inputs), shape).map(Some)
}

/// Rows of `inputs` values each, a weight `[outputs, inputs]` and a bias `[outputs]` to rows `x W^T + b`. Panics where the
/// lengths do not fit each other.
pub fn linear_rows(x: &[f32], weight: &[f32], bias: &[f32], inputs: usize) -> Vec<f32> {
    let (rows, outputs) = (x.len() / inputs, bias.len());
    assert!(x.len() == rows * inputs && weight.len() == outputs * inputs, "{} and {}", x.len(), weight.len());
    let mut y = bias.repeat(rows);
    parallel_product(&mut y, Before::AddedTo, 1., Matrix::new(x, inputs), Matrix::new(weight, inputs).t());
    y
}
