use candle_core::Tensor;
use rayon::prelude::*;

use super::exp::sigmoid;
use super::{LEAST, Values, tensor};
use crate::Result;

/// Scale and shift of a normalised tensor, one of each per channel.
#[derive(Clone, Copy)]
pub(in crate::layers) struct Affine<'a> {
    pub(in crate::layers) weight: &'a Tensor,
    pub(in crate::layers) bias: &'a Tensor,
    pub(in crate::layers) eps: f64,
}

/// Mean and inverse deviation, summed in eight lanes of f32 each, twice: the variance is that of the centred values.
fn statistics(values: &[f32], eps: f64) -> (f32, f32) {
    let sum = |f: &dyn Fn(f32) -> f32| {
        // Blocks keep a long sum as precise as a short one.
        let block = |block: &[f32]| {
            let mut lanes = [0f32; 16];
            let (whole, rest) = block.as_chunks::<16>();
            for values in whole {
                (0..16).for_each(|i| lanes[i] += f(values[i]));
            }
            lanes.iter().sum::<f32>() + rest.iter().map(|v| f(*v)).sum::<f32>()
        };
        values.chunks(1024).map(|values| f64::from(block(values))).sum::<f64>()
    };
    let n = values.len() as f64;
    let mean = (sum(&|v| v) / n) as f32;
    let variance = sum(&|v| (v - mean) * (v - mean)) / n;
    (mean, (1. / (variance + eps).sqrt()) as f32)
}

/// Pieces of some rows of `n` values each, large enough to be worth a thread.
fn rows_at_once(n: usize) -> usize {
    LEAST.div_ceil(n).max(1)
}

/// `norm(x)`, or `silu(norm(x))`, over `[B, C, h, w]` in groups of channels.
pub(in crate::layers) fn group_norm(x: &Tensor, affine: Affine, groups: usize, silu: bool) -> Result<Option<Tensor>> {
    let (_, channels, h, w) = x.dims4()?;
    let (Some(xs), Some(weight), Some(bias)) = (Values::of(x), Values::of(affine.weight), Values::of(affine.bias))
    else {
        return Ok(None);
    };
    let (of_group, plane) = (channels / groups, h * w);
    let n = of_group * plane;
    let mut y = vec![0f32; xs.len()];
    let (weight, bias) = (&*weight, &*bias);
    y.par_chunks_mut(n).zip(xs.par_chunks(n)).enumerate().with_min_len(rows_at_once(n)).for_each(|(row, (y, x))| {
        let (mean, inverse) = statistics(x, affine.eps);
        let first = row % groups * of_group;
        for (channel, (y, x)) in (first..).zip(y.chunks_mut(plane).zip(x.chunks(plane))) {
            let scale = inverse * weight[channel];
            let shift = bias[channel] - mean * scale;
            if silu {
                y.iter_mut().zip(x).for_each(|(y, x)| {
                    let v = x * scale + shift;
                    *y = v * sigmoid(v);
                });
            } else {
                y.iter_mut().zip(x).for_each(|(y, x)| *y = x * scale + shift);
            }
        }
    });
    tensor(y, x.shape()).map(Some)
}

/// The gradient for `x` of [`group_norm`] at a cotangent `dy`.
pub(in crate::layers) fn group_norm_vjp(
    x: &Tensor,
    dy: &Tensor,
    affine: Affine,
    groups: usize,
    silu: bool,
) -> Result<Option<Tensor>> {
    let (_, channels, h, w) = x.dims4()?;
    let values = (Values::of(x), Values::of(dy), Values::of(affine.weight), Values::of(affine.bias));
    let (Some(xs), Some(dys), Some(weight), Some(bias)) = values else { return Ok(None) };
    let (of_group, plane) = (channels / groups, h * w);
    let n = of_group * plane;
    let mut dx = vec![0f32; xs.len()];
    let (weight, bias) = (&*weight, &*bias);
    let rows = dx.par_chunks_mut(n).zip(xs.par_chunks(n)).zip(dys.par_chunks(n)).enumerate();
    rows.with_min_len(rows_at_once(n)).for_each(|(row, ((dx, x), dy))| {
        let (mean, inverse) = statistics(x, affine.eps);
        let first = row % groups * of_group;
        let planes = dx.chunks_mut(plane).zip(x.chunks(plane)).zip(dy.chunks(plane));
        for (channel, ((dx, x), dy)) in (first..).zip(planes) {
            let (weight, bias) = (weight[channel], bias[channel]);
            let slope = |normal: f32| {
                let v = normal * weight + bias;
                let s = sigmoid(v);
                s + v * s * (1. - s)
            };
            for ((d, x), dy) in dx.iter_mut().zip(x).zip(dy) {
                let normal = (x - mean) * inverse;
                *d = dy * weight * if silu { slope(normal) } else { 1. };
            }
        }
        normalize_vjp(dx, x, mean, inverse);
    });
    tensor(dx, x.shape()).map(Some)
}

/// `norm(x)` over the last dimension.
pub(in crate::layers) fn layer_norm(x: &Tensor, affine: Affine) -> Result<Option<Tensor>> {
    let (Some(xs), Some(weight), Some(bias)) = (Values::of(x), Values::of(affine.weight), Values::of(affine.bias))
    else {
        return Ok(None);
    };
    let n = weight.len();
    let mut y = vec![0f32; xs.len()];
    let (weight, bias) = (&*weight, &*bias);
    y.par_chunks_mut(n).zip(xs.par_chunks(n)).with_min_len(rows_at_once(n)).for_each(|(y, x)| {
        let (mean, inverse) = statistics(x, affine.eps);
        for ((y, x), (weight, bias)) in y.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
            *y = (x - mean) * inverse * weight + bias;
        }
    });
    tensor(y, x.shape()).map(Some)
}

/// The gradient for `x` of [`layer_norm`] at a cotangent `dy`.
pub(in crate::layers) fn layer_norm_vjp(x: &Tensor, dy: &Tensor, affine: Affine) -> Result<Option<Tensor>> {
    let (Some(xs), Some(dys), Some(weight)) = (Values::of(x), Values::of(dy), Values::of(affine.weight)) else {
        return Ok(None);
    };
    let n = weight.len();
    let mut dx = vec![0f32; xs.len()];
    let weight = &*weight;
    let rows = dx.par_chunks_mut(n).zip(xs.par_chunks(n)).zip(dys.par_chunks(n));
    rows.with_min_len(rows_at_once(n)).for_each(|((dx, x), dy)| {
        let (mean, inverse) = statistics(x, affine.eps);
        dx.iter_mut().zip(dy).zip(weight).for_each(|((d, dy), weight)| *d = dy * weight);
        normalize_vjp(dx, x, mean, inverse);
    });
    tensor(dx, x.shape()).map(Some)
}

/// In place of the normalised values' cotangent `d`: `(d - mean(d) - normal * mean(d * normal)) / deviation`.
fn normalize_vjp(d: &mut [f32], x: &[f32], mean: f32, inverse: f32) {
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
    for (d, x) in d.iter_mut().zip(x) {
        *d = (*d - mean_d - (x - mean) * inverse * mean_along) * inverse;
    }
}
