//! 3x3 convolutions, padding 1, as products of matrices: outputs by input channels with input channels by lanes, where a lane is a
//! tile of outputs ([`winograd`]) or a single one ([`direct`]), whichever is less to do. Weights and inputs are laid out for that
//! a block at a time, in the cache; the inputs' blocks once for all outputs.

mod direct;
mod kernel;
mod winograd;

use std::ops::Range;

use candle_core::Tensor;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::memory::{Shared, written};
use super::product::Before;
use super::simd::{lanes, prefetch, widest};
use super::tile::{ROWS, Tile, VECTORS};
use super::{LEAST, Values, tensor};
use crate::Result;
use direct::Direct;
pub use kernel::Kernel;
use winograd::Winograd;

const TAPS: usize = 9;
/// Input channels that are multiplied at a time.
const DEPTH: usize = 64;
/// Output channels of a task, at most.
const OUTPUTS: usize = 72;
/// Values of the inputs' blocks that are made at a time, at most: 16 MB. Fewer in tests, to have several.
const INPUTS_AT_ONCE: usize = if cfg!(test) { 1 << 15 } else { 1 << 22 };

/// A 3x3 convolution, padding 1, stride 1 or 2, with its bias, `[out]` or for each item its own `[B, out]`, and a tensor of the
/// result's shape that is to be added: `[B, in, h, w]` and `[out, in, 3, 3]` to `[B, out, ceil(h / stride), ceil(w / stride)]`.
/// `None` where the tensors are not contiguous f32 in main memory, and where they do not fit each other or hold nothing: the
/// convolution of tensors says what is wrong.
pub(in crate::layers) fn conv3x3(
    x: &Tensor,
    kernel: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    stride: usize,
) -> Result<Option<Tensor>> {
    let ((batch, inputs, height, width), outputs) = (x.dims4()?, kernel.dim(0)?);
    let shape = [batch, outputs, height.div_ceil(stride), width.div_ceil(stride)];
    let fits = kernel.dims() == [outputs, inputs, 3, 3]
        && bias.is_none_or(|bias| bias.dims() == [outputs] || bias.dims() == [batch, outputs])
        && residual.is_none_or(|residual| residual.dims() == shape);
    if !fits || x.elem_count() * outputs == 0 {
        return Ok(None);
    }
    let (Some(xs), Some(weights)) = (Values::of(x), Values::of(kernel)) else { return Ok(None) };
    let (biases, residual) = (bias.map(Values::of), residual.map(Values::of));
    if matches!(biases, Some(None)) || matches!(residual, Some(None)) {
        return Ok(None);
    }
    let (biases, residual) = (biases.flatten(), residual.flatten());
    let bias_stride = if bias.is_some_and(|bias| bias.rank() == 2) { outputs } else { 0 };
    let convolution = Convolution {
        x: &xs,
        kernel: Kernel::new(&weights, inputs),
        bias: biases.as_deref().map(|values| Bias { values, stride: bias_stride }),
        residual: residual.as_deref(),
        batch,
        inputs,
        outputs,
        height,
        width,
        stride,
    };
    tensor(convolution.compute(), &shape[..]).map(Some)
}

/// The gradient for an input of `height x width` from that of the output, `[B, out, ..]` to `[B, in, height, width]`, of a
/// convolution with the kernel `[out, in, 3, 3]`. `None` as of [`conv3x3`].
pub(in crate::layers) fn conv3x3_vjp(
    dy: &Tensor,
    kernel: &Tensor,
    stride: usize,
    (height, width): (usize, usize),
) -> Result<Option<Tensor>> {
    let ((batch, outputs, rows, columns), inputs) = (dy.dims4()?, kernel.dim(1)?);
    let fits = kernel.dims() == [outputs, inputs, 3, 3]
        && (rows, columns) == (height.div_ceil(stride), width.div_ceil(stride));
    if !fits || dy.elem_count() * inputs == 0 {
        return Ok(None);
    }
    let (Some(dys), Some(weights)) = (Values::of(dy), Values::of(kernel)) else { return Ok(None) };
    let spread;
    let x = if stride == 1 {
        &*dys
    } else {
        // As if every output had been computed and most dropped: their cotangents are zero.
        spread = spread_out(&dys, (rows, columns), (height, width), stride);
        &spread
    };
    let kernel = Kernel::adjoint(&weights, inputs);
    let (inputs, outputs) = (outputs, inputs);
    let adjoint =
        Convolution { x, kernel, bias: None, residual: None, batch, inputs, outputs, height, width, stride: 1 };
    tensor(adjoint.compute(), (batch, outputs, height, width)).map(Some)
}

