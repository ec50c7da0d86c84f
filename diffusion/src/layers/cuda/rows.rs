//! Rows of any width in f32, for operations that candle's autograd follows as one: what is given to such an operation are
//! storages, and to its gradient tensors.

use candle_core::backend::BackendStorage;
use candle_core::cuda::CudaStorage;
use candle_core::{D, DType, Layout, Tensor};

use super::{Argument, Kernels, Ptx, ptx, threads_for};
use crate::{Error, Result};

const PTX: Ptx = Ptx { name: "rows", source: ptx::ROWS };

/// A contiguous f32 tensor on CUDA as an operation of candle's is given it.
pub type Rows<'a> = (&'a CudaStorage, &'a Layout);

fn rows_and_width(layout: &Layout) -> Result<(i64, i32)> {
    let width = *layout.dims().last().ok_or_else(|| Error::Input("rows of a scalar".into()))?;
    Ok(((layout.shape().elem_count() / width.max(1)) as i64, width as i32))
}

/// `[rows, in]` to `[rows, out]` by a weight `[out, in]` and a bias `[out]`.
pub fn linear(x: Rows, weight: Rows, bias: Rows) -> Result<CudaStorage> {
    let ((rows, inputs), outputs) = (x.1.shape().dims2()?, weight.1.shape().dims2()?.0);
    let product = x.0.matmul(weight.0, (1, rows, outputs, inputs), x.1, &weight.1.transpose(0, 1)?)?;
    let kernels = Kernels { device: &x.0.device, dtype: DType::F32 };
    let layout = Layout::contiguous((rows, outputs));
    let y = kernels.storage(layout.shape())?;
    let (from, to) = (kernels.address_in(&product, &layout)?, kernels.address_in(&y, &layout)?);
    let (bias, count, width) = (kernels.address_in(bias.0, bias.1)?, rows as i64, outputs as i32);
    // SAFETY: the arguments of the kernel, a thread to a value.
    unsafe { kernels.launch(&PTX, "add_row", threads_for(rows * outputs), &[&from, &bias, &to, &count, &width])? };
    Ok(y)
}

/// Layer norm of each row.
pub fn layer_norm_rows(x: Rows, weight: Rows, bias: Rows, eps: f64) -> Result<CudaStorage> {
    let kernels = Kernels { device: &x.0.device, dtype: DType::F32 };
    let y = kernels.storage(x.1.shape())?;
    let ((rows, width), eps) = (rows_and_width(x.1)?, eps as f32);
    let (from, to) = (kernels.address_in(x.0, x.1)?, kernels.address_in(&y, &Layout::contiguous(x.1.shape()))?);
    let (weight, bias) = (kernels.address_in(weight.0, weight.1)?, kernels.address_in(bias.0, bias.1)?);
    let arguments: [&dyn Argument; 7] = [&from, &weight, &bias, &to, &rows, &width, &eps];
    // SAFETY: the arguments of the kernel, a warp to a row.
    unsafe { kernels.launch(&PTX, "layer_norm_rows", threads_for(32 * rows as usize), &arguments)? };
    Ok(y)
}

/// The gradient of [`layer_norm_rows`] for `x`.
pub fn layer_norm_rows_vjp(x: &Tensor, dy: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let [x, dy, weight] = [x.contiguous()?, dy.contiguous()?, weight.contiguous()?];
    let kernels = Kernels::of(&x);
    let dx = kernels.scratch(x.shape())?;
    let ((rows, width), eps) = (rows_and_width(x.layout())?, eps as f32);
    let (from, d) = (kernels.address(&x)?, kernels.address(&dy)?);
    let (weight, to) = (kernels.address(&weight)?, kernels.address(&dx)?);
    let arguments: [&dyn Argument; 7] = [&from, &d, &weight, &to, &rows, &width, &eps];
    // SAFETY: the arguments of the kernel, a warp to a row.
    unsafe { kernels.launch(&PTX, "layer_norm_rows_vjp", threads_for(32 * rows as usize), &arguments)? };
    Ok(dx)
}

/// Softmax of each row.
pub fn softmax_rows(x: Rows) -> Result<CudaStorage> {
    let kernels = Kernels { device: &x.0.device, dtype: DType::F32 };
    let y = kernels.storage(x.1.shape())?;
    let (rows, width) = rows_and_width(x.1)?;
    let (from, to) = (kernels.address_in(x.0, x.1)?, kernels.address_in(&y, &Layout::contiguous(x.1.shape()))?);
    let config = threads_for(32 * rows as usize);
    // SAFETY: the arguments of the kernel, a warp to a row.
    unsafe { kernels.launch(&PTX, "softmax_rows", config, &[&from, &to, &rows, &width])? };
    Ok(y)
}

/// The gradient of [`softmax_rows`] from its result.
pub fn softmax_rows_vjp(y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let [y, dy] = [y.contiguous()?, dy.contiguous()?];
    let kernels = Kernels::of(&y);
    let dx = kernels.scratch(y.shape())?;
    let (rows, width) = ((y.elem_count() / y.dim(D::Minus1)?.max(1)) as i64, y.dim(D::Minus1)? as i32);
    let (from, d, to) = (kernels.address(&y)?, kernels.address(&dy)?, kernels.address(&dx)?);
    let config = threads_for(32 * rows as usize);
    // SAFETY: the arguments of the kernel, a warp to a row.
    unsafe { kernels.launch(&PTX, "softmax_rows_vjp", config, &[&from, &d, &to, &rows, &width])? };
    Ok(dx)
}
