//! Group norm, with or without SiLU, and layer norm.

use candle_core::cuda::cudarc::driver::{DeviceRepr, LaunchConfig};
use candle_core::{D, Tensor};

use super::{EIGHT, Kernels, Ptx, alike, channels_first, channels_last, of_rows, ptx, takes, threads_for};
use crate::Result;
use crate::layers::cpu::Affine;

const PTX: Ptx = Ptx { name: "norm", source: ptx::NORM };

/// As the kernels read it.
#[repr(C)]
struct Groups {
    pixels: i32,
    channels: i32,
    groups: i32,
    slices: i32,
    eps: f32,
    silu: i32,
}

// SAFETY: plain numbers, laid out as the kernels declare them.
unsafe impl DeviceRepr for Groups {}

/// About as many blocks as keep a large device busy.
const BLOCKS: usize = 1024;

/// `[B, C, h, w]`, normalised by group; `silu` of it where asked for.
pub fn group_norm(x: &Tensor, affine: Affine, groups: usize, silu: bool) -> Result<Option<Tensor>> {
    if !takes(x) || !x.dim(1)?.is_multiple_of(EIGHT) || x.elem_count() == 0 {
        return Ok(None);
    }
    let pass = Pass::new(x, affine.eps, groups, silu)?;
    let kernels = Kernels::of(&pass.x);
    let y = kernels.output(pass.x.shape())?;
    let (weight, bias) = (kernels.address(affine.weight)?, kernels.address(affine.bias)?);
    let (from, sums, to) = (kernels.address(&pass.x)?, kernels.address(&pass.sums)?, kernels.address(&y)?);
    // SAFETY: the arguments of the kernel; `Groups` tells the tensors' sizes.
    unsafe { kernels.launch(&PTX, "group_norm", pass.apply(), &[&from, &weight, &bias, &sums, &to, &pass.sizes])? };
    Ok(Some(channels_first(&y)?))
}

/// `before` plus the gradient for `x` of [`group_norm`].
pub fn group_norm_vjp(
    x: &Tensor,
    dy: &Tensor,
    affine: Affine,
    groups: usize,
    silu: bool,
    before: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    if !takes(x) || !x.dim(1)?.is_multiple_of(EIGHT) || x.elem_count() == 0 {
        return Ok(None);
    }
    let pass = Pass::new(x, affine.eps, groups, silu)?;
    let (dy, before) = (channels_last(dy)?, before.map(channels_last).transpose()?);
    let kernels = Kernels::of(&pass.x);
    let (dx, vjp_sums) = (kernels.output(pass.x.shape())?, kernels.scratch(pass.sums.shape())?);
    let (weight, bias) = (kernels.address(affine.weight)?, kernels.address(affine.bias)?);
    let (from, sums, d) = (kernels.address(&pass.x)?, kernels.address(&pass.sums)?, kernels.address(&dy)?);
    let (before, vjp_sums, to) =
        (kernels.optional(before.as_ref())?, kernels.address(&vjp_sums)?, kernels.address(&dx)?);
    let of_sums: [&dyn super::Argument; 7] = [&from, &d, &weight, &bias, &sums, &vjp_sums, &pass.sizes];
    let of_apply: [&dyn super::Argument; 9] = [&from, &d, &before, &weight, &bias, &sums, &vjp_sums, &to, &pass.sizes];
    // SAFETY: the arguments of the kernels; `Groups` tells the tensors' sizes.
    unsafe {
        kernels.launch(&PTX, "group_vjp_sums", pass.sum(), &of_sums)?;
        kernels.launch(&PTX, "group_norm_vjp", pass.apply(), &of_apply)?;
    }
    Ok(Some(channels_first(&dx)?))
}

/// An image with the sums of its groups.
struct Pass {
    x: Tensor,
    sizes: Groups,
    batch: usize,
    /// `[B, groups, slices, 2]`.
    sums: Tensor,
}

