use candle_core::{D, Tensor};
use gemm::{Parallelism, gemm};

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
    let stride = |n: usize| n as isize;
    // SAFETY: every pointer is to a row-major matrix of the size that is given, as was asserted: y `[rows, outputs]`, x
    // `[rows, inputs]`, weight `[outputs, inputs]`, read transposed.
    unsafe {
        gemm(
            rows,
            outputs,
            inputs,
            y.as_mut_ptr(),
            1,
            stride(outputs),
            true,
            x.as_ptr(),
            1,
            stride(inputs),
            weight.as_ptr(),
            stride(inputs),
            1,
            1.,
            1.,
            false,
            false,
            false,
            Parallelism::Rayon(0),
        );
    }
    y
}
