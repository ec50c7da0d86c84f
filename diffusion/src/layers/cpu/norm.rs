use candle_core::Tensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::exp::sigmoid;
use super::memory::by_pieces;
use super::{Values, rows_at_once, tensor};
use crate::Result;

/// Scale and shift of a normalised tensor, one of each per channel.
#[derive(Clone, Copy)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Affine<'a> {
    pub weight: &'a Tensor,
    pub bias: &'a Tensor,
    pub eps: f64,
}

/// Mean and inverse deviation; the variance is that of the centred values.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn statistics(values: &[f32], eps: f64) -> (f32, f32) {
    let n = values.len() as f64;
    let mean = (sum(values, |v| v) / n) as f32;
    let variance = sum(values, |v| (v - mean) * (v - mean)) / n;
    (mean, (1. / (variance + eps).sqrt()) as f32)
}

/// In lanes, and in blocks that keep a long sum as precise as a short one.
#[inline(always)]
fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let block = |block: &[f32]| {
        let (whole, rest) = block.as_chunks::<16>();
        let mut lanes = [0f32; 16];
        for values in whole {
            (0..16).for_each(|i| lanes[i] += f(values[i]));
        }
        lanes.iter().sum::<f32>() + rest.iter().map(|v| f(*v)).sum::<f32>()
    };
    values.chunks(1024).map(|values| f64::from(block(values))).sum()
}

/// `norm(x)`, or `silu(norm(x))`, over `[B, C, h, w]` in groups of channels.
pub(in crate::layers) fn group_norm(x: &Tensor, affine: Affine, groups: usize, silu: bool) -> Result<Option<Tensor>> {
    let (_, channels, h, w) = x.dims4()?;
    let (Some(xs), Some(weight), Some(bias)) = (Values::of(x), Values::of(affine.weight), Values::of(affine.bias))
    else {
        return Ok(None);
    };
    let sizes = GroupNormSizes { of_group: channels / groups, plane: h * w, eps: affine.eps, silu };
    tensor(group_norm_planes(&xs, (&weight, &bias), sizes), x.shape()).map(Some)
}

/// Of a group norm, perhaps with a SiLU after it.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the names say it")]
pub struct GroupNormSizes {
    /// Channels of a group.
    pub of_group: usize,
    /// Pixels of a channel.
    pub plane: usize,
    pub eps: f64,
    pub silu: bool,
}

/// `norm(x)`, or `silu(norm(x))`, of channels of `plane` values, in groups; weight and bias `[channels]`.
pub fn group_norm_planes(xs: &[f32], (weight, bias): (&[f32], &[f32]), sizes: GroupNormSizes) -> Vec<f32> {
    let GroupNormSizes { of_group, plane, eps, silu } = sizes;
    let (n, groups) = (of_group * plane, weight.len() / of_group);
    let group = |row: usize, y: &mut [f32]| {
        let x = &xs[row * n..][..n];
        let (mean, inverse) = statistics(x, eps);
        let first = row % groups * of_group;
        for (channel, (y, x)) in (first..).zip(y.chunks_mut(plane).zip(x.chunks(plane))) {
            let scale = inverse * weight[channel];
            let shift = bias[channel] - mean * scale;
            if silu {
                affine_silu(x, scale, shift, y);
            } else {
                y.iter_mut().zip(x).for_each(|(y, x)| *y = x * scale + shift);
            }
        }
    };
    by_pieces(xs.len(), n, rows_at_once(n), group)
}

/// The gradient for `x` of [`group_norm`] at a cotangent `dy`, plus `added` of its shape.
pub(in crate::layers) fn group_norm_vjp(
    x: &Tensor,
    dy: &Tensor,
    affine: Affine,
    groups: usize,
    silu: bool,
    added: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let (_, channels, h, w) = x.dims4()?;
    let Some(added) = to_be_added(added, x) else { return Ok(None) };
    let values = (Values::of(x), Values::of(dy), Values::of(affine.weight), Values::of(affine.bias));
    let (Some(xs), Some(dys), Some(weight), Some(bias)) = values else { return Ok(None) };
    let sizes = GroupNormSizes { of_group: channels / groups, plane: h * w, eps: affine.eps, silu };
    tensor(group_norm_planes_vjp(&xs, &dys, (&weight, &bias), sizes, added.as_deref()), x.shape()).map(Some)
}

