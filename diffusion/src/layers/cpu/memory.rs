//! Memory for results, which is not filled before it is written: on one thread that would take as long as some kernels.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::{LEAST, rows_at_once};

/// `count` values in pieces of `piece` values, the last of which may be shorter: `write` gets each one's number and place, zeros
/// until it writes there. At least `least` pieces are one task.
pub(super) fn by_pieces(
    count: usize,
    piece: usize,
    least: usize,
    write: impl Fn(usize, &mut [f32]) + Sync,
) -> Vec<f32> {
    let mut values = Vec::with_capacity(count);
    let pieces = values.spare_capacity_mut()[..count].par_chunks_mut(piece.max(1)).enumerate();
    pieces.with_min_len(least.max(1)).for_each(|(index, piece)| {
        // In the cache, where the piece is about to be written.
        piece.fill(MaybeUninit::new(0.));
        // SAFETY: every value was filled.
        write(index, unsafe { std::slice::from_raw_parts_mut(piece.as_mut_ptr().cast(), piece.len()) });
    });
    // SAFETY: the pieces are all values, and each was filled.
    unsafe { values.set_len(count) };
    values
}

/// The same values elsewhere.
pub(super) fn copied(values: &[f32]) -> Vec<f32> {
    by_pieces(values.len(), LEAST, 1, |piece, y| y.copy_from_slice(&values[piece * LEAST..][..y.len()]))
}

/// A row as often as it is asked for.
pub(super) fn repeated(row: &[f32], rows: usize) -> Vec<f32> {
    by_pieces(rows * row.len(), row.len(), rows_at_once(row.len()), |_, y| y.copy_from_slice(row))
}

/// A pointer that tasks share to write disjoint parts.
pub(super) struct Shared(*mut f32);

impl Shared {
    pub(super) fn of(values: &mut [f32]) -> Self {
        Self(values.as_mut_ptr())
    }

    pub(super) fn at(&self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

// SAFETY: whoever writes through it sees to it that parts are disjoint.
unsafe impl Sync for Shared {}

/// `count` values as `write` leaves them: memory is not filled before.
///
/// # Safety
/// `write` writes every value and reads none that it has not written.
pub(super) unsafe fn written(count: usize, write: impl FnOnce(&Shared)) -> Vec<f32> {
    let mut values = Vec::with_capacity(count);
    write(&Shared(values.as_mut_ptr()));
    // SAFETY: there is room for as many, and all are written.
    unsafe { values.set_len(count) };
    values
}
