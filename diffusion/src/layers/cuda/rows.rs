//! Softmax of rows of any width in f32.

use candle_core::{D, Tensor};

use super::{Kernels, Ptx, alike, ptx, takes_wide, threads_for};
use crate::Result;

pub(super) const PTX: Ptx = Ptx { name: "rows", source: ptx::ROWS };

/// Over the last dimension.
pub(in crate::layers) fn softmax(x: &Tensor) -> Result<Option<Tensor>> {
    if !takes_wide(x) || x.rank() == 0 || x.elem_count() == 0 {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let kernels = Kernels::of(&x);
    let y = kernels.output(x.shape())?;
    let (from, to, width) = (kernels.address(&x)?, kernels.address(&y)?, x.dim(D::Minus1)?);
    let rows = x.elem_count() / width;
    let config = threads_for(32 * rows);
    // SAFETY: the arguments of the kernel, a warp to a row.
    unsafe { kernels.launch(&PTX, "softmax_rows", config, &[&from, &to, &(rows as i64), &(width as i32)])? };
    Ok(Some(y))
}

/// The gradient for [`softmax`]'s input from its result and that one's cotangent.
pub(in crate::layers) fn softmax_vjp(y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
    if !takes_wide(y) || y.rank() == 0 || y.elem_count() == 0 || dy.dims() != y.dims() || !alike(y, [dy]) {
        return Ok(None);
    }
    let [y, dy] = [y.contiguous()?, dy.contiguous()?];
    let kernels = Kernels::of(&y);
    let dx = kernels.output(y.shape())?;
    let (from, d, to, width) = (kernels.address(&y)?, kernels.address(&dy)?, kernels.address(&dx)?, y.dim(D::Minus1)?);
    let rows = y.elem_count() / width;
    let config = threads_for(32 * rows);
    // SAFETY: the arguments of the kernel, a warp to a row.
    unsafe { kernels.launch(&PTX, "softmax_rows_vjp", config, &[&from, &d, &to, &(rows as i64), &(width as i32)])? };
    Ok(Some(dx))
}
