//! What lies between products, each in one pass over memory.

use candle_core::{D, DType, Tensor};

use super::{EIGHT, Kernels, Ptx, alike, channels_first, channels_last, of_rows, ptx, takes, threads_for};
use crate::Result;

const PTX: Ptx = Ptx { name: "pointwise", source: ptx::POINTWISE };

/// Whether the kernels take a tensor with rows of this width.
fn takes_rows(x: &Tensor, width: usize) -> bool {
    takes(x) && width.is_multiple_of(EIGHT) && x.elem_count() > 0
}

/// `x + bias + residual`, the bias along the last dimension; either may be absent.
pub(in crate::layers) fn add(x: &Tensor, bias: Option<&Tensor>, residual: Option<&Tensor>) -> Result<Option<Tensor>> {
    let fits = alike(x, bias.into_iter().chain(residual))
        && bias.is_none_or(|bias| bias.rank() == 1 && bias.dims().last() == x.dims().last())
        && residual.is_none_or(|residual| residual.dims() == x.dims());
    let Some(ptx) = of_rows(x, &PTX)?.filter(|_| fits) else { return Ok(None) };
    let (x, width) = (x.contiguous()?, x.dim(D::Minus1)?);
    let residual = residual.map(Tensor::contiguous).transpose()?;
    let kernels = Kernels::of(&x);
    let y = kernels.output(x.shape())?;
    let (from, to) = (kernels.address(&x)?, kernels.address(&y)?);
    let (bias, residual) = (kernels.optional(bias)?, kernels.optional(residual.as_ref())?);
    let (count, width) = (x.elem_count() as i64, width as i32);
    let config = threads_for(if x.dtype() == DType::F32 { x.elem_count() } else { x.elem_count() / EIGHT });
    // SAFETY: the arguments of the kernel, a thread to eight values, to one in f32.
    unsafe { kernels.launch(ptx, "add_bias", config, &[&from, &bias, &residual, &to, &count, &width])? };
    Ok(Some(y))
}

