use candle_core::{D, Tensor};
use multiversion::multiversion;

use super::exp::exp;
use super::memory::by_pieces;
use super::{Values, rows_at_once, tensor};
use crate::Result;

/// Over the last dimension.
pub(in crate::layers) fn softmax(x: &Tensor) -> Result<Option<Tensor>> {
    let Some(xs) = Values::of(x) else { return Ok(None) };
    tensor(softmax_rows(&xs, x.dim(D::Minus1)?), x.shape()).map(Some)
}

/// The gradient for [`softmax`]'s input from its result and that one's cotangent.
pub(in crate::layers) fn softmax_vjp(p: &Tensor, dp: &Tensor) -> Result<Option<Tensor>> {
    let (Some(ps), Some(dps)) = (Values::of(p), Values::of(dp)) else { return Ok(None) };
    tensor(softmax_rows_vjp(&ps, &dps, p.dim(D::Minus1)?), p.shape()).map(Some)
}

/// `softmax` of each row of `n` values.
pub fn softmax_rows(x: &[f32], n: usize) -> Vec<f32> {
    by_pieces(x.len(), n, rows_at_once(n), |row, y| {
        y.copy_from_slice(&x[row * n..][..n]);
        softmax_row(y);
    })
}

/// In place.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
pub(super) fn softmax_row(row: &mut [f32]) {
    let largest = largest(row);
    row.iter_mut().for_each(|v| *v = exp(*v - largest));
    let inverse = 1. / sum(row);
    row.iter_mut().for_each(|v| *v *= inverse);
}

/// The gradient for `x` from the result `p` and its cotangent: `p (dp - sum(p dp))`, by rows of `n` values.
fn softmax_rows_vjp(p: &[f32], dp: &[f32], n: usize) -> Vec<f32> {
    by_pieces(p.len(), n, rows_at_once(n), |row, dx| {
        dx.copy_from_slice(&dp[row * n..][..n]);
        softmax_row_vjp(&p[row * n..][..n], dx);
    })
}

/// From the cotangent to the gradient in place.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
pub(super) fn softmax_row_vjp(p: &[f32], d: &mut [f32]) {
    d.iter_mut().zip(p).for_each(|(d, p)| *d *= p);
    let along = sum(d);
    d.iter_mut().zip(p).for_each(|(d, p)| *d -= p * along);
}

/// In lanes; a NaN among the values may be passed over, the sum of exponentials is NaN all the same.
#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let (whole, rest) = values.as_chunks::<8>();
    let mut lanes = [f32::NEG_INFINITY; 8];
    whole.iter().for_each(|values| (0..8).for_each(|i| lanes[i] = greater(lanes[i], values[i])));
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| greater(a, *b))
}

/// In eight lanes.
#[inline(always)]
fn sum(values: &[f32]) -> f32 {
    let (whole, rest) = values.as_chunks::<8>();
    let mut lanes = [0f32; 8];
    whole.iter().for_each(|values| (0..8).for_each(|i| lanes[i] += values[i]));
    lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
}
