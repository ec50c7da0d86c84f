//! 3x3 convolutions, padding 1, stride 1, by minimal filtering F(4x4, 3x3) (Winograd 1980; Lavin and Gray, CVPR 2016): a tile of
//! 4 x 4 outputs takes 36 products for each pair of channels instead of 144.
//!
//! `Y = A^T [(G g G^T) * (B^T d B)] A` for a tile of 6 x 6 inputs d and a kernel g; summed over input channels, each of the 36
//! elements is a product of matrices, `[out, in] [in, tiles]`. The transforms evaluate polynomials at 0, +-5/8, +-3/2 and infinity:
//! those points lose less to rounding than 0, +-1, +-2 do.
//!
//! Tiles are counted over the batch, in rows, and lie next to each other in vectors. The inputs' transforms are made once; the
//! kernel's, four times the size of the weights, a piece at a time, which the cache keeps while it is multiplied.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::LEAST;
use super::memory::{Shared, written};
use super::product::Before;
use super::simd::{Vectors, lanes, prefetch, widest};
use super::tile::{ROWS, Tile, VECTORS};

/// Outputs on a side of a tile, inputs on a side of what it sees, and elements of its transform.
const OUT: usize = 4;
const IN: usize = OUT + 2;
const ELEMENTS: usize = IN * IN;
const TAPS: usize = 9;

/// Input channels that are multiplied at a time.
const DEPTH: usize = 64;
/// Output channels of a task, at most, and panels of tiles: what it sums up, 36 values for each of both, stays in the cache.
const OUTPUTS: usize = 72;
const PANELS: usize = 2;
/// Values of the inputs' transforms that are made at a time, at most: 16 MB.
const TRANSFORMED: usize = if cfg!(test) { 1 << 15 } else { 1 << 22 };

/// The finite points other than 0 are `+-P` and `+-Q`.
const P: f32 = 0.625;
const Q: f32 = 1.5;
const P2: f32 = P * P;
const Q2: f32 = Q * Q;

/// `B^T d` for a column d.
#[inline(always)]
fn transform_input<S: Simd>(simd: S, d: [S::f32s; IN]) -> [S::f32s; IN] {
    let (even_p, odd_p) = (simd.scaled_plus(-Q2, d[2], d[4]), simd.scaled(P, simd.scaled_plus(-Q2, d[1], d[3])));
    let (even_q, odd_q) = (simd.scaled_plus(-P2, d[2], d[4]), simd.scaled(Q, simd.scaled_plus(-P2, d[1], d[3])));
    [
        simd.scaled_plus(P2 * Q2, d[0], simd.scaled_plus(-P2 - Q2, d[2], d[4])),
        simd.add_f32s(even_p, odd_p),
        simd.sub_f32s(even_p, odd_p),
        simd.add_f32s(even_q, odd_q),
        simd.sub_f32s(even_q, odd_q),
        simd.scaled_plus(P2 * Q2, d[1], simd.scaled_plus(-P2 - Q2, d[3], d[5])),
    ]
}

/// `G g` for a column g.
#[inline(always)]
fn transform_kernel<S: Simd>(simd: S, g: [S::f32s; 3]) -> [S::f32s; IN] {
    const AT_0: f32 = 1. / (P2 * Q2);
    const AT_P: f32 = 1. / (2. * P2 * (P2 - Q2));
    const AT_Q: f32 = 1. / (2. * Q2 * (Q2 - P2));
    let (even_p, odd_p) = (simd.scaled_plus(AT_P * P2, g[2], simd.scaled(AT_P, g[0])), simd.scaled(AT_P * P, g[1]));
    let (even_q, odd_q) = (simd.scaled_plus(AT_Q * Q2, g[2], simd.scaled(AT_Q, g[0])), simd.scaled(AT_Q * Q, g[1]));
    [
        simd.scaled(AT_0, g[0]),
        simd.add_f32s(even_p, odd_p),
        simd.sub_f32s(even_p, odd_p),
        simd.add_f32s(even_q, odd_q),
        simd.sub_f32s(even_q, odd_q),
        g[2],
    ]
}

