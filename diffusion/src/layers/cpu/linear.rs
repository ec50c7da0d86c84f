use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::Tensor;
use pulp::Simd;

use super::memory::{Shared, by_pieces, copied, repeated, written};
use super::product::{Before, Matrix, onto, parallel_product};
use super::simd::{LINE, Vectors};
use super::skinny::{self, Columns, Rows, WORTHWHILE, Weights, by_item};
use super::{Values, rows_at_once, tensor};
use crate::Result;

/// Rows of an item, or pixels of an image, up to which many weights are multiplied where they lie.
const FEW: usize = 128;
/// Neighbouring weights of an output that are taken for the taps of a channel.
const TAPS: usize = LINE;

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
    tensor(product(before, &xs, &weight, inputs, rows_of_an_item(x)), shape).map(Some)
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
    tensor(product_vjp(before, &dys, &weight, outputs, rows_of_an_item(dy)), shape).map(Some)
}

/// `[batch, .., rows, channels]`, or `[batch, channels]` of one row each.
fn rows_of_an_item(x: &Tensor) -> usize {
    x.dims().iter().skip(1).rev().skip(1).product()
}

/// Rows of `inputs` values each, a weight `[outputs, inputs]` and a bias `[outputs]` to rows `x W^T + b`. Panics where the
/// lengths do not fit each other. All rows count as one item's: with more than 128 the order of sums may be another.
pub fn linear_rows(x: &[f32], weight: &[f32], bias: &[f32], inputs: usize) -> Vec<f32> {
    let (rows, outputs) = (x.len() / inputs, bias.len());
    assert!(x.len() == rows * inputs && weight.len() == outputs * inputs, "{} and {}", x.len(), weight.len());
    product(Some(repeated(bias, rows)), x, weight, inputs, rows)
}

/// The cotangents of [`linear_rows`]' rows from those of what it gives, of `outputs` values each. Panics where the lengths do not
/// fit each other. All rows count as one item's, likewise.
pub fn linear_rows_vjp(dy: &[f32], weight: &[f32], outputs: usize) -> Vec<f32> {
    let rows = dy.len() / outputs;
    assert!(dy.len() == rows * outputs && weight.len().is_multiple_of(outputs), "{} and {}", dy.len(), weight.len());
    product_vjp(None, dy, weight, outputs, rows)
}

fn in_place(weight: &[f32], in_item: usize) -> bool {
    in_item <= FEW && weight.len() >= WORTHWHILE
}

/// `x W^T`, added to `y` where it is given; `in_item` rows of x are an item's.
fn product(y: Option<Vec<f32>>, x: &[f32], weight: &[f32], inputs: usize, in_item: usize) -> Vec<f32> {
    let (x, outputs) = (Matrix::new(x, inputs), weight.len() / inputs);
    if in_place(weight, in_item) && inputs.is_multiple_of(TAPS) && x.rows() > 0 {
        few_rows(y, x, Weights::<TAPS>::by_output(weight, outputs, inputs / TAPS), outputs)
    } else {
        parallel_product(y, x, Matrix::new(weight, inputs).t())
    }
}

/// `dy W`, likewise.
fn product_vjp(y: Option<Vec<f32>>, dy: &[f32], weight: &[f32], outputs: usize, in_item: usize) -> Vec<f32> {
    let (dy, inputs) = (Matrix::new(dy, outputs), weight.len() / outputs);
    if in_place(weight, in_item) && dy.rows() > 0 {
        few_rows(y, dy, Weights::<1>::by_channel(weight, inputs, outputs), inputs)
    } else {
        parallel_product(y, dy, Matrix::new(weight, inputs))
    }
}

fn few_rows<const TAPS: usize>(y: Option<Vec<f32>>, x: Matrix, weights: Weights<TAPS>, outputs: usize) -> Vec<f32> {
    let multiply = |y: &Shared, before| skinny::multiply(weights, &OfRows { x, y, outputs, before });
    // SAFETY: every output of every row is written, or added to.
    unsafe { onto(y, x.rows() * outputs, multiply) }
}

/// A lane is a row of `x`, and of `y`.
struct OfRows<'a> {
    x: Matrix<'a>,
    y: &'a Shared,
    outputs: usize,
    before: Before,
}

