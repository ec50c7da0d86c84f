//! Stride 1 by minimal filtering F(4x4, 3x3) (Winograd 1980; Lavin and Gray, CVPR 2016): a tile of 4 x 4 outputs takes 36 products
//! for each pair of channels instead of 144.
//!
//! `Y = A^T [(G g G^T) * (B^T d B)] A` for a tile of 6 x 6 inputs d and a kernel g; summed over input channels, each of the 36
//! elements is a product of matrices, `[out, in] [in, tiles]`. A lane is a tile; they are counted over the batch, in rows.
//!
//! Inputs are transformed by blocks for all outputs. The kernel's transforms are four times the size of the weights, and are made a
//! block at a time, which the cache keeps while it is multiplied.

mod transforms;

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::LEAST;
use super::super::memory::{Shared, written};
use super::super::product::Before;
use super::super::simd::{lanes, prefetch, widest};
use super::super::tile::{ROWS, Tile, VECTORS, outputs_of_a_task};
use super::{Convolution, TAPS};
use transforms::{take_input, transform_kernels, write};

/// Outputs on a side of a tile, and inputs on a side of what it sees.
const OUT: usize = 4;
const IN: usize = OUT + 2;
/// Matrices that an input becomes.
pub(super) const ELEMENTS: usize = IN * IN;
/// Input channels that are multiplied at a time.
const DEPTH: usize = 64;
/// Output channels of a task, at most.
const OUTPUTS: usize = 72;
/// Panels of a task: its sums stay in the cache.
const PANELS: usize = 2;
/// Values of the inputs' blocks that are made at a time, at most: 16 MB. Fewer in tests, to have several.
const INPUTS_AT_ONCE: usize = if cfg!(test) { 1 << 15 } else { 1 << 22 };

fn rows_of_tiles(c: &Convolution) -> usize {
    c.height.div_ceil(OUT)
}

fn tiles_in_row(c: &Convolution) -> usize {
    c.width.div_ceil(OUT)
}

/// Tiles of the whole batch.
pub(super) fn tiles(c: &Convolution) -> usize {
    c.batch * rows_of_tiles(c) * tiles_in_row(c)
}