/// The gradient for `x` of [`group_norm_planes`] at a cotangent `dy`, plus `added`.
pub fn group_norm_planes_vjp(
    xs: &[f32],
    dys: &[f32],
    (weight, bias): (&[f32], &[f32]),
    sizes: GroupNormSizes,
    added: Option<&[f32]>,
) -> Vec<f32> {
    let GroupNormSizes { of_group, plane, eps, silu } = sizes;
    let (n, groups) = (of_group * plane, weight.len() / of_group);
    let group = |row: usize, dx: &mut [f32]| {
        let (x, dy) = (&xs[row * n..][..n], &dys[row * n..][..n]);
        let (mean, inverse) = statistics(x, eps);
        let first = row % groups * of_group;
        let planes = dx.chunks_mut(plane).zip(x.chunks(plane)).zip(dy.chunks(plane));
        for (channel, ((dx, x), dy)) in (first..).zip(planes) {
            let weight = weight[channel];
            if silu {
                let scale = inverse * weight;
                affine_silu_vjp(x, dy, scale, bias[channel] - mean * scale, dx);
            } else {
                dx.copy_from_slice(dy);
            }
            dx.iter_mut().for_each(|d| *d *= weight);
        }
        normalize_vjp(dx, x, mean, inverse, added.map(|added| &added[row * n..][..n]));
    };
    by_pieces(xs.len(), n, rows_at_once(n), group)
}

/// The values of what is to be added, if anything is; `None` where they are not at hand or not in the shape of `x`.
fn to_be_added<'a>(added: Option<&'a Tensor>, x: &Tensor) -> Option<Option<Values<'a>>> {
    match added {
        None => Some(None),
        Some(added) => (added.dims() == x.dims()).then(|| Values::of(added))?.map(Some),
    }
}

/// `silu(scale x + shift)`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn affine_silu(x: &[f32], scale: f32, shift: f32, y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| {
        let v = x * scale + shift;
        *y = v * sigmoid(v);
    });
}

/// The cotangent of `scale x + shift` from that of [`affine_silu`].
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn affine_silu_vjp(x: &[f32], dy: &[f32], scale: f32, shift: f32, d: &mut [f32]) {
    d.iter_mut().zip(x.iter().zip(dy)).for_each(|(d, (x, dy))| {
        let v = x * scale + shift;
        let s = sigmoid(v);
        *d = dy * (s + v * s * (1. - s));
    });
}

/// `norm(x)` over the last dimension.
pub(in crate::layers) fn layer_norm(x: &Tensor, affine: Affine) -> Result<Option<Tensor>> {
    let (Some(xs), Some(weight), Some(bias)) = (Values::of(x), Values::of(affine.weight), Values::of(affine.bias))
    else {
        return Ok(None);
    };
    tensor(layer_norm_rows(&xs, &weight, &bias, affine.eps), x.shape()).map(Some)
}

/// The gradient for `x` of [`layer_norm`] at a cotangent `dy`, plus `added` of its shape.
pub(in crate::layers) fn layer_norm_vjp(
    x: &Tensor,
    dy: &Tensor,
    affine: Affine,
    added: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let (Some(xs), Some(dys), Some(weight)) = (Values::of(x), Values::of(dy), Values::of(affine.weight)) else {
        return Ok(None);
    };
    let Some(added) = to_be_added(added, x) else { return Ok(None) };
    tensor(layer_norm_rows_vjp(&xs, &dys, &weight, affine.eps, added.as_deref()), x.shape()).map(Some)
}

/// The gradients for weight and bias of [`layer_norm`].
pub(in crate::layers) fn layer_norm_parameters_vjp(
    x: &Tensor,
    dy: &Tensor,
    affine: Affine,
) -> Result<Option<(Tensor, Tensor)>> {
    let (Some(xs), Some(dys)) = (Values::of(x), Values::of(dy)) else { return Ok(None) };
    let n = affine.weight.elem_count();
    let (weight, bias) = layer_norm_rows_parameters_vjp(&xs, &dys, n, affine.eps);
    Ok(Some((tensor(weight, n)?, tensor(bias, n)?)))
}

