use candle_core::Tensor;
use rayon::prelude::*;

use super::{LEAST, Values, tensor};
use crate::Result;

/// `[B, R, C]` to `[B, C, R]`, in squares that stay in the first-level cache.
pub(in crate::layers) fn transpose_last(x: &Tensor) -> Result<Option<Tensor>> {
    const SQUARE: usize = 32;
    let (batch, rows, columns) = x.dims3()?;
    let Some(xs) = Values::of(x) else { return Ok(None) };
    let mut y = vec![0f32; xs.len()];
    let plane = rows * columns;
    y.par_chunks_mut(plane).zip(xs.par_chunks(plane)).for_each(|(y, x)| {
        // A task writes up to SQUARE whole rows of the result.
        let tasks = y.par_chunks_mut(SQUARE * rows).enumerate().with_min_len((LEAST / (SQUARE * rows)).max(1));
        tasks.for_each(|(index, y)| {
            for start in (0..rows).step_by(SQUARE) {
                let end = (start + SQUARE).min(rows);
                for (column, y) in (index * SQUARE..).zip(y.chunks_mut(rows)) {
                    for row in start..end {
                        y[row] = x[row * columns + column];
                    }
                }
            }
        });
    });
    tensor(y, (batch, columns, rows)).map(Some)
}