/// `A^T m` for a column m.
#[inline(always)]
fn transform_output<S: Simd>(simd: S, m: [S::f32s; IN]) -> [S::f32s; OUT] {
    let (even_p, odd_p) = (simd.add_f32s(m[1], m[2]), simd.sub_f32s(m[1], m[2]));
    let (even_q, odd_q) = (simd.add_f32s(m[3], m[4]), simd.sub_f32s(m[3], m[4]));
    [
        simd.add_f32s(m[0], simd.add_f32s(even_p, even_q)),
        simd.scaled_plus(P, odd_p, simd.scaled(Q, odd_q)),
        simd.scaled_plus(P2, even_p, simd.scaled(Q2, even_q)),
        simd.scaled_plus(P * P2, odd_p, simd.scaled_plus(Q * Q2, odd_q, m[5])),
    ]
}

/// A kernel where it lies in memory.
#[derive(Clone, Copy)]
pub struct Kernel<'a> {
    values: &'a [f32],
    /// From an output channel to the next, and from an input channel to the next.
    strides: (usize, usize),
    /// Whether the taps lie in reverse order.
    flipped: bool,
}

impl<'a> Kernel<'a> {
    /// `[out, in, 3, 3]`.
    pub fn new(values: &'a [f32], inputs: usize) -> Self {
        Self { values, strides: (inputs * TAPS, TAPS), flipped: false }
    }

    /// The kernel `[out, in, 3, 3]` of a convolution seen as its adjoint's, which takes `out` channels to `in`.
    pub fn adjoint(values: &'a [f32], inputs: usize) -> Self {
        Self { values, strides: (TAPS, inputs * TAPS), flipped: true }
    }

    fn taps(&self, output: usize, input: usize) -> &'a [f32; TAPS] {
        let at = output * self.strides.0 + input * self.strides.1;
        self.values[at..].first_chunk().expect("a kernel of nine taps")
    }

    /// Asks for a `1 / parts` of what [`Self::gather`] will read.
    #[inline(always)]
    fn prefetch(&self, outputs: &Range<usize>, inputs: &Range<usize>, part: usize, parts: usize) {
        // Taps of an output lie in a row, or those of an input do.
        let (rows, in_row, strides) = match self.flipped {
            false => (outputs, inputs, self.strides),
            true => (inputs, outputs, (self.strides.1, self.strides.0)),
        };
        let first = self.values.as_ptr().wrapping_add(in_row.start * strides.1);
        let each = rows.len().div_ceil(parts);
        for row in (part * each..(part + 1) * each).filter(|row| *row < rows.len()) {
            prefetch(first.wrapping_add((rows.start + row) * strides.0), in_row.len() * TAPS, 0, 1);
        }
    }

    /// `[TAPS, inputs, ROWS]` of up to `ROWS` outputs, zeros for those that there are not, each tap's in its own `plane` values.
    #[inline(always)]
    fn gather(&self, outputs: &Range<usize>, inputs: &Range<usize>, plane: usize, g: &mut [f32]) {
        const GROUP: usize = 4;
        for (k, input) in inputs.clone().enumerate() {
            for group in 0..ROWS / GROUP {
                let mut rows = [&[0.; TAPS]; GROUP];
                for (i, row) in rows.iter_mut().enumerate() {
                    let output = outputs.start + group * GROUP + i;
                    if output < outputs.end {
                        *row = self.taps(output, input);
                    }
                }
                for tap in 0..TAPS {
                    let place = if self.flipped { TAPS - 1 - tap } else { tap };
                    let at = place * plane + k * ROWS + group * GROUP;
                    g[at..][..GROUP].copy_from_slice(&[rows[0][tap], rows[1][tap], rows[2][tap], rows[3][tap]]);
                }
            }
        }
    }
}

/// What is added to every pixel of a channel.
#[derive(Clone, Copy)]
pub struct Bias<'a> {
    /// `[outputs]` or `[batch, outputs]`.
    pub values: &'a [f32],
    /// From one item to the next: 0 where all have the same.
    pub stride: usize,
}

