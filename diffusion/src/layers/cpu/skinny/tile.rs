use std::ops::Range;

use pulp::Simd;

use super::super::product::Before;
use super::super::simd::{LINE, Vectors, prefetch_line, prefetch_line_close};
use super::super::tile::{ROWS, VECTORS, put_away};
use super::Weights;

/// As [`Tile`](super::super::tile::Tile), of up to [`ROWS`] outputs, with weights where they lie for a.
#[derive(Clone, Copy)]
pub(super) struct WeightsTile<const TAPS: usize> {
    pub(super) channels: usize,
    pub(super) weights: *const f32,
    pub(super) strides: (usize, usize),
    pub(super) b: *const f32,
    pub(super) c: *mut f32,
    pub(super) stride: usize,
    pub(super) before: Before,
}

impl<const TAPS: usize> WeightsTile<TAPS> {
    /// Channels between asking for weights and asking again.
    const RUN: usize = if TAPS < 8 { 8 } else { 1 };

    /// How often whole tiles of so many channels ask for weights.
    pub(super) fn turns<S: Simd>(channels: usize) -> usize {
        channels.div_ceil(Self::RUN) * if S::REGISTER_COUNT >= 32 { 1 } else { 2 }
    }

    /// # Safety
    /// Weights, panels and rows lie in memory as described, and nobody else uses those of `c`.
    #[inline(always)]
    pub(super) unsafe fn multiply<S: Simd>(self, simd: S, rows: usize, width: usize, upcoming: &mut Upcoming) {
        // SAFETY: the caller's.
        unsafe {
            match width == S::F32_LANES {
                true => self.columns::<S, 1>(simd, rows, upcoming),
                false => self.columns::<S, VECTORS>(simd, rows, upcoming),
            }
        }
    }

    /// As many rows at a time as fill the registers, as [`Tile`](super::super::tile::Tile) has them, and fewer where fewer are left.
    #[inline(always)]
    unsafe fn columns<S: Simd, const V: usize>(self, simd: S, rows: usize, upcoming: &mut Upcoming) {
        const HALF: usize = ROWS / 2;
        const FEWER: usize = 4;
        let mut done = 0;
        while done < rows {
            // SAFETY: the caller's.
            unsafe {
                let rest = Self {
                    weights: self.weights.add(done * self.strides.0),
                    c: self.c.add(done * self.stride),
                    ..self
                };
                done += match rows - done {
                    ROWS.. if S::REGISTER_COUNT >= 32 => rest.rows::<S, ROWS, V>(simd, upcoming),
                    HALF.. if S::REGISTER_COUNT < 32 => rest.rows::<S, HALF, V>(simd, upcoming),
                    FEWER.. => rest.rows::<S, FEWER, V>(simd, upcoming),
                    _ => rest.rows::<S, 1, V>(simd, upcoming),
                };
            }
        }
    }

    /// `R` rows of `V` vectors; gives `R`.
    #[inline(always)]
    unsafe fn rows<S: Simd, const R: usize, const V: usize>(self, simd: S, upcoming: &mut Upcoming) -> usize {
        // SAFETY: the caller's.
        unsafe {
            match self.strides.0 == TAPS {
                // Known as this is compiled.
                true => self.rows_apart::<S, R, V>(simd, TAPS, upcoming),
                false => self.rows_apart::<S, R, V>(simd, self.strides.0, upcoming),
            }
        }
        R
    }

    /// Rows whose weights are `row` values apart.
    #[inline(always)]
    unsafe fn rows_apart<S: Simd, const R: usize, const V: usize>(self, simd: S, row: usize, upcoming: &mut Upcoming) {
        let lanes = S::F32_LANES;
        let mut sums = [[simd.splat_f32s(0.); V]; R];
        // SAFETY: the caller's.
        unsafe {
            let (mut a, mut b, mut channel) = (self.weights, self.b, 0);
            while channel < self.channels {
                let run = Self::RUN.min(self.channels - channel);
                upcoming.ask();
                for _ in 0..run {
                    if Self::RUN > 1 && row == TAPS {
                        // Too far apart for the machine to see it coming.
                        let soon = a.wrapping_add(Self::RUN * self.strides.1);
                        prefetch_line_close(soon);
                        prefetch_line_close(soon.wrapping_add(R * TAPS - 1));
                    }
                    for tap in 0..TAPS {
                        let mut columns = [simd.splat_f32s(0.); V];
                        for j in 0..V {
                            columns[j] = simd.load(b.add(j * lanes));
                        }
                        for i in 0..R {
                            let weight = simd.splat_f32s(*a.add(i * row + tap));
                            for j in 0..V {
                                sums[i][j] = simd.mul_add_f32s(weight, columns[j], sums[i][j]);
                            }
                        }
                        b = b.add(V * lanes);
                    }
                    a = a.wrapping_add(self.strides.1);
                }
                channel += run;
            }
            put_away(simd, sums, self.before, self.c, self.stride);
        }
    }
}

/// Weights that come next, which are to be on their way from memory meanwhile: a piece of each row, then the next of each.
pub(super) struct Upcoming {
    /// Of the first row, where the piece begins.
    first: *const f32,
    rows: usize,
    stride: usize,
    pieces: usize,
    lines: usize,
    /// Where in the piece.
    row: usize,
    line: usize,
    /// To be asked for at a time.
    at_once: usize,
}

impl Upcoming {
    /// The weights of some outputs and channels, to be asked for in so many turns.
    pub(super) fn of<const TAPS: usize>(
        weights: Weights<TAPS>,
        outputs: &Range<usize>,
        channels: Range<usize>,
        turns: usize,
    ) -> Self {
        let Weights { strides, values, .. } = weights;
        let (rows, in_row, stride) = match strides.0 == TAPS {
            true => (channels.len(), outputs.len() * TAPS, strides.1),
            false => (outputs.len(), channels.len() * TAPS, strides.0),
        };
        // What a tile reads of a row, if that is several lines.
        let piece = if strides.0 == TAPS && TAPS * ROWS > 4 * LINE { TAPS * ROWS } else { in_row };
        let pieces = in_row.div_ceil(piece.max(1));
        let lines = piece.div_ceil(LINE) + 1;
        let first = values.as_ptr().wrapping_add(outputs.start * strides.0 + channels.start * strides.1);
        let at_once = (rows * pieces * lines).div_ceil(turns);
        Self { first, rows, stride, pieces, lines, row: 0, line: 0, at_once }
    }

    #[inline(always)]
    fn ask(&mut self) {
        let mut left = self.at_once;
        while left > 0 && self.pieces > 0 {
            let count = left.min(self.lines - self.line);
            let first = self.first.wrapping_add(self.row * self.stride + self.line * LINE);
            for line in 0..count {
                prefetch_line(first.wrapping_add(line * LINE));
            }
            (left, self.line) = (left - count, self.line + count);
            if self.line == self.lines {
                (self.line, self.row) = (0, self.row + 1);
            }
            if self.row == self.rows {
                // A piece need not begin with a line, so that its last may be the next one's first.
                let on = (self.lines - 1) * LINE;
                (self.row, self.pieces, self.first) = (0, self.pieces - 1, self.first.wrapping_add(on));
            }
        }
    }
}