/// Layer norm of rows as long as `weight` and `bias`.
pub fn layer_norm_rows(x: &[f32], weight: &[f32], bias: &[f32], eps: f64) -> Vec<f32> {
    let n = weight.len();
    let row = |row: usize, y: &mut [f32]| layer_norm_row(&x[row * n..][..n], weight, bias, eps, y);
    by_pieces(x.len(), n, rows_at_once(n), row)
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn layer_norm_row(x: &[f32], weight: &[f32], bias: &[f32], eps: f64, y: &mut [f32]) {
    let (mean, inverse) = statistics(x, eps);
    for ((y, x), (weight, bias)) in y.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
        *y = (x - mean) * inverse * weight + bias;
    }
}

/// The gradient for `x` of [`layer_norm_rows`] at a cotangent `dy`, plus `added`.
pub fn layer_norm_rows_vjp(x: &[f32], dy: &[f32], weight: &[f32], eps: f64, added: Option<&[f32]>) -> Vec<f32> {
    let n = weight.len();
    let row = |row: usize, dx: &mut [f32]| {
        let (x, dy) = (&x[row * n..][..n], &dy[row * n..][..n]);
        let (mean, inverse) = statistics(x, eps);
        dx.iter_mut().zip(dy).zip(weight).for_each(|((d, dy), weight)| *d = dy * weight);
        normalize_vjp(dx, x, mean, inverse, added.map(|added| &added[row * n..][..n]));
    };
    by_pieces(x.len(), n, rows_at_once(n), row)
}

/// The gradients for weight and bias of [`layer_norm_rows`] of rows of `n` values.
fn layer_norm_rows_parameters_vjp(x: &[f32], dy: &[f32], n: usize, eps: f64) -> (Vec<f32>, Vec<f32>) {
    let zero = || (vec![0f32; n], vec![0f32; n]);
    let add = |(mut weight, mut bias): (Vec<f32>, Vec<f32>), (x, dy): (&[f32], &[f32])| {
        let (mean, inverse) = statistics(x, eps);
        for ((weight, bias), (x, dy)) in weight.iter_mut().zip(&mut bias).zip(x.iter().zip(dy)) {
            *weight += dy * (x - mean) * inverse;
            *bias += dy;
        }
        (weight, bias)
    };
    // Pieces of a fixed size, added in their order: the result does not depend on which thread was faster.
    let piece = n * rows_at_once(n);
    let pieces: Vec<_> = x
        .par_chunks(piece)
        .zip(dy.par_chunks(piece))
        .map(|(x, dy)| x.chunks(n).zip(dy.chunks(n)).fold(zero(), add))
        .collect();
    pieces.into_iter().fold(zero(), |(mut weight, mut bias), (w, b)| {
        weight.iter_mut().zip(w).for_each(|(sum, v)| *sum += v);
        bias.iter_mut().zip(b).for_each(|(sum, v)| *sum += v);
        (weight, bias)
    })
}

/// In place of the normalised values' cotangent `d`: `(d - mean(d) - normal * mean(d * normal)) / deviation + added`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn normalize_vjp(d: &mut [f32], x: &[f32], mean: f32, inverse: f32, added: Option<&[f32]>) {
    let (mut sum, mut along) = (0f64, 0f64);
    for (d, x) in d.chunks(1024).zip(x.chunks(1024)) {
        let (mut lanes, mut lanes_along) = ([0f32; 8], [0f32; 8]);
        let ((d, d_rest), (x, x_rest)) = (d.as_chunks::<8>(), x.as_chunks::<8>());
        for (d, x) in d.iter().zip(x) {
            for i in 0..8 {
                lanes[i] += d[i];
                lanes_along[i] += d[i] * (x[i] - mean);
            }
        }
        let rest = d_rest.iter().zip(x_rest);
        let rest = rest.fold((0., 0.), |(s, a), (d, x)| (s + d, a + d * (x - mean)));
        sum += f64::from(lanes.iter().sum::<f32>() + rest.0);
        along += f64::from(lanes_along.iter().sum::<f32>() + rest.1);
    }
    let n = d.len() as f64;
    let mean_d = (sum / n) as f32;
    let mean_along = (along * f64::from(inverse) / n) as f32;
    let dx = |d: f32, x: f32| (d - mean_d - (x - mean) * inverse * mean_along) * inverse;
    match added {
        None => d.iter_mut().zip(x).for_each(|(d, x)| *d = dx(*d, *x)),
        Some(added) => d.iter_mut().zip(x).zip(added).for_each(|((d, x), added)| *d = dx(*d, *x) + added),
    }
}
