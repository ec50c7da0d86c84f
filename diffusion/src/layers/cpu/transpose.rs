use candle_core::Tensor;
use rayon::prelude::*;

use super::memory::{Shared, written};
use super::{LEAST, Values, tensor};
use crate::Result;

/// `[B, R, C]` to `[B, C, R]`, in squares that stay in the first-level cache, plus `added` of as many values.
pub(in crate::layers) fn transpose_last(x: &Tensor, added: Option<&Tensor>) -> Result<Option<Tensor>> {
    const SQUARE: usize = 32;
    let (batch, rows, columns) = x.dims3()?;
    let Some(xs) = Values::of(x).filter(|xs| !xs.is_empty()) else { return Ok(None) };
    let added = match added.filter(|added| added.elem_count() == x.elem_count()).map(Values::of) {
        Some(Some(values)) => Some(values),
        None if added.is_none() => None,
        _ => return Ok(None),
    };
    let added = added.as_deref();
    let plane = rows * columns;
    // A task writes up to SQUARE whole rows of one item's result.
    let squares = columns.div_ceil(SQUARE);
    let xs = &*xs;
    let write = |y: &Shared| {
        let tasks = (0..batch * squares).into_par_iter().with_min_len((LEAST / (SQUARE * rows)).max(1));
        tasks.for_each(|task| {
            let (item, first) = (task / squares, task % squares * SQUARE);
            let (x, y) = (&xs[item * plane..][..plane], y.at(item * plane));
            for start in (0..rows).step_by(SQUARE) {
                for column in first..(first + SQUARE).min(columns) {
                    for row in start..(start + SQUARE).min(rows) {
                        let at = column * rows + row;
                        let value = x[row * columns + column] + added.map_or(0., |added| added[item * plane + at]);
                        // SAFETY: within the item's plane, and no other task's column.
                        unsafe { y.add(at).write(value) };
                    }
                }
            }
        });
    };
    // SAFETY: every row of every column is written.
    tensor(unsafe { written(xs.len(), write) }, (batch, columns, rows)).map(Some)
}