impl Convolution<'_> {
    pub(super) fn compute_by_tiles(&self) -> Vec<f32> {
        let all = tiles(self);
        let width = if all <= lanes() { lanes() } else { VECTORS * lanes() };
        let panels = all.div_ceil(width);
        let at_once = (INPUTS_AT_ONCE / (ELEMENTS * self.inputs * width)).max(1).next_multiple_of(PANELS);
        let convolve = |y: &Shared| {
            for first in (0..panels).step_by(at_once) {
                let panels = Panels { width, count: at_once.min(panels - first), inputs: self.inputs };
                self.convolve(panels, first * width..all.min((first + at_once) * width), y);
            }
        };
        // SAFETY: every output's pixels in all lanes are written.
        unsafe { written(self.batch * self.outputs * self.rows() * self.columns(), convolve) }
    }

    /// Writes the pixels of some lanes, as many as the panels hold.
    fn convolve(&self, panels: Panels, all: Range<usize>, y: &Shared) {
        let take = |v: &Shared| {
            let channels = (0..self.inputs).into_par_iter().with_min_len(LEAST.div_ceil(all.len() * ELEMENTS));
            channels.for_each_init(Vec::new, |scratch, channel| {
                let input = Input { convolution: self, panels, lanes: all.clone(), channel, v, scratch };
                widest(TakeInput(input));
            });
        };
        // SAFETY: every lane of every panel is written, channel by channel.
        let v = unsafe { written(panels.values(), take) };
        let blocks = panels.count.div_ceil(PANELS);
        let chunk = outputs_of_a_task(self.outputs, OUTPUTS, blocks);
        let chunks = self.outputs.div_ceil(chunk);
        (0..blocks * chunks).into_par_iter().for_each_init(Scratch::default, |scratch, task| {
            let (first_panel, first_output) = (task / chunks * PANELS, task % chunks * chunk);
            let first = all.start + first_panel * panels.width;
            widest(Multiply {
                convolution: self,
                panels,
                v: &v,
                y,
                in_group: first_panel..panels.count.min(first_panel + PANELS),
                lanes: first..all.end.min(first + PANELS * panels.width),
                outputs: first_output..self.outputs.min(first_output + chunk),
                scratch,
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
}

impl Panels {
    fn values(self) -> usize {
        self.count * ELEMENTS * self.inputs * self.width
    }

    /// Channels in the block that begins with channel `first`; none after the last.
    fn depth(self, first: usize) -> usize {
        DEPTH.min(self.inputs - first)
    }

    /// Asks for a `1 / parts` of a panel's block of channels.
    #[inline(always)]
    fn prefetch(self, v: &[f32], panel: usize, channels: &Range<usize>, part: usize, parts: usize) {
        let first = v.as_ptr().wrapping_add((panel * self.inputs + channels.start) * ELEMENTS * self.width);
        prefetch(first, channels.len() * ELEMENTS * self.width, part, parts);
    }

    /// Where the lanes of a channel begin.
    fn at(self, panel: usize, element: usize, channel: usize) -> usize {
        let first = channel / DEPTH * DEPTH;
        let row = (panel * self.inputs + first) * ELEMENTS + element * self.depth(first) + channel - first;
        row * self.width
    }

    /// Zeros to the lanes from `used` on in all of a channel's elements.
    ///
    /// # Safety
    /// Nobody else uses the channel's lanes.
    unsafe fn clear_from(self, used: usize, channel: usize, v: &Shared) {
        for lane in used..self.count * self.width {
            for element in 0..ELEMENTS {
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

struct TakeInput<'a>(Input<'a>);

impl WithSimd for TakeInput<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Input { panels, channel, v, ref lanes, .. } = self.0;
        // SAFETY: the channel is this task's.
        unsafe { panels.clear_from(lanes.len(), channel, v) };
        take_input(simd, self.0);
    }
}

/// What a task works in.
#[derive(Default)]
struct Scratch {
    /// Taps of a panel of outputs, and their transforms.
    taps: Vec<f32>,
    kernel: Vec<f32>,
    /// `[element, output, lane]`.
    sums: Vec<f32>,
}

/// Some outputs in some lanes.
struct Multiply<'a> {
    convolution: &'a Convolution<'a>,
    panels: Panels,
    v: &'a [f32],
    y: &'a Shared,
    /// The panels that the lanes are in.
    in_group: Range<usize>,
    lanes: Range<usize>,
    outputs: Range<usize>,
    scratch: &'a mut Scratch,
}

impl WithSimd for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { convolution: c, panels, v, y, in_group, lanes, outputs, scratch } = self;
        let width = in_group.len() * panels.width;
        let rows = outputs.len().next_multiple_of(ROWS);
        let plane = (DEPTH * ROWS).next_multiple_of(S::F32_LANES);
        scratch.taps.resize(TAPS * plane, 0.);
        scratch.sums.resize(ELEMENTS * rows * width, 0.);
        let row_outputs = |row: usize| outputs.start + row..outputs.end.min(outputs.start + row + ROWS);
        for first in (0..c.inputs).step_by(DEPTH) {
            let inputs = first..first + panels.depth(first);
            let next_inputs = inputs.end..inputs.end + panels.depth(inputs.end);
            for row in (0..rows).step_by(ROWS) {
                c.kernel.gather(&row_outputs(row), &inputs, plane, &mut scratch.taps);
                transform_kernels(simd, &scratch.taps, &mut scratch.kernel, plane);
                let next = match row + ROWS < rows {
                    true => (row_outputs(row + ROWS), &inputs),
                    false => (row_outputs(0), &next_inputs),
                };
                for element in 0..ELEMENTS {
                    let before = if first > 0 { Before::AddedTo } else { Before::Replaced };
                    // What comes next is on its way from memory meanwhile.
                    c.kernel.prefetch(&next.0, next.1, element, ELEMENTS);
                    for (i, panel) in in_group.clone().enumerate() {
                        let part = row / ROWS * ELEMENTS + element;
                        panels.prefetch(v, panel, &next_inputs, part, rows / ROWS * ELEMENTS);
                        let b = &v[panels.at(panel, element, first)..][..inputs.len() * panels.width];
                        let a = &scratch.kernel[element * plane..][..inputs.len() * ROWS];
                        let sums = (element * rows + row) * width + i * panels.width;
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
            unsafe { write(simd, output) };
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