/// Images of `rows x columns` to those of `height x width` that have their pixels `stride` apart and zeros between.
fn spread_out(
    images: &[f32],
    (rows, columns): (usize, usize),
    (height, width): (usize, usize),
    stride: usize,
) -> Vec<f32> {
    let plane = height * width;
    let count = images.len() / (rows * columns) * plane;
    super::memory::by_pieces(count, plane, LEAST.div_ceil(plane), |image, out| {
        let image = &images[image * rows * columns..][..rows * columns];
        for (line, out) in image.chunks(columns).zip(out.chunks_mut(width).step_by(stride)) {
            out.iter_mut().step_by(stride).zip(line).for_each(|(out, value)| *out = *value);
        }
    })
}

/// What is added to every pixel of a channel.
#[derive(Clone, Copy)]
pub struct Bias<'a> {
    /// `[outputs]` or `[batch, outputs]`.
    pub values: &'a [f32],
    /// From one item to the next: 0 where all have the same.
    pub stride: usize,
}

/// `[batch, inputs, height, width]` to `[batch, outputs, ceil(height / stride), ceil(width / stride)]`, nothing of it empty.
#[derive(Clone, Copy)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Convolution<'a> {
    pub x: &'a [f32],
    pub kernel: Kernel<'a>,
    pub bias: Option<Bias<'a>>,
    /// Of the result's shape, to be added.
    pub residual: Option<&'a [f32]>,
    pub batch: usize,
    pub inputs: usize,
    pub outputs: usize,
    pub height: usize,
    pub width: usize,
    /// 1 or 2.
    pub stride: usize,
}

/// A way to make products of matrices of a convolution.
trait Method {
    /// Matrices that an input becomes.
    const ELEMENTS: usize;
    /// Sums for an output and a lane: one for each element, or one for all.
    const SUMS: usize;
    /// Panels of a task: its sums stay in the cache.
    const PANELS: usize;

    /// Lanes of the whole batch.
    fn lanes(convolution: &Convolution) -> usize;

    /// Writes the elements of one channel in some lanes.
    fn take_input<S: Simd>(simd: S, input: Input);

    /// `[TAPS, plane]` to `[ELEMENTS, plane]`, which may be the same.
    fn take_kernel<S: Simd>(simd: S, taps: &mut [f32], kernel: &mut Vec<f32>, plane: usize);

    /// Of what [`Self::take_kernel`] had.
    fn kernel<'a>(taps: &'a [f32], kernel: &'a [f32]) -> &'a [f32];

    /// Writes the pixels of some lanes in one output channel from their sums.
    ///
    /// # Safety
    /// Nobody else uses those pixels.
    unsafe fn write<S: Simd>(simd: S, output: Output);
}

impl Convolution<'_> {
    fn rows(&self) -> usize {
        self.height.div_ceil(self.stride)
    }

    fn columns(&self) -> usize {
        self.width.div_ceil(self.stride)
    }

    /// The result. Panics where lengths do not fit each other.
    pub fn compute(&self) -> Vec<f32> {
        let (pixels, pairs) = (self.batch * self.rows() * self.columns(), self.inputs * self.outputs);
        assert!(
            pixels * pairs > 0 && (1..=2).contains(&self.stride),
            "an empty convolution, or stride {}",
            self.stride
        );
        assert_eq!(self.x.len(), self.batch * self.height * self.width * self.inputs, "values of images");
        assert_eq!(self.kernel.values.len(), pairs * TAPS, "values of a kernel");
        assert!(self.residual.is_none_or(|residual| residual.len() == pixels * self.outputs), "values of a residual");
        let of_bias = |bias: &Bias| bias.stride * (self.batch - 1) + self.outputs;
        assert!(self.bias.is_none_or(|bias| bias.values.len() >= of_bias(&bias)), "values of a bias");
        // For each pair of channels; the kernel's transform takes the time of some products. By one image alone, so that it has the same
        // result in whatever batch.
        const TRANSFORM: usize = 300;
        let image = Self { batch: 1, ..*self };
        let tiled = Winograd::ELEMENTS * Winograd::lanes(&image) + TRANSFORM;
        if self.stride == 1 && tiled < TAPS * Direct::lanes(&image) {
            self.compute_by::<Winograd>()
        } else {
            self.compute_by::<Direct>()
        }
    }

    fn compute_by<M: Method>(&self) -> Vec<f32> {
        let all = M::lanes(self);
        let width = if all <= lanes() { lanes() } else { VECTORS * lanes() };
        let panels = all.div_ceil(width);
        let at_once = (INPUTS_AT_ONCE / (M::ELEMENTS * self.inputs * width)).max(1).next_multiple_of(M::PANELS);
        let convolve = |y: &Shared| {
            for first in (0..panels).step_by(at_once) {
                let panels =
                    Panels { width, count: at_once.min(panels - first), inputs: self.inputs, elements: M::ELEMENTS };
                self.convolve::<M>(panels, first * width..all.min((first + at_once) * width), y);
            }
        };
        // SAFETY: every output's pixels in all lanes are written.
        unsafe { written(self.batch * self.outputs * self.rows() * self.columns(), convolve) }
    }

    /// Writes the pixels of some lanes, as many as the panels hold.
    fn convolve<M: Method>(&self, panels: Panels, all: Range<usize>, y: &Shared) {
        let take = |v: &Shared| {
            let channels = (0..self.inputs).into_par_iter().with_min_len(LEAST.div_ceil(all.len() * M::ELEMENTS));
            channels.for_each_init(Vec::new, |scratch, channel| {
                let input = Input { convolution: self, panels, lanes: all.clone(), channel, v, scratch };
                widest(TakeInput::<M> { input, method: std::marker::PhantomData });
            });
        };
        // SAFETY: every lane of every panel is written, channel by channel.
        let v = unsafe { written(panels.values(), take) };
        let blocks = panels.count.div_ceil(M::PANELS);
        // Enough tasks for all threads; a task of a few outputs reads the inputs too often.
        let tasks = (2 * rayon::current_num_threads()).div_ceil(blocks).min(self.outputs.div_ceil(2 * ROWS));
        let chunk = self.outputs.div_ceil(self.outputs.div_ceil(OUTPUTS).max(tasks)).next_multiple_of(ROWS);
        let chunks = self.outputs.div_ceil(chunk);
        (0..blocks * chunks).into_par_iter().for_each_init(Scratch::default, |scratch, task| {
            let (first_panel, first_output) = (task / chunks * M::PANELS, task % chunks * chunk);
            let first = all.start + first_panel * panels.width;
            widest(Multiply::<M> {
                convolution: self,
                panels,
                v: &v,
                y,
                in_group: first_panel..panels.count.min(first_panel + M::PANELS),
                lanes: first..all.end.min(first + M::PANELS * panels.width),
                outputs: first_output..self.outputs.min(first_output + chunk),
                scratch,
                method: std::marker::PhantomData,
            });
        });
    }
}