// SAFETY: all terms of all lanes are written, by groups and those that are left; the matrix stays what it is.
unsafe impl<const TAPS: usize> Columns<TAPS> for OfRows<'_> {
    fn lanes(&self) -> usize {
        self.x.rows()
    }

    #[inline(always)]
    fn lay_out<S: Simd>(&self, _: S, mut rows: Rows<TAPS>) {
        const GROUP: usize = 4;
        let terms = rows.channels.start * TAPS..rows.channels.end * TAPS;
        let (lanes, first) = (rows.lanes.len(), rows.lanes.start);
        let (values, width) = rows.all();
        let row = |lane: usize| &self.x.row(first + lane)[terms.clone()];
        let whole = lanes / GROUP * GROUP;
        for lane in (0..whole).step_by(GROUP) {
            let x = [row(lane), row(lane + 1), row(lane + 2), row(lane + 3)];
            for (k, values) in values.chunks_mut(width).enumerate() {
                values[lane..][..GROUP].copy_from_slice(&[x[0][k], x[1][k], x[2][k], x[3][k]].map(MaybeUninit::new));
            }
        }
        for lane in whole..lanes {
            values.chunks_mut(width).zip(row(lane)).for_each(|(values, x)| _ = values[lane].write(*x));
        }
    }

    #[inline(always)]
    unsafe fn write<S: Simd>(&self, _: S, outputs: Range<usize>, lanes: Range<usize>, sums: &[f32], stride: usize) {
        assert!(outputs.end <= self.outputs);
        for (i, lane) in lanes.enumerate() {
            let y = self.y.at(lane * self.outputs + outputs.start);
            for (o, sums) in sums.chunks(stride).take(outputs.len()).enumerate() {
                // SAFETY: the caller's; within the row.
                unsafe {
                    let before = match self.before {
                        Before::Replaced => 0.,
                        Before::AddedTo => *y.add(o),
                    };
                    y.add(o).write(before + sums[i]);
                }
            }
        }
    }
}

/// `W x` over the channels of images, `[B, in, h, w]` to `[B, out, h, w]`, and a bias `[out]`. `None` where pixels are many or weights
/// few, where the inputs are not a multiple of [`TAPS`], and where the tensors are not contiguous f32 in main memory or do not fit
/// each other.
pub(in crate::layers) fn linear_channels(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    let (outputs, inputs) = weight.dims2()?;
    if !inputs.is_multiple_of(TAPS) || bias.is_some_and(|bias| bias.dims() != [outputs]) {
        return Ok(None);
    }
    let bias = match bias.map(Values::of) {
        Some(None) => return Ok(None),
        bias => bias.flatten(),
    };
    of_images(x, weight, inputs, outputs, bias.as_deref(), |weight| {
        Weights::<TAPS>::by_output(weight, outputs, inputs / TAPS)
    })
}

/// `W^T dy`, likewise, `[B, out, h, w]` to `[B, in, h, w]`.
pub(in crate::layers) fn linear_channels_vjp(dy: &Tensor, weight: &Tensor) -> Result<Option<Tensor>> {
    let (outputs, inputs) = weight.dims2()?;
    of_images(dy, weight, outputs, inputs, None, |weight| Weights::<1>::by_channel(weight, inputs, outputs))
}

fn of_images<const TAPS: usize>(
    x: &Tensor,
    weight: &Tensor,
    inputs: usize,
    outputs: usize,
    bias: Option<&[f32]>,
    weights: impl Fn(&[f32]) -> Weights<TAPS>,
) -> Result<Option<Tensor>> {
    let (batch, channels, height, width) = x.dims4()?;
    let plane = height * width;
    let (Some(x), Some(weight)) = (Values::of(x), Values::of(weight)) else { return Ok(None) };
    if channels != inputs || !in_place(&weight, plane) || x.is_empty() {
        return Ok(None);
    }
    let multiply =
        |y: &Shared| skinny::multiply(weights(&weight), &OfImages { x: &x, y, batch, inputs, outputs, plane, bias });
    // SAFETY: every output of every pixel is written.
    let y = unsafe { written(batch * outputs * plane, multiply) };
    tensor(y, (batch, outputs, height, width)).map(Some)
}

/// A lane is a pixel, counted over the batch.
struct OfImages<'a> {
    x: &'a [f32],
    y: &'a Shared,
    batch: usize,
    inputs: usize,
    outputs: usize,
    plane: usize,
    bias: Option<&'a [f32]>,
}

// SAFETY: each tap of each channel has its lanes, item by item, whose number stays what it is.
unsafe impl<const TAPS: usize> Columns<TAPS> for OfImages<'_> {
    fn lanes(&self) -> usize {
        self.batch * self.plane
    }

    #[inline(always)]
    fn lay_out<S: Simd>(&self, simd: S, mut rows: Rows<TAPS>) {
        for channel in rows.channels.clone() {
            for tap in 0..TAPS {
                let mut lane = 0;
                for (item, pixels) in by_item(rows.lanes.clone(), self.plane) {
                    let from = (item * self.inputs + channel * TAPS + tap) * self.plane + pixels.start;
                    let row = &mut rows.of(channel, tap)[lane..][..pixels.len()];
                    // SAFETY: as many values.
                    unsafe { simd.store_all(row.as_mut_ptr().cast(), &self.x[from..][..pixels.len()]) };
                    lane += pixels.len();
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn write<S: Simd>(&self, _: S, outputs: Range<usize>, lanes: Range<usize>, sums: &[f32], stride: usize) {
        assert!(outputs.end <= self.outputs && lanes.end <= self.batch * self.plane);
        for (output, sums) in outputs.zip(sums.chunks(stride)) {
            let bias = self.bias.map_or(0., |bias| bias[output]);
            let mut lane = 0;
            for (item, pixels) in by_item(lanes.clone(), self.plane) {
                let y = self.y.at((item * self.outputs + output) * self.plane + pixels.start);
                for (at, sum) in sums[lane..][..pixels.len()].iter().enumerate() {
                    // SAFETY: the caller's; within the plane.
                    unsafe { y.add(at).write(sum + bias) };
                }
                lane += pixels.len();
            }
        }
    }
}
