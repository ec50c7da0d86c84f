use candle_core::Tensor;

use super::memory::{Shared, written};
use super::product::{Matrix, Product};
use super::{Values, tensor};
use crate::Result;

/// `x W^T` over the last dimension, and what is to be added: a bias `[out]`, a tensor of the result's shape, both or nothing.
pub(in crate::layers) fn linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    added: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let (outputs, inputs) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    let fits = shape.last().is_some_and(|last| *last == inputs && inputs > 0);
    shape.iter_mut().next_back().into_iter().for_each(|last| *last = outputs);
    if !fits || added.is_some_and(|added| added.dims() != shape) {
        // The operations on tensors say what does not fit.
        return Ok(None);
    }
    let (Some(xs), Some(weight)) = (Values::of(x), Values::of(weight)) else { return Ok(None) };
    let (bias, added) = (bias.map(Values::of), added.map(Values::of));
    if matches!(bias, Some(None)) || matches!(added, Some(None)) {
        return Ok(None);
    }
    let (bias, added) = (bias.flatten(), added.flatten());
    let product = Product::new(Matrix::new(&xs, inputs), Matrix::new(&weight, inputs).t());
    tensor(product.plus_row(bias.as_deref()).plus(added.as_deref()).compute(), shape).map(Some)
}

/// `dy W` over the last dimension, and a tensor of the result's shape that is to be added.
pub(in crate::layers) fn linear_vjp(dy: &Tensor, weight: &Tensor, added: Option<&Tensor>) -> Result<Option<Tensor>> {
    let (outputs, inputs) = weight.dims2()?;
    let (Some(dys), Some(weight)) = (Values::of(dy), Values::of(weight)) else { return Ok(None) };
    let mut shape = dy.dims().to_vec();
    match shape.last_mut() {
        Some(last) if *last == outputs && outputs > 0 && inputs > 0 => *last = inputs,
        _ => return Ok(None),
    }
    let added = match added.filter(|added| added.dims() == shape).map(Values::of) {
        Some(Some(added)) => Some(added),
        None if added.is_none() => None,
        _ => return Ok(None),
    };
    let product = Product::new(Matrix::new(&dys, outputs), Matrix::new(&weight, inputs));
    tensor(product.plus(added.as_deref()).compute(), shape).map(Some)
}

/// `W x` of every pixel of `x`, `[B, in, h, w]` to `[B, out, h, w]`, and a bias `[out]`.
pub(in crate::layers) fn linear_channels(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    let inputs = weight.dim(1)?;
    let (Some(weight), bias) = (Values::of(weight), bias.map(Values::of)) else { return Ok(None) };
    if matches!(bias, Some(None)) {
        return Ok(None);
    }
    channels(x, Matrix::new(&weight, inputs.max(1)), bias.flatten().as_deref())
}

/// `W^T dy` of every pixel of `dy`, `[B, out, h, w]` to `[B, in, h, w]`.
pub(in crate::layers) fn linear_channels_vjp(dy: &Tensor, weight: &Tensor) -> Result<Option<Tensor>> {
    let inputs = weight.dim(1)?;
    let Some(weight) = Values::of(weight) else { return Ok(None) };
    channels(dy, Matrix::new(&weight, inputs.max(1)).t(), None)
}

/// Every item's product of a matrix with its pixels `[columns, h * w]`.
fn channels(x: &Tensor, matrix: Matrix, bias: Option<&[f32]>) -> Result<Option<Tensor>> {
    let (to, from) = (matrix.rows(), matrix.columns());
    let (batch, found, height, width) = x.dims4()?;
    let pixels = height * width;
    let Some(xs) = Values::of(x).filter(|_| found == from && from * to * pixels > 0) else { return Ok(None) };
    let write = |y: &Shared| {
        for (item, x) in xs.chunks(from * pixels).enumerate() {
            // SAFETY: there is room for every item.
            unsafe { Product::new(matrix, Matrix::new(x, pixels)).plus_column(bias).write(y, item * to * pixels) };
        }
    };
    // SAFETY: every item is written.
    tensor(unsafe { written(batch * to * pixels, write) }, (batch, to, height, width)).map(Some)
}

/// Rows of `inputs` values each, a weight `[outputs, inputs]` and a bias `[outputs]` to rows `x W^T + b`. Panics where the
/// lengths do not fit each other.
pub fn linear_rows(x: &[f32], weight: &[f32], bias: &[f32], inputs: usize) -> Vec<f32> {
    let (rows, outputs) = (x.len() / inputs, bias.len());
    assert!(x.len() == rows * inputs && weight.len() == outputs * inputs, "{} and {}", x.len(), weight.len());
    let product = Product::new(Matrix::new(x, inputs), Matrix::new(weight, inputs).t());
    product.plus_row(Some(bias)).compute()
}

/// The cotangents of [`linear_rows`]' rows, `dy W`, from those of its result, rows of as many values as the weight has rows. Panics
/// where the lengths do not fit each other.
pub fn linear_rows_vjp(dy: &[f32], weight: &[f32], inputs: usize) -> Vec<f32> {
    let weight = Matrix::new(weight, inputs);
    Product::new(Matrix::new(dy, weight.rows()), weight).compute()
}
