//! Products of a matrix of weights with few columns ("skinny"): weights are read where they lie, once for as many columns as a task
//! has, and only the columns are laid out. Where there are many columns, laying out the weights as well pays.

mod tile;

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::LEAST;
use super::memory::{Shared, written};
use super::product::Before;
use super::simd::{lanes, widest};
use super::tile::{ROWS, VECTORS, outputs_of_a_task, panels};
use tile::{Upcoming, WeightsTile};

/// Terms of a sum that are multiplied at a time: those of a panel's columns stay in the first-level cache, and a task's weights, with
/// those that come next, in the second.
const DEPTH: usize = 144;
/// Outputs of a task, at most.
const OUTPUTS: usize = 27 * ROWS;
/// Lanes of a task, at most, in vectors: its sums stay in the second-level cache.
const TASK_VECTORS: usize = 16;
/// Weights from which on it pays to leave them where they lie: more than the second-level cache holds, so that reading them is what takes
/// the time. Smaller ones are of models that see many items at once, as in training; how many these are must not matter, or the result
/// of one would depend on its batch. Fewer in tests.
pub(super) const WORTHWHILE: usize = if cfg!(test) { 1 << 7 } else { 1 << 20 };
/// Values of columns that are laid out at a time, up to a task's lanes: 16 MB. Fewer in tests, to have several.
const VALUES_AT_ONCE: usize = if cfg!(test) { 1 << 15 } else { 1 << 22 };

/// `[outputs, channels, TAPS]`: the taps of an output's channel follow each other.
#[derive(Clone, Copy)]
pub(super) struct Weights<'a, const TAPS: usize> {
    values: &'a [f32],
    outputs: usize,
    channels: usize,
    /// From an output to the next, and from a channel to the next.
    strides: (usize, usize),
}

impl<'a, const TAPS: usize> Weights<'a, TAPS> {
    /// Channels whose products are added up before the sums are put away.
    const BLOCK: usize = DEPTH / TAPS;

    /// `[outputs, channels, TAPS]` in memory.
    pub(super) fn by_output(values: &'a [f32], outputs: usize, channels: usize) -> Self {
        Self { values, outputs, channels, strides: (channels * TAPS, TAPS) }.checked()
    }

    /// `[channels, outputs, TAPS]` in memory.
    pub(super) fn by_channel(values: &'a [f32], outputs: usize, channels: usize) -> Self {
        Self { values, outputs, channels, strides: (TAPS, outputs * TAPS) }.checked()
    }

    fn checked(self) -> Self {
        let (values, count) = (self.values.len(), self.outputs * self.channels * TAPS);
        assert!(values == count && count > 0, "{values} values of weights, expected {count}");
        self
    }

    /// Terms of a sum.
    fn depth(self) -> usize {
        self.channels * TAPS
    }

    /// The block of channels from `first` on.
    fn block(self, first: usize) -> Range<usize> {
        first..self.channels.min(first + Self::BLOCK)
    }
}

/// What weights are multiplied with, `[channels, TAPS, lanes]`, and what becomes of the sums, `[outputs, lanes]`.
///
/// # Safety
/// `lanes` is always the same, and `lay_out` writes every value of the rows it gets: they are read without having been filled.
pub(super) unsafe trait Columns<const TAPS: usize>: Sync {
    fn lanes(&self) -> usize;

    /// Writes all of `rows`.
    fn lay_out<S: Simd>(&self, simd: S, rows: Rows<TAPS>);

    /// Takes the sums of some outputs, rows that are `stride` apart, in some lanes.
    ///
    /// # Safety
    /// Nobody else uses what becomes of those.
    unsafe fn write<S: Simd>(&self, simd: S, outputs: Range<usize>, lanes: Range<usize>, sums: &[f32], stride: usize);
}

/// The items of a batch that some lanes are in, `plane` lanes to an item, and which lanes of the item's own they are.
pub(super) fn by_item(lanes: Range<usize>, plane: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    (lanes.start / plane..lanes.end.div_ceil(plane)).map(move |item| {
        let first = item * plane;
        (item, lanes.start.max(first) - first..lanes.end.min(first + plane) - first)
    })
}

/// The columns' rows of some channels in the lanes of a panel.
pub(super) struct Rows<const TAPS: usize> {
    pub(super) channels: Range<usize>,
    pub(super) lanes: Range<usize>,
    /// Rows of `width` values follow each other.
    first: *mut f32,
    width: usize,
}

impl<const TAPS: usize> Rows<TAPS> {
    /// Each tap of the first channel, then of the next: rows of `width` values, of which the lanes are the first.
    pub(super) fn all(&mut self) -> (&mut [MaybeUninit<f32>], usize) {
        let count = self.channels.len() * TAPS * self.width;
        // SAFETY: the rows of the panel, which whoever made this gave to it alone.
        (unsafe { std::slice::from_raw_parts_mut(self.first.cast(), count) }, self.width)
    }

    /// The lanes of a channel's tap.
    pub(super) fn of(&mut self, channel: usize, tap: usize) -> &mut [MaybeUninit<f32>] {
        assert!(self.channels.contains(&channel) && tap < TAPS);
        let (row, lanes) = ((channel - self.channels.start) * TAPS + tap, self.lanes.len());
        let (all, width) = self.all();
        &mut all[row * width..][..lanes]
    }

