use candle_core::{D, Tensor};
use multiversion::multiversion;

use super::exp::normal;
use super::memory::by_pieces;
use super::{Values, rows_at_once, tensor};
use crate::Result;

/// `value * gelu(gate)` of rows `[value | gate]`.
pub(in crate::layers) fn geglu(x: &Tensor) -> Result<Option<Tensor>> {
    let Some(xs) = Values::of(x) else { return Ok(None) };
    let mut shape = x.dims().to_vec();
    let half = x.dim(D::Minus1)? / 2;
    *shape.last_mut().expect("at least one dimension") = half;
    tensor(geglu_rows(&xs, half), shape).map(Some)
}

/// `value * gelu(gate)` of rows `[value | gate]` of twice `half` values.
pub fn geglu_rows(x: &[f32], half: usize) -> Vec<f32> {
    let row = |row: usize, y: &mut [f32]| geglu_row(&x[2 * half * row..][..2 * half], y);
    by_pieces(x.len() / 2, half, rows_at_once(half), row)
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn geglu_row(x: &[f32], y: &mut [f32]) {
    let (value, gate) = x.split_at(y.len());
    for ((y, value), gate) in y.iter_mut().zip(value).zip(gate) {
        *y = value * gate * normal(*gate).1;
    }
}

/// The gradient for `x` of [`geglu`] at a cotangent `dy`.
pub(in crate::layers) fn geglu_vjp(x: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
    let (Some(xs), Some(dys)) = (Values::of(x), Values::of(dy)) else { return Ok(None) };
    let half = x.dim(D::Minus1)? / 2;
    tensor(geglu_rows_vjp(&xs, &dys, half), x.shape()).map(Some)
}

/// The gradient for `x` of [`geglu_rows`] at a cotangent `dy`.
pub fn geglu_rows_vjp(x: &[f32], dy: &[f32], half: usize) -> Vec<f32> {
    let row = |row: usize, dx: &mut [f32]| {
        geglu_row_vjp(&x[2 * half * row..][..2 * half], &dy[half * row..][..half], dx);
    };
    by_pieces(x.len(), 2 * half, rows_at_once(half), row)
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn geglu_row_vjp(x: &[f32], dy: &[f32], dx: &mut [f32]) {
    let half = dy.len();
    let ((d_value, d_gate), (value, gate)) = (dx.split_at_mut(half), x.split_at(half));
    for i in 0..half {
        let (density, cumulative) = normal(gate[i]);
        d_value[i] = dy[i] * gate[i] * cumulative;
        d_gate[i] = dy[i] * value[i] * (cumulative + gate[i] * density);
    }
}
