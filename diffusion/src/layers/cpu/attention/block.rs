//! A block of scores: some keys by some queries, queries next to each other, so that what the softmax does for each of them is
//! arithmetic on vectors.

use pulp::Simd;

use super::super::exp::exp_vector;
use super::super::product::{Before, Matrix};
use super::super::simd::Vectors;
pub(super) use super::super::tile::panels as panels_of;
use super::super::tile::{ROWS, Tile};

/// Queries of a block: a multiple of a tile's rows and of every vector's lanes.
pub(super) const QUERIES: usize = 96;
/// Keys of a block, a multiple of a tile's rows: its scores are 46 kB.
pub(super) const KEYS: usize = 120;

const _: () = assert!(QUERIES.is_multiple_of(ROWS) && QUERIES.is_multiple_of(16) && KEYS.is_multiple_of(ROWS));

/// What as many columns take in panels.
pub(super) fn padded(columns: usize, lanes: usize) -> usize {
    columns.next_multiple_of(lanes)
}

/// `[rows, columns]` to panels of columns, times a factor; zeros in columns that there are not.
pub(super) fn rows_in_panels(rows: Matrix, factor: f32, panels: impl Iterator<Item = (usize, usize)>, out: &mut [f32]) {
    for (first, width) in panels {
        let panel = &mut out[first * rows.rows()..][..width * rows.rows()];
        for (row, out) in panel.chunks_mut(width).enumerate() {
            let values = &rows.row(row)[first..rows.columns().min(first + width)];
            let (used, rest) = out.split_at_mut(values.len());
            used.iter_mut().zip(values).for_each(|(out, value)| *out = value * factor);
            rest.fill(0.);
        }
    }
}

/// The transpose of `[rows, columns]`, likewise: each of the panels' columns is a row.
pub(super) fn columns_in_panels(
    rows: Matrix,
    factor: f32,
    panels: impl Iterator<Item = (usize, usize)>,
    out: &mut [f32],
) {
    for (first, width) in panels {
        let panel = &mut out[first * rows.columns()..][..width * rows.columns()];
        for lane in 0..width {
            if first + lane < rows.rows() {
                let values = rows.row(first + lane);
                panel[lane..].iter_mut().step_by(width).zip(values).for_each(|(out, value)| *out = value * factor);
            } else {
                panel[lane..].iter_mut().step_by(width).for_each(|out| *out = 0.);
            }
        }
    }
}

/// Keys and queries of a block, up to [`KEYS`] and [`QUERIES`]. Its scores are `[KEYS, QUERIES]`; whole tiles of them are computed,
/// and those beyond its sizes mean nothing.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) keys: usize,
    pub(super) queries: usize,
}

impl Block {
    /// Products of keys, columns `[width, keys]` in panels of rows of a tile, with queries, columns `[width, queries]` in panels of
    /// vectors.
    #[inline(always)]
    pub(super) fn scores<S: Simd>(self, simd: S, width: usize, keys: &[f32], queries: &[f32], scores: &mut [f32]) {
        let rows = self.keys.next_multiple_of(ROWS);
        assert!(keys.len() >= rows * width && queries.len() >= padded(self.queries, S::F32_LANES) * width);
        assert!(self.keys <= KEYS && self.queries <= QUERIES && scores.len() >= KEYS * QUERIES);
        for row in (0..rows).step_by(ROWS) {
            for (first, columns) in panels_of(self.queries, S::F32_LANES) {
                // SAFETY: the lengths were looked at.
                unsafe {
                    let (a, b) = (keys.as_ptr().add(row * width), queries.as_ptr().add(first * width));
                    let c = scores.as_mut_ptr().add(row * QUERIES + first);
                    let tile = Tile { depth: width, a, b, c, stride: QUERIES, before: Before::Replaced };
                    tile.multiply(simd, columns);
                }
            }
        }
    }

    /// Scores to exponentials of their distance to the largest so far, and their sums added up; both are of this block alone where it
    /// is the first. Gives what sums before are to be multiplied by.
    #[inline(always)]
    pub(super) fn exponentials<S: Simd>(
        self,
        simd: S,
        first: bool,
        scores: &mut [f32],
        largest: &mut [f32; QUERIES],
        sums: &mut [f32; QUERIES],
    ) -> [f32; QUERIES] {
        assert!(self.keys <= KEYS && self.queries <= QUERIES && scores.len() >= KEYS * QUERIES);
        let mut rescale = [0f32; QUERIES];
        for at in (0..self.queries).step_by(S::F32_LANES) {
            // SAFETY: vectors divide QUERIES, and the lengths were looked at.
            unsafe {
                let column = scores.as_mut_ptr().add(at);
                let before = simd.load(largest.as_ptr().add(at));
                let mut most = if first { simd.load(column) } else { before };
                for key in 0..self.keys {
                    most = simd.max_f32s(most, simd.load(column.add(key * QUERIES)));
                }
                let mut sum = simd.splat_f32s(0.);
                for key in 0..self.keys {
                    let score = column.add(key * QUERIES);
                    let value = exp_vector(simd, simd.sub_f32s(simd.load(score), most));
                    simd.store(score, value);
                    sum = simd.add_f32s(sum, value);
                }
                if !first {
                    let factor = exp_vector(simd, simd.sub_f32s(before, most));
                    simd.store(rescale.as_mut_ptr().add(at), factor);
                    sum = simd.mul_add_f32s(factor, simd.load(sums.as_ptr().add(at)), sum);
                }
                simd.store(largest.as_mut_ptr().add(at), most);
                simd.store(sums.as_mut_ptr().add(at), sum);
            }
        }
        rescale
    }