impl Pass {
    fn new(x: &Tensor, eps: f64, groups: usize, silu: bool) -> Result<Self> {
        let x = channels_last(x)?;
        let (batch, h, w, channels) = x.dims4()?;
        let slices = (h * w * channels / groups / 512).min(BLOCKS / (batch * groups)).max(1);
        let sizes = Groups {
            pixels: (h * w) as i32,
            channels: channels as i32,
            groups: groups as i32,
            slices: slices as i32,
            eps: eps as f32,
            silu: silu.into(),
        };
        let sums = Kernels::of(&x).scratch((batch, groups, slices, 2))?;
        let pass = Self { x, sizes, batch, sums };
        let kernels = Kernels::of(&pass.x);
        let (from, to) = (kernels.address(&pass.x)?, kernels.address(&pass.sums)?);
        // SAFETY: the arguments of the kernel; `Groups` tells the tensors' sizes.
        unsafe { kernels.launch(&PTX, "group_sums", pass.sum(), &[&from, &to, &pass.sizes])? };
        Ok(pass)
    }

    fn sum(&self) -> LaunchConfig {
        let Groups { groups, slices, .. } = self.sizes;
        let grid_dim = (slices as u32, groups as u32, self.batch as u32);
        LaunchConfig { grid_dim, block_dim: (256, 1, 1), shared_mem_bytes: 0 }
    }

    fn apply(&self) -> LaunchConfig {
        let eights = self.x.elem_count() / self.batch / EIGHT;
        let blocks = eights.div_ceil(256).min((BLOCKS / self.batch).max(1));
        let shared = self.sizes.groups as usize * size_of::<[f32; 4]>();
        LaunchConfig {
            grid_dim: (blocks as u32, self.batch as u32, 1),
            block_dim: (256, 1, 1),
            shared_mem_bytes: shared as u32,
        }
    }
}

/// Whether there is a weight and a bias for each value of a row.
fn fits(x: &Tensor, affine: Affine) -> bool {
    let Affine { weight, bias, .. } = affine;
    let width = x.dims().last();
    alike(x, [weight, bias]) && [weight, bias].iter().all(|t| t.rank() == 1 && t.dims().last() == width)
}

/// Over the last dimension.
pub(in crate::layers) fn layer_norm(x: &Tensor, affine: Affine) -> Result<Option<Tensor>> {
    let Some(ptx) = of_rows(x, &PTX)?.filter(|_| fits(x, affine)) else { return Ok(None) };
    let (x, width) = (x.contiguous()?, x.dim(D::Minus1)?);
    let kernels = Kernels::of(&x);
    let y = kernels.output(x.shape())?;
    let (from, to) = (kernels.address(&x)?, kernels.address(&y)?);
    let (weight, bias) = (kernels.address(affine.weight)?, kernels.address(affine.bias)?);
    let rows = x.elem_count() / width;
    let (count, width, eps) = (rows as i64, width as i32, affine.eps as f32);
    let arguments: [&dyn super::Argument; 7] = [&from, &weight, &bias, &to, &count, &width, &eps];
    // SAFETY: the arguments of the kernel, a warp to a row.
    unsafe { kernels.launch(ptx, "layer_norm", threads_for(32 * rows), &arguments)? };
    Ok(Some(y))
}

/// The gradient for `x` of [`layer_norm`], plus `before`.
pub(in crate::layers) fn layer_norm_vjp(
    x: &Tensor,
    dy: &Tensor,
    affine: Affine,
    before: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let taken = fits(x, affine) && alike(x, before.into_iter().chain([dy]));
    let taken = taken && before.into_iter().chain([dy]).all(|t| t.dims() == x.dims());
    let Some(ptx) = of_rows(x, &PTX)?.filter(|_| taken) else { return Ok(None) };
    let ([x, dy], width) = ([x.contiguous()?, dy.contiguous()?], x.dim(D::Minus1)?);
    let before = before.map(Tensor::contiguous).transpose()?;
    let kernels = Kernels::of(&x);
    let dx = kernels.output(x.shape())?;
    let (from, d, before) = (kernels.address(&x)?, kernels.address(&dy)?, kernels.optional(before.as_ref())?);
    let (weight, to) = (kernels.address(affine.weight)?, kernels.address(&dx)?);
    let rows = x.elem_count() / width;
    let (count, width, eps) = (rows as i64, width as i32, affine.eps as f32);
    let arguments: [&dyn super::Argument; 8] = [&from, &d, &before, &weight, &to, &count, &width, &eps];
    // SAFETY: the arguments of the kernel, a warp to a row.
    unsafe { kernels.launch(ptx, "layer_norm_vjp", threads_for(32 * rows), &arguments)? };
    Ok(Some(dx))
}
