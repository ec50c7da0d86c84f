use candle_core::{D, Tensor};
use multiversion::multiversion;
use rayon::prelude::*;

use super::exp::normal;
use super::{LEAST, Values, tensor};
use crate::Result;

/// `value * gelu(gate)` of rows `[value | gate]`.
pub(in crate::layers) fn geglu(x: &Tensor) -> Result<Option<Tensor>> {
    let Some(xs) = Values::of(x) else { return Ok(None) };
    let mut shape = x.dims().to_vec();
    let half = x.dim(D::Minus1)? / 2;
    *shape.last_mut().expect("at least one dimension") = half;
    let mut y = vec![0f32; xs.len() / 2];
    let rows = y.par_chunks_mut(half).zip(xs.par_chunks(2 * half));
    rows.with_min_len(LEAST.div_ceil(half)).for_each(|(y, x)| geglu_row(x, y));
    tensor(y, shape).map(Some)
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
    let mut dx = vec![0f32; xs.len()];
    let rows = dx.par_chunks_mut(2 * half).zip(xs.par_chunks(2 * half)).zip(dys.par_chunks(half));
    rows.with_min_len(LEAST.div_ceil(half)).for_each(|((dx, x), dy)| geglu_row_vjp(x, dy, dx));
    tensor(dx, x.shape()).map(Some)
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
