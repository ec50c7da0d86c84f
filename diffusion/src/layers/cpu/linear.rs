use candle_core::Tensor;

use super::memory::{by_pieces, copied, repeated};
use super::product::{Matrix, parallel_product};
use super::{Values, rows_at_once, tensor};
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
    let before = match (&bias, &added) {
        (Some(None), _) | (_, Some(None)) => return Ok(None),
        (None, None) => None,
        (Some(Some(bias)), None) => Some(repeated(bias, xs.len() / inputs)),
        (None, Some(Some(added))) => Some(copied(added)),
        (Some(Some(bias)), Some(Some(added))) => {
            let (added, bias) = (&**added, &**bias);
            let row = |row: usize, y: &mut [f32]| {
                let sums = added[row * outputs..].iter().zip(bias).map(|(added, bias)| added + bias);
                y.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum);
            };
            Some(by_pieces(added.len(), outputs, rows_at_once(outputs), row))
        }
    };
    let y = parallel_product(before, Matrix::new(&xs, inputs), Matrix::new(&weight, inputs).t());
    tensor(y, shape).map(Some)
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
    let before = match added.filter(|added| added.dims() == shape).map(Values::of) {
        Some(Some(before)) => Some(copied(&before)),
        None if added.is_none() => None,
        _ => return Ok(None),
    };
    tensor(parallel_product(before, Matrix::new(&dys, outputs), Matrix::new(&weight, inputs)), shape).map(Some)
}

/// Rows of `inputs` values each, a weight `[outputs, inputs]` and a bias `[outputs]` to rows `x W^T + b`. Panics where the
/// lengths do not fit each other.
pub fn linear_rows(x: &[f32], weight: &[f32], bias: &[f32], inputs: usize) -> Vec<f32> {
    let (rows, outputs) = (x.len() / inputs, bias.len());
    assert!(x.len() == rows * inputs && weight.len() == outputs * inputs, "{} and {}", x.len(), weight.len());
    parallel_product(Some(repeated(bias, rows)), Matrix::new(x, inputs), Matrix::new(weight, inputs).t())
}
