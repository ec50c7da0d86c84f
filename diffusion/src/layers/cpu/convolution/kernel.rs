use std::ops::Range;

use super::super::simd::prefetch;
use super::super::skinny::Weights;
use super::super::tile::ROWS;
use super::TAPS;

/// A kernel where it lies in memory.
#[derive(Clone, Copy)]
pub struct Kernel<'a> {
    pub(super) values: &'a [f32],
    /// From an output channel to the next, and from an input channel to the next.
    strides: (usize, usize),
    /// Whether the taps lie in reverse order.
    pub(super) flipped: bool,
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

    /// As they lie, the taps of an adjoint from the last to the first.
    pub(super) fn weights(&self, outputs: usize, inputs: usize) -> Weights<'a, TAPS> {
        match self.flipped {
            false => Weights::by_output(self.values, outputs, inputs),
            true => Weights::by_channel(self.values, outputs, inputs),
        }
    }

    fn taps(&self, output: usize, input: usize) -> &'a [f32; TAPS] {
        let at = output * self.strides.0 + input * self.strides.1;
        self.values[at..].first_chunk().expect("a kernel of nine taps")
    }

    /// Asks for a `1 / parts` of what [`Self::gather`] will read.
    #[inline(always)]
    pub(super) fn prefetch(&self, outputs: &Range<usize>, inputs: &Range<usize>, part: usize, parts: usize) {
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
    pub(super) fn gather(&self, outputs: &Range<usize>, inputs: &Range<usize>, plane: usize, g: &mut [f32]) {
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