/// `[batch, inputs, height, width]` to `[batch, outputs, height, width]`, nothing of it empty.
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
}

impl Convolution<'_> {
    /// Whether there are tiles enough: they lie in vectors, and an empty lane costs what a full one does.
    pub(super) fn pays(&self) -> bool {
        4 * self.tiles() >= lanes()
    }

    fn rows_of_tiles(&self) -> usize {
        self.height.div_ceil(OUT)
    }

    fn tiles_in_row(&self) -> usize {
        self.width.div_ceil(OUT)
    }

    fn tiles(&self) -> usize {
        self.batch * self.rows_of_tiles() * self.tiles_in_row()
    }

    /// The row of tiles that a tile is in: its item, row and column.
    fn place(&self, tile: usize) -> (usize, usize, usize) {
        let (rows, columns) = (self.rows_of_tiles(), self.tiles_in_row());
        (tile / (rows * columns), tile / columns % rows, tile % columns)
    }

    /// The result. Panics where lengths do not fit each other.
    pub fn compute(&self) -> Vec<f32> {
        let (pixels, pairs) = (self.batch * self.height * self.width, self.inputs * self.outputs);
        assert!(pixels * pairs > 0 && self.x.len() == pixels * self.inputs, "{} values", self.x.len());
        assert_eq!(self.kernel.values.len(), pairs * TAPS, "values of a kernel");
        assert!(self.residual.is_none_or(|residual| residual.len() == pixels * self.outputs), "values of a residual");
        let width = if self.tiles() <= lanes() { lanes() } else { VECTORS * lanes() };
        let panels = self.tiles().div_ceil(width);
        let at_once = (TRANSFORMED / (ELEMENTS * self.inputs * width)).max(1).next_multiple_of(PANELS);
        let convolve = |y: &Shared| {
            for first in (0..panels).step_by(at_once) {
                let tiles = first * width..self.tiles().min((first + at_once) * width);
                self.convolve(Panels { width, count: at_once.min(panels - first), inputs: self.inputs }, tiles, y);
            }
        };
        // SAFETY: every output's pixels of all tiles are written.
        unsafe { written(self.batch * self.outputs * self.height * self.width, convolve) }
    }

    /// Writes the pixels of some tiles, as many as the panels hold.
    fn convolve(&self, panels: Panels, tiles: Range<usize>, y: &Shared) {
        let transform = |v: &Shared| {
            let least = LEAST.div_ceil(tiles.len() * ELEMENTS);
            let channels = (0..self.inputs).into_par_iter().with_min_len(least);
            channels.for_each_init(Vec::new, |scratch, channel| {
                widest(TransformInput { convolution: self, panels, tiles: tiles.clone(), channel, v, scratch });
            });
        };
        // SAFETY: every lane of every panel is written, channel by channel.
        let v = unsafe { written(panels.values(), transform) };
        let blocks = panels.count.div_ceil(PANELS);
        // Enough tasks for all threads; a task of a few outputs reads the transforms too often.
        let tasks = (2 * rayon::current_num_threads()).div_ceil(blocks).min(self.outputs.div_ceil(2 * ROWS));
        let chunk = self.outputs.div_ceil(self.outputs.div_ceil(OUTPUTS).max(tasks)).next_multiple_of(ROWS);
        let chunks = self.outputs.div_ceil(chunk);
        (0..blocks * chunks).into_par_iter().for_each_init(Scratch::default, |scratch, task| {
            let (first_panel, first_output) = (task / chunks * PANELS, task % chunks * chunk);
            let first = tiles.start + first_panel * panels.width;
            widest(Multiply {
                convolution: self,
                panels,
                v: &v,
                y,
                in_group: first_panel..panels.count.min(first_panel + PANELS),
                tiles: first..tiles.end.min(first + PANELS * panels.width),
                outputs: first_output..self.outputs.min(first_output + chunk),
                scratch,
            });
        });
    }
}

