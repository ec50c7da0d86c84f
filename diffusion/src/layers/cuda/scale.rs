//! Cotangents of f16 by a power of two that brings the largest near 1, which stays on the device.

use candle_core::{DType, Tensor};

use super::{Kernels, Ptx, alike, ptx, takes_wide, threads_for};
use crate::Result;

const PTX: Ptx = Ptx { name: "scale", source: ptx::SCALE };

/// The largest absolute value, a scalar.
pub(in crate::layers) fn largest(x: &Tensor) -> Result<Option<Tensor>> {
    if !takes_wide(x) || x.elem_count() == 0 {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let kernels = Kernels::of(&x);
    let most = Tensor::zeros((), DType::F32, x.device())?;
    let (from, to, count) = (kernels.address(&x)?, kernels.address(&most)?, x.elem_count() as i64);
    let mut config = threads_for(x.elem_count());
    // Few enough that what they all write to is not waited for.
    config.grid_dim.0 = config.grid_dim.0.min(132);
    // SAFETY: the arguments of the kernel, whose threads go over all values together.
    unsafe { kernels.launch(&PTX, "largest", config, &[&from, &to, &count])? };
    Ok(Some(most))
}

/// `x` in f32 times the power for `largest`, in f16.
pub(in crate::layers) fn scale(x: &Tensor, largest: &Tensor) -> Result<Option<Tensor>> {
    if !takes_wide(x) || x.elem_count() == 0 || !alike(x, [largest]) {
        return Ok(None);
    }
    between(x, largest, "scale", DType::F16).map(Some)
}

/// `x` in f16 divided by that power, in f32.
pub(in crate::layers) fn unscale(x: &Tensor, largest: &Tensor) -> Result<Option<Tensor>> {
    if x.dtype() != DType::F16
        || x.elem_count() == 0
        || !takes_wide(largest)
        || !x.device().same_device(largest.device())
    {
        return Ok(None);
    }
    between(x, largest, "unscale", DType::F32).map(Some)
}

fn between(x: &Tensor, largest: &Tensor, name: &str, dtype: DType) -> Result<Tensor> {
    let x = x.contiguous()?;
    let (of_x, of_y) = (Kernels::of(&x), Kernels { dtype, ..Kernels::of(&x) });
    let y = of_y.output(x.shape())?;
    let (from, most, to) = (of_x.address(&x)?, Kernels::of(largest).address(largest)?, of_y.address(&y)?);
    let (kernels, count) = (Kernels { dtype: DType::F16, ..of_x }, x.elem_count() as i64);
    // SAFETY: the arguments of the kernel, a thread to a value.
    unsafe { kernels.launch(&PTX, name, threads_for(x.elem_count()), &[&from, &most, &to, &count])? };
    Ok(y)
}
