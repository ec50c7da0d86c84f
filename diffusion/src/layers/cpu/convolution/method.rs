//! The frame of all methods: inputs are laid out by blocks for all outputs, kernels by blocks as they are multiplied.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::LEAST;
use super::super::memory::{Shared, written};
use super::super::product::Before;
use super::super::simd::{lanes, prefetch, widest};
use super::super::tile::{ROWS, Tile, VECTORS};
use super::{Convolution, TAPS};

/// Input channels that are multiplied at a time.
const DEPTH: usize = 64;
/// Output channels of a task, at most.
const OUTPUTS: usize = 72;
/// Values of the inputs' blocks that are made at a time, at most: 16 MB. Fewer in tests, to have several.
const INPUTS_AT_ONCE: usize = if cfg!(test) { 1 << 15 } else { 1 << 22 };

/// A way to make products of matrices of a convolution.
pub(super) trait Method {
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

    /// `[TAPS, plane]` to `[ELEMENTS, plane]`, in `scratch` where they are not the same.
    fn kernel<'a, S: Simd>(simd: S, taps: &'a [f32], scratch: &'a mut Vec<f32>, plane: usize) -> &'a [f32];

    /// Writes the pixels of some lanes in one output channel from their sums.
    ///
    /// # Safety
    /// Nobody else uses those pixels.
    unsafe fn write<S: Simd>(simd: S, output: Output);
}

/// Item, row and column of the `index`-th of the batch's places, `rows x columns` to an item.
pub(super) fn place(index: usize, rows: usize, columns: usize) -> (usize, usize, usize) {
    (index / (rows * columns), index / columns % rows, index % columns)
}

impl Convolution<'_> {
    pub(super) fn compute_by<M: Method>(&self) -> Vec<f32> {
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
                widest(TakeInput::<M> { input, method: PhantomData });
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
                method: PhantomData,
            });
        });
    }
}

/// How the matrices of inputs lie: `[panel, depth block, element, channel of the block, lane]`, so that a task reads on and on.
#[derive(Clone, Copy)]
pub(super) struct Panels {
    /// Lanes of a panel.
    pub(super) width: usize,
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
    pub(super) fn at(self, panel: usize, element: usize, channel: usize) -> usize {
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
pub(super) struct Input<'a> {
    pub(super) convolution: &'a Convolution<'a>,
    pub(super) panels: Panels,
    pub(super) lanes: Range<usize>,
    pub(super) channel: usize,
    pub(super) v: &'a Shared,
    pub(super) scratch: &'a mut Vec<f32>,
}

struct TakeInput<'a, M> {
    input: Input<'a>,
    method: PhantomData<M>,
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
    method: PhantomData<M>,
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
                let kernel = M::kernel(simd, &scratch.taps, &mut scratch.kernel, plane);
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
pub(super) struct Output<'a> {
    pub(super) convolution: &'a Convolution<'a>,
    pub(super) sums: &'a [f32],
    pub(super) plane: usize,
    output: usize,
    pub(super) lanes: Range<usize>,
    y: &'a Shared,
}

impl Output<'_> {
    /// Writes pixels of a row, from a column on, with bias and residual.
    ///
    /// # Safety
    /// Nobody else uses them.
    #[inline(always)]
    pub(super) unsafe fn write_row(&self, (item, row, column): (usize, usize, usize), values: &[f32]) {
        let c = self.convolution;
        assert!(row < c.rows() && column + values.len() <= c.columns());
        let at = ((item * c.outputs + self.output) * c.rows() + row) * c.columns() + column;
        let bias = c.bias.map_or(0., |bias| bias.values[item * bias.stride + self.output]);
        let y = self.y.at(at).cast::<MaybeUninit<f32>>();
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