    /// `[queries, width]`: for each query the sum over keys of its score with the key's row of `values`, which are all of `of` rows in
    /// panels of vectors, those of this block from `first` on. Written to rows of [`padded`] values or added to them.
    #[inline(always)]
    pub(super) fn sum_over_keys<S: Simd>(
        self,
        simd: S,
        scores: &[f32],
        (values, of, first_key): (&[f32], usize, usize),
        width: usize,
        added: bool,
        out: &mut [f32],
    ) {
        let stride = padded(width, S::F32_LANES);
        let rows = self.queries.next_multiple_of(ROWS);
        assert!(self.keys <= KEYS && self.queries <= QUERIES && scores.len() >= KEYS * QUERIES);
        assert!(first_key + self.keys <= of && values.len() >= of * stride && out.len() >= rows * stride);
        let before = if added { Before::AddedTo } else { Before::Replaced };
        for (first, columns) in panels_of(width, S::F32_LANES) {
            for row in (0..rows).step_by(ROWS) {
                // SAFETY: the lengths were looked at; QUERIES is a multiple of ROWS.
                unsafe {
                    let b = values.as_ptr().add(first * of + first_key * columns);
                    let (a, c) = (scores.as_ptr().add(row), out.as_mut_ptr().add(row * stride + first));
                    let tile = Tile { depth: self.keys, a, b, c, stride, before };
                    tile.multiply_by::<S, 1, QUERIES>(simd, columns);
                }
            }
        }
    }

    /// `[keys, width]`: for each key the sum over queries of its score with the query's row of `values`, this block's rows in panels of
    /// vectors; added to rows of [`padded`] values, of which there are a multiple of a tile's.
    #[inline(always)]
    pub(super) fn add_over_queries<S: Simd>(
        self,
        simd: S,
        scores: &[f32],
        values: &[f32],
        width: usize,
        out: &mut [f32],
    ) {
        let stride = padded(width, S::F32_LANES);
        let rows = self.keys.next_multiple_of(ROWS);
        assert!(self.keys <= KEYS && self.queries <= QUERIES && scores.len() >= KEYS * QUERIES);
        assert!(values.len() >= self.queries * stride && out.len() >= rows * stride);
        for (first, columns) in panels_of(width, S::F32_LANES) {
            for row in (0..rows).step_by(ROWS) {
                // SAFETY: the lengths were looked at.
                unsafe {
                    let (a, b) = (scores.as_ptr().add(row * QUERIES), values.as_ptr().add(first * self.queries));
                    let c = out.as_mut_ptr().add(row * stride + first);
                    let tile = Tile { depth: self.queries, a, b, c, stride, before: Before::AddedTo };
                    tile.multiply_by::<S, QUERIES, 1>(simd, columns);
                }
            }
        }
    }

    /// Scores to attention weights, given the logarithms of the sums that they are divided by.
    #[inline(always)]
    pub(super) fn weights<S: Simd>(self, simd: S, scores: &mut [f32], log_sums: &[f32; QUERIES]) {
        assert!(self.keys <= KEYS && self.queries <= QUERIES && scores.len() >= KEYS * QUERIES);
        for at in (0..self.queries).step_by(S::F32_LANES) {
            // SAFETY: vectors divide QUERIES, and the lengths were looked at.
            unsafe {
                let log_sum = simd.load(log_sums.as_ptr().add(at));
                for key in 0..self.keys {
                    let score = scores.as_mut_ptr().add(key * QUERIES + at);
                    simd.store(score, exp_vector(simd, simd.sub_f32s(simd.load(score), log_sum)));
                }
            }
        }
    }

    /// The scores' cotangents `P (dP - along)` in place of those of the weights, where `along` is each query's `sum(P dP)`.
    #[inline(always)]
    pub(super) fn softmax_vjp<S: Simd>(self, simd: S, p: &[f32], dp: &mut [f32], along: &[f32; QUERIES]) {
        assert!(self.keys <= KEYS && self.queries <= QUERIES);
        assert!(p.len() >= KEYS * QUERIES && dp.len() >= KEYS * QUERIES);
        for at in (0..self.queries).step_by(S::F32_LANES) {
            // SAFETY: vectors divide QUERIES, and the lengths were looked at.
            unsafe {
                let along = simd.load(along.as_ptr().add(at));
                for key in 0..self.keys {
                    let (p, dp) = (p.as_ptr().add(key * QUERIES + at), dp.as_mut_ptr().add(key * QUERIES + at));
                    simd.store(dp, simd.mul_f32s(simd.load(p), simd.sub_f32s(simd.load(dp), along)));
                }
            }
        }
    }
}
