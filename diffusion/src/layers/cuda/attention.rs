//! Scaled dot-product attention, whose scores never lie in memory.

use candle_core::Tensor;
use candle_core::cuda::cudarc::driver::{DeviceRepr, LaunchConfig};

use super::{Address, Argument, EIGHT, Kernels, Ptx, alike, ptx, takes};
use crate::Result;
use crate::layers::Cotangents;
use crate::layers::cpu::AttentionSizes;

const PTX: Ptx = Ptx { name: "attention", source: ptx::ATTENTION };

/// As the kernels read it.
#[repr(C)]
struct Shape {
    queries: i32,
    keys: i32,
    heads: i32,
    width: i32,
    scale: f32,
}

// SAFETY: plain numbers, laid out as the kernels declare them.
unsafe impl DeviceRepr for Shape {}

/// The kernels for heads up to a width.
struct Kind {
    width: usize,
    /// 16-row tiles of queries to a warp in the forward pass.
    tiles: usize,
    /// Keys that pass by at a time.
    block: usize,
}

const WARPS: usize = 4;

impl Kind {
    const ALL: [Self; 5] = [
        Self { width: 16, tiles: 2, block: 64 },
        Self { width: 48, tiles: 2, block: 64 },
        Self { width: 64, tiles: 2, block: 64 },
        Self { width: 80, tiles: 1, block: 64 },
        Self { width: 160, tiles: 1, block: 32 },
    ];

    /// Bytes of a row in shared memory: an odd number of 16-byte pieces.
    fn pitch(&self) -> usize {
        ((self.width / EIGHT) | 1) * 16
    }

    fn config(&self, rows: usize, rows_at_once: usize, shared: usize, shape: &Shape, batch: usize) -> LaunchConfig {
        LaunchConfig {
            grid_dim: (rows.div_ceil(rows_at_once) as u32, shape.heads as u32, batch as u32),
            block_dim: (32 * WARPS as u32, 1, 1),
            shared_mem_bytes: shared as u32,
        }
    }
}

/// Sizes of queries, keys and values `[B, tokens, heads * width]`; `None` for what the kernels do not take.
fn sizes((q, k, v): (&Tensor, &Tensor, &Tensor), heads: usize) -> Option<(Kind, Shape)> {
    let AttentionSizes { width, queries, keys, .. } = AttentionSizes::of((q, k, v), heads)?;
    if !takes(q) || !alike(q, [k, v]) || !width.is_multiple_of(EIGHT) {
        return None;
    }
    let kind = Kind::ALL.into_iter().find(|kind| width <= kind.width)?;
    let scale = 1. / (width as f32).sqrt();
    let shape = Shape { queries: queries as i32, keys: keys as i32, heads: heads as i32, width: width as i32, scale };
    Some((kind, shape))
}

/// The result in the shape of q, and the logarithms of the softmax's sums, `[B, heads, queries]`.
pub fn attend((q, k, v): (&Tensor, &Tensor, &Tensor), heads: usize) -> Result<Option<(Tensor, Tensor)>> {
    let Some((kind, shape)) = sizes((q, k, v), heads) else { return Ok(None) };
    let [q, k, v] = [q.contiguous()?, k.contiguous()?, v.contiguous()?];
    let kernels = Kernels::of(&q);
    let (batch, queries) = (q.dim(0)?, q.dim(1)?);
    let (y, log_sums) = (kernels.output(q.shape())?, kernels.scratch((batch, heads, queries))?);
    let rows = 16 * kind.tiles * WARPS;
    let config = kind.config(queries, rows, (rows + 4 * kind.block) * kind.pitch(), &shape, batch);
    let [from_q, from_k, from_v, to, sums] = addresses(&kernels, [&q, &k, &v, &y, &log_sums])?;
    let name = format!("attend_{}", kind.width);
    // SAFETY: the arguments of the kernel; `shape` tells the tensors' sizes.
    unsafe { kernels.launch(&PTX, &name, config, &[&from_q, &from_k, &from_v, &to, &sums, &shape])? };
    Ok(Some((y, log_sums)))
}

/// The cotangents of q, and of k and v if wanted, from that of the result.
pub fn attend_vjp(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    (y, log_sums): (&Tensor, &Tensor),
    dy: &Tensor,
    heads: usize,
    of_keys: bool,
) -> Result<Option<Cotangents<Tensor>>> {
    let fits = dy.dims() == q.dims() && y.dims() == q.dims() && alike(q, [y, dy]);
    let Some((kind, shape)) = sizes((q, k, v), heads).filter(|_| fits) else { return Ok(None) };
    let [q, k, v, dy] = [q.contiguous()?, k.contiguous()?, v.contiguous()?, dy.contiguous()?];
    let kernels = Kernels::of(&q);
    let (batch, queries, keys) = (q.dim(0)?, q.dim(1)?, k.dim(1)?);
    let dots = kernels.scratch(log_sums.shape())?;
    let dq = kernels.output(q.shape())?;
    let from = addresses(&kernels, [&q, &k, &v, y, &dy, log_sums, &dots, &dq])?;
    let [from_q, from_k, from_v, from_y, d, sums, dots_at, to_q] = from;
    let shared = (2 * 16 * WARPS + 4 * kind.block) * kind.pitch() + 4 * kind.block * size_of::<f32>();
    let launch = |side: &str, tokens: usize, arguments: [&dyn Argument; 9]| {
        let config = kind.config(tokens, 16 * WARPS, shared, &shape, batch);
        let name = format!("attend_vjp_{side}_{}", kind.width);
        // SAFETY: the arguments of the kernel; `shape` tells the tensors' sizes.
        unsafe { kernels.launch(&PTX, &name, config, &arguments) }
    };
    launch("queries", queries, [&from_q, &from_k, &from_v, &from_y, &d, &sums, &dots_at, &to_q, &shape])?;
    let mut kv = None;
    if of_keys {
        let (dk, dv) = (kernels.output(k.shape())?, kernels.output(v.shape())?);
        let [to_k, to_v] = addresses(&kernels, [&dk, &dv])?;
        launch("keys", keys, [&from_q, &from_k, &from_v, &d, &sums, &dots_at, &to_k, &to_v, &shape])?;
        kv = Some((dk, dv));
    }
    Ok(Some(Cotangents { q: dq, kv }))
}

fn addresses<const N: usize>(kernels: &Kernels, tensors: [&Tensor; N]) -> Result<[Address; N]> {
    let mut found = [0; N];
    for (address, tensor) in found.iter_mut().zip(tensors) {
        *address = kernels.address(tensor)?;
    }
    Ok(found)
}
