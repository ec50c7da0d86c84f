use std::mem::MaybeUninit;

use candle_core::Tensor;
use rayon::prelude::*;

use super::memory::{Shared, written};
use super::product::{Before, Matrix, product_into};
use super::winograd::{Bias, Convolution, Kernel};
use super::{Values, tensor};
use crate::Result;

/// Values of the matrix of neighbourhoods that a task makes at a time: what stays in a core's second-level cache.
const BLOCK: usize = 1 << 17;
/// Pixels that a task takes, where there are as many.
const LEAST_PIXELS: usize = 64;

/// A 3x3 convolution, padding 1, stride 1 or 2, with its bias, `[out]` or for each item its own `[B, out]`, and a tensor of the
/// result's shape that is to be added: `[B, in, h, w]` and `[out, in, 3, 3]` to `[B, out, ceil(h / stride), ceil(w / stride)]`.
/// `None` where the tensors are not contiguous f32 in main memory.
///
/// With stride 1 by [`winograd`](super::winograd), where there are pixels enough. Otherwise each task takes some output rows of
/// one picture: the neighbourhoods of their pixels become a matrix `[9 in, pixels]`, and the kernel's product with it lies in the
/// output as it is. Nothing is laid out anew for the whole batch.
pub(in crate::layers) fn conv3x3(
    x: &Tensor,
    kernel: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    stride: usize,
) -> Result<Option<Tensor>> {
    let (batch, inputs, height, width) = x.dims4()?;
    let outputs = kernel.dim(0)?;
    let fits = kernel.dims() == [outputs, inputs, 3, 3]
        && bias.is_none_or(|bias| bias.dims() == [outputs] || bias.dims() == [batch, outputs]);
    if !fits || x.elem_count() == 0 {
        // The convolution of tensors says what is wrong.
        return Ok(None);
    }
    let (Some(xs), Some(weights)) = (Values::of(x), Values::of(kernel)) else { return Ok(None) };
    let own_bias = bias.is_some_and(|bias| bias.rank() == 2);
    let biases = match bias.map(Values::of) {
        Some(None) => return Ok(None),
        biases => biases.flatten(),
    };
    let (rows, columns) = (height.div_ceil(stride), width.div_ceil(stride));
    let residual = match residual.map(|residual| (residual.dims(), Values::of(residual))) {
        None => None,
        Some((dims, Some(values))) if dims == [batch, outputs, rows, columns] => Some(values),
        Some(_) => return Ok(None),
    };
    if stride == 1 {
        let bias = biases.as_deref().map(|values| Bias { values, stride: if own_bias { outputs } else { 0 } });
        let (residual, kernel) = (residual.as_deref(), Kernel::new(&weights, inputs));
        let convolution = Convolution { x: &xs, kernel, bias, residual, batch, inputs, outputs, height, width };
        if convolution.pays() {
            return tensor(convolution.compute(), (batch, outputs, height, width)).map(Some);
        }
    }
    // At least a few pixels, or the kernel is read more often than it pays.
    let least = LEAST_PIXELS.div_ceil(columns);
    let block_rows = (BLOCK / (9 * inputs * columns)).max(least).min(rows);
    let (blocks, plane) = (rows.div_ceil(block_rows), rows * columns);
    let (xs, weights, biases, residual) = (&*xs, &*weights, biases.as_deref(), residual.as_deref());
    let convolve = |y: &Shared| {
        (0..batch * blocks).into_par_iter().for_each_init(Vec::new, |patches: &mut Vec<f32>, task| {
            let (item, first) = (task / blocks, task % blocks * block_rows);
            let count = block_rows.min(rows - first);
            let pixels = count * columns;
            patches.resize(9 * inputs * pixels, 0.);
            let image = &xs[item * inputs * height * width..][..inputs * height * width];
            let geometry = Geometry { height, width, columns, stride };
            neighbourhoods(image, geometry, first..first + count, patches);
            for output in 0..outputs {
                let start = (item * outputs + output) * plane + first * columns;
                let bias = biases.map_or(0., |biases| biases[usize::from(own_bias) * item * outputs + output]);
                // SAFETY: tasks write the pixels of their own item and rows, which no other task touches; `y` outlives the loop.
                let row = unsafe { std::slice::from_raw_parts_mut(y.at(start).cast::<MaybeUninit<f32>>(), pixels) };
                match residual {
                    None => row.fill(MaybeUninit::new(bias)),
                    Some(values) => row.iter_mut().zip(&values[start..]).for_each(|(y, value)| {
                        y.write(value + bias);
                    }),
                }
            }
            let start = item * outputs * plane + first * columns;
            let kernel = Matrix::new(weights, 9 * inputs);
            // SAFETY: the output's rows are `plane` apart; the pixels of this item and these rows no other task touches.
            unsafe {
                product_into(y.at(start), plane, Before::AddedTo, 1., kernel, Matrix::new(patches, pixels));
            }
        });
    };
    // SAFETY: every pixel of every output is written before anything is added to it.
    let y = unsafe { written(batch * outputs * plane, convolve) };
    tensor(y, (batch, outputs, rows, columns)).map(Some)
}

