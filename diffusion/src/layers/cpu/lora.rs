use candle_core::Tensor;
use rayon::prelude::*;

use super::product::{Before, Matrix, product};
use super::{Values, tensor};
use crate::Result;

/// Rows that a task takes: its part of the inputs stays in the cache between the four products.
const ROWS: usize = 256;

/// What `y = x (up down)^T` passes to its factors `down` `[rank, in]` and `up` `[out, rank]`, from rows `x` `[n, in]` and
/// cotangents `dy` `[n, out]`: `(dy up)^T x` and `dy^T (x down^T)`. `None` where the tensors are not contiguous f32 in main
/// memory.
pub(crate) fn lora_vjp(x: &Tensor, dy: &Tensor, down: &Tensor, up: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
    let ((rank, inputs), (outputs, up_rank)) = (down.dims2()?, up.dims2()?);
    let rows = x.dim(0)?;
    if x.dims() != [rows, inputs]
        || dy.dims() != [rows, outputs]
        || rank != up_rank
        || rows * rank * inputs * outputs == 0
    {
        // The products of tensors say what does not fit.
        return Ok(None);
    }
    let all = (Values::of(x), Values::of(dy), Values::of(down), Values::of(up));
    let (Some(xs), Some(dys), Some(downs), Some(ups)) = all else { return Ok(None) };
    let (down_matrix, up_matrix) = (Matrix::new(&downs, inputs), Matrix::new(&ups, rank));
    let part = |(x, dy): (&[f32], &[f32])| {
        let (x, dy) = (Matrix::new(x, inputs), Matrix::new(dy, outputs));
        let multiplied = |count: usize, a: Matrix, b: Matrix| {
            let mut y = vec![0f32; count];
            product(&mut y, Before::Replaced, 1., a, b);
            y
        };
        let of_block = x.rows() * rank;
        let narrow = multiplied(of_block, x, down_matrix.t());
        let narrow_dy = multiplied(of_block, dy, up_matrix);
        let d_down = multiplied(rank * inputs, Matrix::new(&narrow_dy, rank).t(), x);
        let d_up = multiplied(outputs * rank, dy.t(), Matrix::new(&narrow, rank));
        (d_down, d_up)
    };
    let blocks = xs.par_chunks(ROWS * inputs).zip(dys.par_chunks(ROWS * outputs));
    let parts: Vec<_> = blocks.map(part).collect();
    // In the order of the rows, so that the sums do not depend on which thread was faster.
    let mut sums = (vec![0f32; rank * inputs], vec![0f32; outputs * rank]);
    for (d_down, d_up) in parts {
        sums.0.iter_mut().zip(d_down).for_each(|(sum, v)| *sum += v);
        sums.1.iter_mut().zip(d_up).for_each(|(sum, v)| *sum += v);
    }
    Ok(Some((tensor(sums.0, (rank, inputs))?, tensor(sums.1, (outputs, rank))?)))
}
