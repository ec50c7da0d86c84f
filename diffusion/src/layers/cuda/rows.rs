//! Softmax of rows of any width in f32.

use candle_core::{D, DType, Device, Tensor};

use super::{Kernels, Ptx, ptx, threads_for};
use crate::Result;

pub(super) const PTX: Ptx = Ptx { name: "rows", source: ptx::ROWS };

fn takes(x: &Tensor) -> bool {
    matches!(x.device(), Device::Cuda(_)) && x.dtype() == DType::F32 && x.rank() > 0 && x.elem_count() > 0
}

/// Over the last dimension.
pub(in crate::layers) fn softmax(x: &Tensor) -> Result<Option<Tensor>> {
    if !takes(x) {
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
    if !takes(y) {
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