/// The input's gradient of a 3x3 convolution of stride 1 from its result's `[B, out, h, w]`, with the convolution's own kernel
/// `[out, in, 3, 3]`. `None` where the tensors are not contiguous f32 in main memory, and where there are too few pixels.
pub(in crate::layers) fn conv3x3_vjp(dy: &Tensor, kernel: &Tensor) -> Result<Option<Tensor>> {
    let ((batch, outputs, height, width), inputs) = (dy.dims4()?, kernel.dim(1)?);
    if kernel.dims() != [outputs, inputs, 3, 3] || dy.elem_count() * inputs == 0 {
        return Ok(None);
    }
    let (Some(dys), Some(weights)) = (Values::of(dy), Values::of(kernel)) else { return Ok(None) };
    let kernel = Kernel::adjoint(&weights, inputs);
    let (x, bias, residual) = (&*dys, None, None);
    let adjoint = Convolution { x, kernel, bias, residual, batch, inputs: outputs, outputs: inputs, height, width };
    adjoint.pays().then(|| tensor(adjoint.compute(), (batch, inputs, height, width))).transpose()
}

#[derive(Clone, Copy)]
struct Geometry {
    height: usize,
    width: usize,
    /// Of the output.
    columns: usize,
    stride: usize,
}

/// Row `9 c + 3 u + v` of the result holds, for each output pixel `(i, j)` of `rows`, the pixel
/// `(stride i + u - 1, stride j + v - 1)` of channel c, and zero outside.
fn neighbourhoods(image: &[f32], geometry: Geometry, rows: std::ops::Range<usize>, patches: &mut [f32]) {
    let Geometry { height, width, columns, stride } = geometry;
    let pixels = rows.len() * columns;
    for (index, patch) in patches.chunks_mut(pixels).enumerate() {
        let (channel, u, v) = (index / 9, index / 3 % 3, index % 3);
        let channel = &image[channel * height * width..][..height * width];
        for (i, line) in rows.clone().zip(patch.chunks_mut(columns)) {
            let Some(source) = (stride * i + u).checked_sub(1).filter(|row| *row < height) else {
                line.fill(0.);
                continue;
            };
            let source = &channel[source * width..][..width];
            if stride == 1 {
                // Output column j sees input column j + v - 1.
                let (from, to) = (usize::from(v == 0), columns - usize::from(v == 2));
                line[..from].fill(0.);
                line[to..].fill(0.);
                line[from..to].copy_from_slice(&source[from + v - 1..to + v - 1]);
            } else {
                for (j, value) in line.iter_mut().enumerate() {
                    let pixel = (stride * j + v).checked_sub(1).and_then(|column| source.get(column));
                    *value = pixel.copied().unwrap_or(0.);
                }
            }
        }
    }
}