/// How the matrices of inputs lie: `[panel, depth block, element, channel of the block, lane]`, so that a task reads on and on.
#[derive(Clone, Copy)]
struct Panels {
    /// Lanes of a panel.
    width: usize,
    count: usize,
    inputs: usize,
    elements: usize,
}

impl Panels {
    fn values(self) -> usize {
        self.count * self.elements * self.inputs * self.width
    }

    /// Channels in the block that begins with channel `first`; none after the last.
    fn depth(self, first: usize) -> usize {
        DEPTH.min(self.inputs - first)
    }

    /// Asks for a `1 / parts` of a panel's block of channels.
    #[inline(always)]
    fn prefetch(self, v: &[f32], panel: usize, channels: &Range<usize>, part: usize, parts: usize) {
        let first = v.as_ptr().wrapping_add((panel * self.inputs + channels.start) * self.elements * self.width);
        prefetch(first, channels.len() * self.elements * self.width, part, parts);
    }

    /// Where the lanes of a channel begin.
    fn at(self, panel: usize, element: usize, channel: usize) -> usize {
        let first = channel / DEPTH * DEPTH;
        let row = (panel * self.inputs + first) * self.elements + element * self.depth(first) + channel - first;
        row * self.width
    }

    /// Zeros to the lanes from `used` on in all of a channel's elements.
    ///
    /// # Safety
    /// Nobody else uses the channel's lanes.
    unsafe fn clear_from(self, used: usize, channel: usize, v: &Shared) {
        for lane in used..self.count * self.width {
            for element in 0..self.elements {
                // SAFETY: the caller's.
                unsafe { v.at(self.at(lane / self.width, element, channel) + lane % self.width).write(0.) };
            }
        }
    }
}

/// One channel of some lanes, which begin with the first panel's.
struct Input<'a> {
    convolution: &'a Convolution<'a>,
    panels: Panels,
    lanes: Range<usize>,
    channel: usize,
    v: &'a Shared,
    scratch: &'a mut Vec<f32>,
}

struct TakeInput<'a, M> {
    input: Input<'a>,
    method: std::marker::PhantomData<M>,
}

impl<M: Method> WithSimd for TakeInput<'_, M> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Input { panels, channel, v, ref lanes, .. } = self.input;
        // SAFETY: the channel is this task's.
        unsafe { panels.clear_from(lanes.len(), channel, v) };
        M::take_input(simd, self.input);
    }
}

/// What a task works in.
#[derive(Default)]
struct Scratch {
    /// Taps of a panel of outputs, and what the method makes of them.
    taps: Vec<f32>,
    kernel: Vec<f32>,
    /// `[sum, output, lane]`.
    sums: Vec<f32>,
}