/// How the transforms of the inputs lie: `[panel, depth block, element, channel of the block, lane]`, so that a task reads on and
/// on.
#[derive(Clone, Copy)]
struct Panels {
    /// Tiles, one to a lane.
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
}

/// Transforms one channel of some tiles.
struct TransformInput<'a> {
    convolution: &'a Convolution<'a>,
    panels: Panels,
    tiles: Range<usize>,
    channel: usize,
    v: &'a Shared,
    scratch: &'a mut Vec<f32>,
}

impl WithSimd for TransformInput<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { convolution: c, panels, tiles, channel, v, scratch } = self;
        let (lanes, columns, pixels) = (S::F32_LANES, c.tiles_in_row(), c.height * c.width);
        // A line of the image with a zero before and zeros after it; every fourth pixel of that, from each of the first four
        // on, with one more to look ahead; and six lines transformed along the row.
        let whole = columns.next_multiple_of(lanes);
        let phase = whole + lanes;
        scratch.clear();
        scratch.resize(OUT * (columns + 1) + OUT * phase + ELEMENTS * whole, 0.);
        let (line, rest) = scratch.split_at_mut(OUT * (columns + 1));
        let (phases, along) = rest.split_at_mut(OUT * phase);
        let mut tile = tiles.start;
        while tile < tiles.end {
            let (item, row, mut column) = c.place(tile);
            let image = &c.x[(item * c.inputs + channel) * pixels..][..pixels];
            for (i, along) in along.chunks_mut(IN * whole).enumerate() {
                let Some(source) = (OUT * row + i).checked_sub(1).filter(|source| *source < c.height) else {
                    along.fill(0.);
                    continue;
                };
                line[1..1 + c.width].copy_from_slice(&image[source * c.width..][..c.width]);
                take_phases(line, phases, phase);
                let (phases, along) = (phases.as_ptr(), along.as_mut_ptr());
                for t in (0..whole).step_by(lanes) {
                    // SAFETY: a phase has one more vector than the line has, and `along` six lines of `whole` values.
                    unsafe {
                        let mut d = [simd.splat_f32s(0.); IN];
                        for j in 0..IN {
                            d[j] = simd.load(phases.add(j % OUT * phase + j / OUT + t));
                        }
                        let d = transform_input(simd, d);
                        for j in 0..IN {
                            simd.store(along.add(j * whole + t), d[j]);
                        }
                    }
                }
            }
            while column < columns && tile < tiles.end {
                let (panel, lane) = ((tile - tiles.start) / panels.width, (tile - tiles.start) % panels.width);
                let count = lanes.min(columns - column).min(panels.width - lane).min(tiles.end - tile);
                for j in 0..IN {
                    let mut d = [simd.splat_f32s(0.); IN];
                    for i in 0..IN {
                        // SAFETY: a place in the line, before its end.
                        d[i] = unsafe { load_up_to(simd, along, (i * IN + j) * whole + column) };
                    }
                    let d = transform_input(simd, d);
                    for i in 0..IN {
                        let at = v.at(panels.at(panel, i * IN + j, channel) + lane);
                        // SAFETY: `count` lanes of this panel from `lane` on, which belong to this channel's task.
                        unsafe { store_up_to(simd, at, count, d[i]) };
                    }
                }
                (tile, column) = (tile + count, column + count);
            }
        }
        let (panel, used) = (tiles.len() / panels.width, tiles.len() % panels.width);
        if used > 0 {
            for element in 0..ELEMENTS {
                for lane in used..panels.width {
                    // SAFETY: the lanes of the last panel that no tile has.
                    unsafe { v.at(panels.at(panel, element, channel) + lane).write(0.) };
                }
            }
        }
    }
}

/// Pixel `4 t + m` of a line to place t of phase m.
#[inline(always)]
fn take_phases(line: &[f32], phases: &mut [f32], phase: usize) {
    let (even, odd) = phases.split_at_mut(2 * phase);
    let ((p0, p1), (p2, p3)) = (even.split_at_mut(phase), odd.split_at_mut(phase));
    for ((((p0, p1), p2), p3), pixels) in p0.iter_mut().zip(p1).zip(p2).zip(p3).zip(line.as_chunks::<OUT>().0) {
        (*p0, *p1, *p2, *p3) = (pixels[0], pixels[1], pixels[2], pixels[3]);
    }
}

