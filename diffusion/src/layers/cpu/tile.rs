//! The innermost product: a tile of sums that stays in registers while it runs along the depth.

use pulp::Simd;

use super::product::Before;
use super::simd::Vectors;

/// Rows of a tile, and of a panel of `a`.
pub(super) const ROWS: usize = 12;
/// Vectors in a row of a tile, at most.
pub(super) const VECTORS: usize = 2;

/// Columns of a matrix in panels: the first and the width of each, [`VECTORS`] vectors, or one where that is enough at the end.
/// Together they are as many columns as fill whole vectors. A panel of `depth` rows begins `first * depth` values after the first
/// panel does.
#[inline(always)]
pub(super) fn panels(columns: usize, lanes: usize) -> impl Iterator<Item = (usize, usize)> {
    let widest = VECTORS * lanes;
    (0..columns).step_by(widest).map(move |first| (first, if columns - first <= lanes { lanes } else { widest }))
}

/// How many of all outputs, and at most `most`, a task takes, where each is in `groups` tasks: there are enough of them for all
/// threads, and none of so few outputs that it reads the columns too often.
pub(super) fn outputs_of_a_task(outputs: usize, most: usize, groups: usize) -> usize {
    let tasks = (2 * rayon::current_num_threads()).div_ceil(groups).min(outputs.div_ceil(2 * ROWS));
    outputs.div_ceil(outputs.div_ceil(most).max(tasks)).next_multiple_of(ROWS)
}

/// `a b`, written to `ROWS` rows of `c`: one of a's panels, `[depth, ROWS]`, by one of b's, `[depth, width]`; a row of c has `width`
/// values, where `width` is one vector or [`VECTORS`].
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) depth: usize,
    pub(super) a: *const f32,
    pub(super) b: *const f32,
    pub(super) c: *mut f32,
    /// From a row of c to the next.
    pub(super) stride: usize,
    pub(super) before: Before,
}

impl Tile {
    /// Where a is a panel.
    ///
    /// # Safety
    /// The panels and rows lie in memory as described, and nobody else uses those of `c`.
    #[inline(always)]
    pub(super) unsafe fn multiply<S: Simd>(self, simd: S, width: usize) {
        // SAFETY: the caller's.
        unsafe { self.multiply_by::<S, 1, ROWS>(simd, width) }
    }

    /// Where a's rows are `ROW` values apart, and the values of a row `DEPTH`.
    ///
    /// # Safety
    /// As of [`Self::multiply`].
    #[inline(always)]
    pub(super) unsafe fn multiply_by<S: Simd, const ROW: usize, const DEPTH: usize>(self, simd: S, width: usize) {
        // SAFETY: the caller's. Sums, a row of b and one value of a fill the registers: 12 times 2 and 3 of 32, 6 times 2 and 3 of 16.
        unsafe {
            match (width == S::F32_LANES, S::REGISTER_COUNT >= 32) {
                (true, true) => self.rows::<S, ROW, DEPTH, ROWS, 1>(simd, 0),
                (false, true) => self.rows::<S, ROW, DEPTH, ROWS, VECTORS>(simd, 0),
                (true, false) => {
                    self.rows::<S, ROW, DEPTH, { ROWS / 2 }, 1>(simd, 0);
                    self.rows::<S, ROW, DEPTH, { ROWS / 2 }, 1>(simd, ROWS / 2);
                }
                (false, false) => {
                    self.rows::<S, ROW, DEPTH, { ROWS / 2 }, VECTORS>(simd, 0);
                    self.rows::<S, ROW, DEPTH, { ROWS / 2 }, VECTORS>(simd, ROWS / 2);
                }
            }
        }
    }

    /// `R` rows from `first` on, of `V` vectors.
    #[inline(always)]
    unsafe fn rows<S: Simd, const ROW: usize, const DEPTH: usize, const R: usize, const V: usize>(
        self,
        simd: S,
        first: usize,
    ) {
        let lanes = S::F32_LANES;
        let mut sums = [[simd.splat_f32s(0.); V]; R];
        // SAFETY: the caller's.
        unsafe {
            let (mut a, mut b) = (self.a.add(first * ROW), self.b);
            for _ in 0..self.depth {
                let mut row = [simd.splat_f32s(0.); V];
                for j in 0..V {
                    row[j] = simd.load(b.add(j * lanes));
                }
                for i in 0..R {
                    let value = simd.splat_f32s(*a.add(i * ROW));
                    for j in 0..V {
                        sums[i][j] = simd.mul_add_f32s(value, row[j], sums[i][j]);
                    }
                }
                (a, b) = (a.add(DEPTH), b.add(V * lanes));
            }
            put_away(simd, sums, self.before, self.c.add(first * self.stride), self.stride);
        }
    }
}

/// Sums to rows of `c`, `stride` values apart.
///
/// # Safety
/// The rows are there, and nobody else uses them.
#[inline(always)]
pub(super) unsafe fn put_away<S: Simd, const R: usize, const V: usize>(
    simd: S,
    sums: [[S::f32s; V]; R],
    before: Before,
    c: *mut f32,
    stride: usize,
) {
    for i in 0..R {
        for j in 0..V {
            // SAFETY: the caller's.
            unsafe {
                let at = c.add(i * stride + j * S::F32_LANES);
                let sum = match before {
                    Before::Replaced => sums[i][j],
                    Before::AddedTo => simd.add_f32s(simd.load(at), sums[i][j]),
                };
                simd.store(at, sum);
            }
        }
    }
}