/// `value * gelu(gate)` of `[.., 2 n]` = `[value | gate]`.
pub fn geglu(x: &Tensor) -> Result<Option<Tensor>> {
    let width = x.dim(D::Minus1)? / 2;
    if !takes_rows(x, width) {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let kernels = Kernels::of(&x);
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("it has a last dimension") = width;
    let y = kernels.output(shape)?;
    let (from, to, count) = (kernels.address(&x)?, kernels.address(&y)?, y.elem_count() as i64);
    // SAFETY: the arguments of the kernel, a thread to eight values.
    unsafe {
        kernels.launch(&PTX, "geglu", threads_for(y.elem_count() / EIGHT), &[&from, &to, &count, &(width as i32)])?
    };
    Ok(Some(y))
}

/// The gradient for the input of [`geglu`].
pub fn geglu_vjp(x: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
    let width = x.dim(D::Minus1)? / 2;
    if !takes_rows(x, width) {
        return Ok(None);
    }
    let (x, dy) = (x.contiguous()?, dy.contiguous()?);
    let kernels = Kernels::of(&x);
    let dx = kernels.output(x.shape())?;
    let (from, d, to) = (kernels.address(&x)?, kernels.address(&dy)?, kernels.address(&dx)?);
    let (count, width) = (dy.elem_count() as i64, width as i32);
    let config = threads_for(dy.elem_count() / EIGHT);
    // SAFETY: the arguments of the kernel, a thread to eight values.
    unsafe { kernels.launch(&PTX, "geglu_vjp", config, &[&from, &d, &to, &count, &width])? };
    Ok(Some(dx))
}

/// Nearest-neighbour doubling of `[B, C, h, w]` to a size of twice as much, or one less.
pub(in crate::layers) fn upsample(x: &Tensor, size: (usize, usize)) -> Result<Option<Tensor>> {
    let from = (x.dim(2)?, x.dim(3)?);
    resample(x, "upsample", size, from, size)
}

/// The gradient for an input of `[B, C, h, w]` of [`upsample`].
pub(in crate::layers) fn upsample_vjp(dy: &Tensor, size: (usize, usize)) -> Result<Option<Tensor>> {
    let to = (dy.dim(2)?, dy.dim(3)?);
    resample(dy, "upsample_vjp", size, size, to)
}

/// `output` is the size of what is written, `small` and `large` are the two sizes.
fn resample(
    x: &Tensor,
    name: &str,
    output: (usize, usize),
    small: (usize, usize),
    large: (usize, usize),
) -> Result<Option<Tensor>> {
    let (batch, channels, ..) = x.dims4()?;
    if !takes_rows(x, channels) {
        return Ok(None);
    }
    let x = channels_last(x)?;
    let kernels = Kernels::of(&x);
    let y = kernels.output((batch, output.0, output.1, channels))?;
    let (from, to, count) = (kernels.address(&x)?, kernels.address(&y)?, y.elem_count() as i64);
    let [h, w, height, width, channels] = [small.0, small.1, large.0, large.1, channels].map(|size| size as i32);
    let arguments: [&dyn super::Argument; 8] = [&from, &to, &count, &h, &w, &height, &width, &channels];
    // SAFETY: the arguments of the kernel, a thread to eight values.
    unsafe { kernels.launch(&PTX, name, threads_for(y.elem_count() / EIGHT), &arguments)? };
    Ok(Some(channels_first(&y)?))
}

/// Two images `[B, C, h, w]` one after the other along the channels.
pub(in crate::layers) fn cat_channels(a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
    let [first, second] = [a.dim(1)?, b.dim(1)?];
    if !takes_rows(a, first) || !takes_rows(b, second) {
        return Ok(None);
    }
    let [a, b] = [channels_last(a)?, channels_last(b)?];
    let (batch, h, w, _) = a.dims4()?;
    let y = Kernels::of(&a).output((batch, h, w, first + second))?;
    copy_columns(&a, (0, first), &y, 0)?;
    copy_columns(&b, (0, second), &y, first)?;
    Ok(Some(channels_first(&y)?))
}

/// The channels `start .. start + len` of an image `[B, C, h, w]`.
pub(in crate::layers) fn narrow_channels(x: &Tensor, start: usize, len: usize) -> Result<Option<Tensor>> {
    if !takes_rows(x, x.dim(1)?) || !start.is_multiple_of(EIGHT) || !len.is_multiple_of(EIGHT) {
        return Ok(None);
    }
    let x = channels_last(x)?;
    let (batch, h, w, _) = x.dims4()?;
    let y = Kernels::of(&x).output((batch, h, w, len))?;
    copy_columns(&x, (start, len), &y, 0)?;
    Ok(Some(channels_first(&y)?))
}

/// The columns `first .. first + columns` of `x` to those of `y` from `to` on; rows are along the last dimension.
fn copy_columns(x: &Tensor, (first, columns): (usize, usize), y: &Tensor, to: usize) -> Result<()> {
    let kernels = Kernels::of(x);
    let [from_width, to_width] = [x.dim(D::Minus1)?, y.dim(D::Minus1)?];
    assert!(first + columns <= from_width && to + columns <= to_width, "columns that are there");
    let rows = x.elem_count() / from_width;
    let (from, to_address, count) = (kernels.address(x)?, kernels.address(y)?, rows as i64);
    let [columns_, from_width, first, to_width, to] =
        [columns, from_width, first, to_width, to].map(|size| (size / EIGHT) as i32);
    let arguments: [&dyn super::Argument; 8] =
        [&from, &to_address, &count, &columns_, &from_width, &first, &to_width, &to];
    // SAFETY: the arguments of the kernel, a thread to eight values.
    unsafe { kernels.launch(&PTX, "copy_columns", threads_for(rows * columns / EIGHT), &arguments) }
}
