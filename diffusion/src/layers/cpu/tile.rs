//! The innermost product: a tile of sums that stays in registers while it runs along the depth.

use std::hint::black_box;

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

/// `a b`, written to rows of `c`: as many rows of a, of `depth` values each, by one of b's panels, `[depth, width]`; a row of c has
/// `width` values, where `width` is one vector or [`VECTORS`].
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) depth: usize,
    pub(super) a: *const f32,
    pub(super) a_strides: Strides,
    pub(super) b: *const f32,
    pub(super) c: *mut f32,
    /// From a row of c to the next.
    pub(super) stride: usize,
    pub(super) before: Before,
}

/// How values of a lie.
#[derive(Clone, Copy)]
pub(super) struct Strides {
    /// From a row to itself and to the next four.
    rows: [usize; 5],
    /// From a value of a row to the next.
    step: usize,
}

impl Strides {
    /// Of a panel of a, `[depth, ROWS]`.
    pub(super) const PANEL: Self = Self::new(1, ROWS);

    /// From a row to the next, and from a value of a row to the next.
    pub(super) const fn new(row: usize, step: usize) -> Self {
        Self { rows: [0, row, 2 * row, 3 * row, 4 * row], step }
    }

    /// Where `row` is not known to the compiler, which would find it in turn for every row: a chain of twelve additions for each
    /// value of a row takes as long as the products.
    #[inline(always)]
    pub(super) fn of_rows(row: usize) -> Self {
        Self { rows: [0, row, black_box(2 * row), black_box(3 * row), black_box(4 * row)], step: 1 }
    }
}

impl Tile {
    /// `ROWS` rows.
    ///
    /// # Safety
    /// What is read and written lies in memory as described, and nobody else uses c's rows.
    #[inline(always)]
    pub(super) unsafe fn multiply<S: Simd>(self, simd: S, width: usize) {
        // SAFETY: the caller's.
        unsafe { self.multiply_rows(simd, ROWS, width) }
    }

    /// `rows` rows: 4, 8, or [`ROWS`].
    ///
    /// # Safety
    /// As of [`Self::multiply`].
    #[inline(always)]
    pub(super) unsafe fn multiply_rows<S: Simd>(self, simd: S, rows: usize, width: usize) {
        // SAFETY: the caller's. Sums, a row of b and one value of a fill the registers: 12 times 2 and 3 of 32, 6 times 2 and 3 of 16.
        unsafe {
            match (width == S::F32_LANES, S::REGISTER_COUNT >= 32, rows) {
                (true, true, ROWS) => self.rows::<S, ROWS, 1>(simd, 0),
                (false, true, ROWS) => self.rows::<S, ROWS, VECTORS>(simd, 0),
                (true, true, 8) => self.rows::<S, 8, 1>(simd, 0),
                (false, true, 8) => self.rows::<S, 8, VECTORS>(simd, 0),
                (true, false, ROWS) => {
                    self.rows::<S, { ROWS / 2 }, 1>(simd, 0);
                    self.rows::<S, { ROWS / 2 }, 1>(simd, ROWS / 2);
                }
                (false, false, ROWS) => {
                    self.rows::<S, { ROWS / 2 }, VECTORS>(simd, 0);
                    self.rows::<S, { ROWS / 2 }, VECTORS>(simd, ROWS / 2);
                }
                (true, ..) => {
                    for first in (0..rows).step_by(4) {
                        self.rows::<S, 4, 1>(simd, first);
                    }
                }
                (false, ..) => {
                    for first in (0..rows).step_by(4) {
                        self.rows::<S, 4, VECTORS>(simd, first);
                    }
                }
            }
        }
    }

    /// `R` rows from `first` on, of `V` vectors.
    #[inline(always)]
    unsafe fn rows<S: Simd, const R: usize, const V: usize>(self, simd: S, first: usize) {
        let lanes = S::F32_LANES;
        let Strides { rows: to_row, step } = self.a_strides;
        let mut sums = [[simd.splat_f32s(0.); V]; R];
        // SAFETY: the caller's.
        unsafe {
            let mut a = [self.a; ROWS / 4];
            for i in 0..R.div_ceil(4) {
                // `first` is 0, 4, 6 or 8.
                a[i] = self.a.add((first / 4 + i) * to_row[4] + to_row[first % 4]);
            }
            let mut b = self.b;
            for _ in 0..self.depth {
                let mut row = [simd.splat_f32s(0.); V];
                for j in 0..V {
                    row[j] = simd.load(b.add(j * lanes));
                }
                for i in 0..R {
                    let value = simd.splat_f32s(*a[i / 4].add(to_row[i % 4]));
                    for j in 0..V {
                        sums[i][j] = simd.mul_add_f32s(value, row[j], sums[i][j]);
                    }
                }
                for i in 0..R.div_ceil(4) {
                    a[i] = a[i].add(step);
                }
                b = b.add(V * lanes);
            }
            for i in 0..R {
                for j in 0..V {
                    let at = self.c.add((first + i) * self.stride + j * lanes);
                    let sum = match self.before {
                        Before::Replaced => sums[i][j],
                        Before::AddedTo => simd.add_f32s(simd.load(at), sums[i][j]),
                    };
                    simd.store(at, sum);
                }
            }
        }
    }
}