/// Some outputs in some lanes.
struct Multiply<'a, M> {
    convolution: &'a Convolution<'a>,
    panels: Panels,
    v: &'a [f32],
    y: &'a Shared,
    /// The panels that the lanes are in.
    in_group: Range<usize>,
    lanes: Range<usize>,
    outputs: Range<usize>,
    scratch: &'a mut Scratch,
    method: std::marker::PhantomData<M>,
}

impl<M: Method> WithSimd for Multiply<'_, M> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { convolution: c, panels, v, y, in_group, lanes, outputs, scratch, .. } = self;
        let width = in_group.len() * panels.width;
        let rows = outputs.len().next_multiple_of(ROWS);
        let plane = (DEPTH * ROWS).next_multiple_of(S::F32_LANES);
        scratch.taps.resize(TAPS * plane, 0.);
        scratch.sums.resize(M::SUMS * rows * width, 0.);
        let row_outputs = |row: usize| outputs.start + row..outputs.end.min(outputs.start + row + ROWS);
        for first in (0..c.inputs).step_by(DEPTH) {
            let inputs = first..first + panels.depth(first);
            let next_inputs = inputs.end..inputs.end + panels.depth(inputs.end);
            for row in (0..rows).step_by(ROWS) {
                c.kernel.gather(&row_outputs(row), &inputs, plane, &mut scratch.taps);
                M::take_kernel(simd, &mut scratch.taps, &mut scratch.kernel, plane);
                let kernel = M::kernel(&scratch.taps, &scratch.kernel);
                let next = match row + ROWS < rows {
                    true => (row_outputs(row + ROWS), &inputs),
                    false => (row_outputs(0), &next_inputs),
                };
                for element in 0..M::ELEMENTS {
                    let before = match first > 0 || M::SUMS == 1 && element > 0 {
                        true => Before::AddedTo,
                        false => Before::Replaced,
                    };
                    // What comes next is on its way from memory meanwhile.
                    c.kernel.prefetch(&next.0, next.1, element, M::ELEMENTS);
                    for (i, panel) in in_group.clone().enumerate() {
                        let part = row / ROWS * M::ELEMENTS + element;
                        panels.prefetch(v, panel, &next_inputs, part, rows / ROWS * M::ELEMENTS);
                        let b = &v[panels.at(panel, element, first)..][..inputs.len() * panels.width];
                        let a = &kernel[element * plane..][..inputs.len() * ROWS];
                        let sums = (element % M::SUMS * rows + row) * width + i * panels.width;
                        let sums = &mut scratch.sums[sums..];
                        assert!(sums.len() >= (ROWS - 1) * width + panels.width);
                        let (a, b, c) = (a.as_ptr(), b.as_ptr(), sums.as_mut_ptr());
                        // SAFETY: the lengths were looked at; a panel is one vector wide or two.
                        unsafe {
                            Tile { depth: inputs.len(), a, b, c, stride: width, before }.multiply(simd, panels.width);
                        }
                    }
                }
            }
        }
        for (row, output) in outputs.enumerate() {
            let sums = &scratch.sums[row * width..];
            let output = Output { convolution: c, sums, plane: rows * width, output, lanes: lanes.clone(), y };
            // SAFETY: the pixels of this output in these lanes are this task's.
            unsafe { M::write(simd, output) };
        }
    }
}

/// The sums of some lanes in one output channel, each element's `plane` values after those of the one before.
struct Output<'a> {
    convolution: &'a Convolution<'a>,
    sums: &'a [f32],
    plane: usize,
    output: usize,
    lanes: Range<usize>,
    y: &'a Shared,
}

impl Output<'_> {
    /// Writes pixels of a row, from a column on, with bias and residual.
    ///
    /// # Safety
    /// Nobody else uses them.
    #[inline(always)]
    unsafe fn write_row(&self, (item, row, column): (usize, usize, usize), values: &[f32]) {
        let c = self.convolution;
        assert!(row < c.rows() && column + values.len() <= c.columns());
        let at = ((item * c.outputs + self.output) * c.rows() + row) * c.columns() + column;
        let bias = c.bias.map_or(0., |bias| bias.values[item * bias.stride + self.output]);
        let y = self.y.at(at).cast::<std::mem::MaybeUninit<f32>>();
        // SAFETY: the caller's; they are within the image.
        let pixels = unsafe { std::slice::from_raw_parts_mut(y, values.len()) };
        match c.residual {
            None => pixels.iter_mut().zip(values).for_each(|(y, value)| _ = y.write(value + bias)),
            Some(residual) => {
                let sums = values.iter().zip(&residual[at..]).map(|(value, residual)| value + bias + residual);
                pixels.iter_mut().zip(sums).for_each(|(y, sum)| _ = y.write(sum));
            }
        }
    }
}
