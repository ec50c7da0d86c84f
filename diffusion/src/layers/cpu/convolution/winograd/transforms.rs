//! The transforms evaluate polynomials at 0, +-5/8, +-3/2 and infinity: those points lose less to rounding than 0, +-1, +-2 do.

use pulp::Simd;

use super::super::super::simd::Vectors;
use super::super::TAPS;
use super::{ELEMENTS, IN, Input, OUT, Output, rows_of_tiles, tiles_in_row};

/// Item, row and column of the `index`-th of the batch's places, `rows x columns` to an item.
fn place(index: usize, rows: usize, columns: usize) -> (usize, usize, usize) {
    (index / (rows * columns), index / columns % rows, index % columns)
}

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

/// Writes the elements of one channel in some tiles.
#[inline(always)]
pub(super) fn take_input<S: Simd>(simd: S, input: Input) {
    let Input { convolution: c, panels, lanes: tiles, channel, v, scratch } = input;
    let (lanes, columns, pixels) = (S::F32_LANES, tiles_in_row(c), c.height * c.width);
    // A line of the image with a zero before and zeros after it; every fourth pixel of that, from each of the first four
    // on, with one more to look ahead; and six lines transformed along the row.
    let whole = columns.next_multiple_of(lanes);
    let phase = whole + lanes;
    scratch.clear();
    scratch.resize(OUT * (columns + 1) + OUT * phase + IN * IN * whole, 0.);
    let (line, rest) = scratch.split_at_mut(OUT * (columns + 1));
    let (phases, along) = rest.split_at_mut(OUT * phase);
    let mut tile = tiles.start;
    while tile < tiles.end {
        let (item, row, mut column) = place(tile, rows_of_tiles(c), tiles_in_row(c));
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
                    d[i] = unsafe { simd.load_up_to(along, (i * IN + j) * whole + column) };
                }
                let d = transform_input(simd, d);
                for i in 0..IN {
                    let at = v.at(panels.at(panel, i * IN + j, channel) + lane);
                    // SAFETY: `count` lanes of this panel from `lane` on, which belong to this channel's task.
                    unsafe { simd.store_up_to(at, count, d[i]) };
                }
            }
            (tile, column) = (tile + count, column + count);
        }
    }
}

/// `[TAPS, plane]` to `[ELEMENTS, plane]`.
#[inline(always)]
pub(super) fn transform_kernels<S: Simd>(simd: S, taps: &[f32], kernels: &mut Vec<f32>, plane: usize) {
    kernels.resize(ELEMENTS * plane, 0.);
    assert!(taps.len() >= TAPS * plane && plane.is_multiple_of(S::F32_LANES));
    let (taps, kernel) = (taps.as_ptr(), kernels.as_mut_ptr());
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

/// Writes the pixels of some tiles in one output channel from their sums.
///
/// # Safety
/// Nobody else uses those pixels.
#[inline(always)]
pub(super) unsafe fn write<S: Simd>(simd: S, output: Output) {
    let Output { convolution: c, sums, plane, output, lanes: tiles, y } = output;
    const MOST_LANES: usize = 16;
    let mut tile = tiles.start;
    while tile < tiles.end {
        let (item, row, column) = place(tile, rows_of_tiles(c), tiles_in_row(c));
        let count = S::F32_LANES.min(tiles_in_row(c) - column).min(tiles.end - tile);
        let mut down = [[simd.splat_f32s(0.); OUT]; IN];
        for j in 0..IN {
            let mut m = [simd.splat_f32s(0.); IN];
            for i in 0..IN {
                // SAFETY: the sums of a tile.
                m[i] = unsafe { simd.load_up_to(sums, (i * IN + j) * plane + tile - tiles.start) };
            }
            down[j] = transform_output(simd, m);
        }
        let width = (OUT * count).min(c.width - OUT * column);
        for i in 0..OUT.min(c.height - OUT * row) {
            let m = [down[0][i], down[1][i], down[2][i], down[3][i], down[4][i], down[5][i]];
            let pixels = transform_output(simd, m);
            let mut phases = [[0f32; MOST_LANES]; OUT];
            for j in 0..OUT {
                const { assert!(S::F32_LANES <= MOST_LANES) };
                // SAFETY: as many values as the widest vector has.
                unsafe { simd.store(phases[j].as_mut_ptr(), pixels[j]) };
            }
            let mut line = [[0f32; OUT]; MOST_LANES];
            for (t, pixels) in line.iter_mut().enumerate() {
                *pixels = [phases[0][t], phases[1][t], phases[2][t], phases[3][t]];
            }
            // SAFETY: the caller's.
            unsafe {
                c.write(y, (item, output, (OUT * row + i) * c.width + OUT * column), &line.as_flattened()[..width])
            };
        }
        tile += count;
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