    /// Zeros beyond the lanes.
    fn clear_the_rest(&mut self) {
        let lanes = self.lanes.len();
        let (all, width) = self.all();
        if lanes < width {
            all.chunks_mut(width).for_each(|row| row[lanes..].fill(MaybeUninit::new(0.)));
        }
    }
}

/// Gives the sums of all outputs in all lanes to `columns`.
pub(super) fn multiply<const TAPS: usize>(weights: Weights<TAPS>, columns: &impl Columns<TAPS>) {
    let at_once = (VALUES_AT_ONCE / weights.depth()).max(1).next_multiple_of(TASK_VECTORS * lanes());
    let all = columns.lanes();
    for first in (0..all).step_by(at_once) {
        multiply_some(weights, columns, first..all.min(first + at_once));
    }
}

/// In some lanes, laid out in panels as [`panels`] has them.
fn multiply_some<const TAPS: usize>(weights: Weights<TAPS>, columns: &impl Columns<TAPS>, all: Range<usize>) {
    let (depth, outputs) = (weights.depth(), weights.outputs);
    let lay_out = |v: &Shared| {
        let blocks = (0..weights.channels.div_ceil(Weights::<TAPS>::BLOCK)).into_par_iter();
        blocks.with_min_len(LEAST.div_ceil(all.len() * DEPTH)).for_each(|block| {
            let channels = weights.block(block * Weights::<TAPS>::BLOCK);
            for (first, width) in panels(all.len(), lanes()) {
                let lanes = all.start + first..all.end.min(all.start + first + width);
                let first = v.at(first * depth + channels.start * TAPS * width);
                // Rows of these channels, which are this task's.
                widest(LayOut { columns, rows: Rows { channels: channels.clone(), lanes, first, width } });
            }
        });
    };
    // SAFETY: all channels' rows in all panels are written.
    let v = unsafe { written(depth * all.len().next_multiple_of(lanes()), lay_out) };
    let in_task = TASK_VECTORS * lanes();
    let groups = all.len().div_ceil(in_task);
    let chunk = outputs_of_a_task(outputs, OUTPUTS, groups);
    let chunks = outputs.div_ceil(chunk);
    (0..groups * chunks).into_par_iter().for_each_init(Vec::new, |sums, task| {
        let (first, output) = (task / chunks * in_task, task % chunks * chunk);
        let lanes = all.start + first..all.end.min(all.start + first + in_task);
        let outputs = output..outputs.min(output + chunk);
        widest(Multiply { weights, columns, lanes, outputs, v: &v[first * depth..], sums });
    });
}

struct LayOut<'a, C, const TAPS: usize> {
    columns: &'a C,
    rows: Rows<TAPS>,
}

impl<C: Columns<TAPS>, const TAPS: usize> WithSimd for LayOut<'_, C, TAPS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        self.rows.clear_the_rest();
        self.columns.lay_out(simd, self.rows);
    }
}

/// Some outputs in some lanes.
struct Multiply<'a, C, const TAPS: usize> {
    weights: Weights<'a, TAPS>,
    columns: &'a C,
    lanes: Range<usize>,
    outputs: Range<usize>,
    /// From the first lane's panel on.
    v: &'a [f32],
    sums: &'a mut Vec<f32>,
}

impl<C: Columns<TAPS>, const TAPS: usize> WithSimd for Multiply<'_, C, TAPS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { weights, columns, lanes, outputs, v, sums } = self;
        let Weights { channels, strides, .. } = weights;
        let stride = lanes.len().next_multiple_of(S::F32_LANES);
        sums.resize(outputs.len() * stride, 0.);
        assert!(v.len() >= weights.depth() * stride && outputs.end <= weights.outputs);
        for first in (0..channels).step_by(Weights::<TAPS>::BLOCK) {
            let block = weights.block(first);
            let tiles = lanes.len().div_ceil(VECTORS * S::F32_LANES) * outputs.len().div_ceil(ROWS);
            let turns = tiles * WeightsTile::<TAPS>::turns::<S>(block.len());
            let mut upcoming = Upcoming::of(weights, &outputs, weights.block(block.end), turns);
            for (lane, width) in panels(lanes.len(), S::F32_LANES) {
                for row in outputs.clone().step_by(ROWS) {
                    // SAFETY: the lengths were looked at, here and as the weights were made.
                    unsafe {
                        let tile = WeightsTile::<TAPS> {
                            channels: block.len(),
                            weights: weights.values.as_ptr().add(row * strides.0 + first * strides.1),
                            strides,
                            b: v.as_ptr().add(lane * weights.depth() + first * TAPS * width),
                            c: sums.as_mut_ptr().add((row - outputs.start) * stride + lane),
                            stride,
                            before: if first == 0 { Before::Replaced } else { Before::AddedTo },
                        };
                        tile.multiply(simd, ROWS.min(outputs.end - row), width, &mut upcoming);
                    }
                }
            }
        }
        // SAFETY: these outputs in these lanes are this task's.
        unsafe { columns.write(simd, outputs, lanes, sums, stride) };
    }
}