/// A vector from `values[at..]`, with zeros beyond the end.
///
/// # Safety
/// `at` is not beyond the end.
#[inline(always)]
unsafe fn load_up_to<S: Simd>(simd: S, values: &[f32], at: usize) -> S::f32s {
    // SAFETY: the caller's, and the length is looked at.
    unsafe {
        if values.len() - at >= S::F32_LANES {
            simd.load(values.as_ptr().add(at))
        } else {
            simd.partial_load_f32s(values.get_unchecked(at..))
        }
    }
}

/// The first `count` values of a vector.
///
/// # Safety
/// There is room for them, which nobody else uses.
#[inline(always)]
unsafe fn store_up_to<S: Simd>(simd: S, at: *mut f32, count: usize, values: S::f32s) {
    // SAFETY: the caller's.
    unsafe {
        if count == S::F32_LANES {
            simd.store(at, values);
        } else {
            simd.partial_store_f32s(std::slice::from_raw_parts_mut(at, count), values);
        }
    }
}

/// What a task works in.
#[derive(Default)]
struct Scratch {
    /// Nine taps of a panel of outputs, and their 36 transforms.
    taps: Vec<f32>,
    kernel: Vec<f32>,
    /// `[element, output, tile]`.
    sums: Vec<f32>,
}

/// Some outputs of some tiles.
struct Multiply<'a> {
    convolution: &'a Convolution<'a>,
    panels: Panels,
    v: &'a [f32],
    y: &'a Shared,
    /// The panels that the tiles are in.
    in_group: Range<usize>,
    tiles: Range<usize>,
    outputs: Range<usize>,
    scratch: &'a mut Scratch,
}

impl WithSimd for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { convolution: c, panels, v, y, in_group, tiles, outputs, scratch } = self;
        let width = in_group.len() * panels.width;
        let rows = outputs.len().next_multiple_of(ROWS);
        let plane = (DEPTH * ROWS).next_multiple_of(S::F32_LANES);
        scratch.taps.resize(TAPS * plane, 0.);
        scratch.kernel.resize(ELEMENTS * plane, 0.);
        scratch.sums.resize(ELEMENTS * rows * width, 0.);
        let row_outputs = |row: usize| outputs.start + row..outputs.end.min(outputs.start + row + ROWS);
        for first in (0..c.inputs).step_by(DEPTH) {
            let inputs = first..first + panels.depth(first);
            let next_inputs = inputs.end..inputs.end + panels.depth(inputs.end);
            let before = if first == 0 { Before::Replaced } else { Before::AddedTo };
            for row in (0..rows).step_by(ROWS) {
                c.kernel.gather(&row_outputs(row), &inputs, plane, &mut scratch.taps);
                transform_taps(simd, &scratch.taps, &mut scratch.kernel, plane);
                let next = match row + ROWS < rows {
                    true => (row_outputs(row + ROWS), &inputs),
                    false => (row_outputs(0), &next_inputs),
                };
                for element in 0..ELEMENTS {
                    // What comes next is on its way from memory meanwhile.
                    c.kernel.prefetch(&next.0, next.1, element, ELEMENTS);
                    for (i, panel) in in_group.clone().enumerate() {
                        let part = row / ROWS * ELEMENTS + element;
                        panels.prefetch(v, panel, &next_inputs, part, rows / ROWS * ELEMENTS);
                        let b = &v[panels.at(panel, element, first)..][..inputs.len() * panels.width];
                        let a = &scratch.kernel[element * plane..][..inputs.len() * ROWS];
                        let sums = &mut scratch.sums[(element * rows + row) * width + i * panels.width..];
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
            // SAFETY: the pixels of this output in these tiles are this task's.
            unsafe { c.write(simd, &scratch.sums[row * width..], rows * width, output, tiles.clone(), y) };
        }
    }
}

/// `[TAPS, plane]` to `[ELEMENTS, plane]`.
#[inline(always)]
fn transform_taps<S: Simd>(simd: S, taps: &[f32], kernel: &mut [f32], plane: usize) {
    assert!(taps.len() >= TAPS * plane && kernel.len() >= ELEMENTS * plane && plane.is_multiple_of(S::F32_LANES));
    let (taps, kernel) = (taps.as_ptr(), kernel.as_mut_ptr());
    for at in (0..plane).step_by(S::F32_LANES) {
        // SAFETY: whole vectors of planes, whose number was looked at.
        unsafe {
            let mut columns = [[simd.splat_f32s(0.); IN]; 3];
            for j in 0..3 {
                let tap = taps.add(j * plane + at);
                let column = [simd.load(tap), simd.load(tap.add(3 * plane)), simd.load(tap.add(6 * plane))];
                columns[j] = transform_kernel(simd, column);
            }
            for i in 0..IN {
                let row = transform_kernel(simd, [columns[0][i], columns[1][i], columns[2][i]]);
                for j in 0..IN {
                    simd.store(kernel.add((i * IN + j) * plane + at), row[j]);
                }
            }
        }
    }
}

impl Convolution<'_> {
    /// The pixels of `tiles` in one output channel from their sums, each element's `plane` values after those of the one before.
    ///
    /// # Safety
    /// Nobody else uses those pixels of `y`.
    #[inline(always)]
    unsafe fn write<S: Simd>(
        &self,
        simd: S,
        sums: &[f32],
        plane: usize,
        output: usize,
        tiles: Range<usize>,
        y: &Shared,
    ) {
        const MOST_LANES: usize = 16;
        let mut tile = tiles.start;
        while tile < tiles.end {
            let (item, row, column) = self.place(tile);
            let count = S::F32_LANES.min(self.tiles_in_row() - column).min(tiles.end - tile);
            let bias = self.bias.map_or(0., |bias| bias.values[item * bias.stride + output]);
            let mut down = [[simd.splat_f32s(0.); OUT]; IN];
            for j in 0..IN {
                let mut m = [simd.splat_f32s(0.); IN];
                for i in 0..IN {
                    // SAFETY: the sums of a tile.
                    m[i] = unsafe { load_up_to(simd, sums, (i * IN + j) * plane + tile - tiles.start) };
                }
                down[j] = transform_output(simd, m);
            }
            let width = (OUT * count).min(self.width - OUT * column);
            for i in 0..OUT.min(self.height - OUT * row) {
                let m = [down[0][i], down[1][i], down[2][i], down[3][i], down[4][i], down[5][i]];
                let pixels = transform_output(simd, m);
                let mut phases = [[0f32; MOST_LANES]; OUT];
                for j in 0..OUT {
                    const { assert!(S::F32_LANES <= MOST_LANES) };
                    // SAFETY: as many values as the widest vector has.
                    unsafe { simd.store(phases[j].as_mut_ptr(), simd.add_f32s(pixels[j], simd.splat_f32s(bias))) };
                }
                let mut line = [[0f32; OUT]; MOST_LANES];
                for (t, pixels) in line.iter_mut().enumerate() {
                    *pixels = [phases[0][t], phases[1][t], phases[2][t], phases[3][t]];
                }
                let line = &line.as_flattened()[..width];
                let at = ((item * self.outputs + output) * self.height + OUT * row + i) * self.width + OUT * column;
                // SAFETY: the caller's: `width` pixels of this row, which are within the picture.
                let pixels =
                    unsafe { std::slice::from_raw_parts_mut(y.at(at).cast::<std::mem::MaybeUninit<f32>>(), width) };
                match self.residual {
                    None => pixels.iter_mut().zip(line).for_each(|(y, value)| _ = y.write(*value)),
                    Some(residual) => {
                        let sums = line.iter().zip(&residual[at..]).map(|(value, residual)| value + residual);
                        pixels.iter_mut().zip(sums).for_each(|(y, sum)| _ = y.write(sum));
                    }
                }
            }
            tile += count;
        }
    }
}
