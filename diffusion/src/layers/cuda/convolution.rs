//! 3x3 convolutions and their input gradients.

use candle_core::cuda::cudarc::driver::{DeviceRepr, LaunchConfig};
use candle_core::{DType, Tensor};

use super::{EIGHT, Kernels, Ptx, channels_first, channels_last, ptx, takes, threads_for};
use crate::{Error, Result};

const PTX: Ptx = Ptx { name: "convolution", source: ptx::CONVOLUTION };
/// Of the contraction, a step's share.
const DEPTH: usize = 64;
const STAGES: usize = 3;

/// As the kernels read it.
#[repr(C)]
struct Shape {
    batch: i32,
    from: [i32; 3],
    to: [i32; 3],
    weights: [i32; 2],
    stride: i32,
    padding: i32,
    bias_stride: i32,
    splits: i32,
}

// SAFETY: plain numbers, laid out as the kernels declare them.
unsafe impl DeviceRepr for Shape {}

/// The weights of a convolution as the kernels read them: `[9, outputs, inputs]`, filled up with zeros to multiples of eight.
pub struct Kernel {
    packed: Tensor,
    outputs: usize,
    inputs: usize,
}

impl Kernel {
    /// `[outputs, inputs, 3, 3]`; `None` for what the kernels do not take.
    pub fn new(weight: &Tensor) -> Result<Option<Self>> {
        if !takes(weight) {
            return Ok(None);
        }
        let (outputs, inputs, ..) = weight.dims4()?;
        let packed = weight.reshape((outputs, inputs, 9))?.permute((2, 0, 1))?;
        Ok(Some(Self { packed: fill_up(&fill_up(&packed, 1)?, 2)?.contiguous()?, outputs, inputs }))
    }

    /// The weights `[outputs, inputs, 3, 3]` as a view of the packed ones; `None` where these were filled up.
    pub(in crate::layers) fn unpacked(&self) -> Result<Option<Tensor>> {
        let Self { packed, outputs, inputs } = self;
        if packed.dims() != [9, *outputs, *inputs] {
            return Ok(None);
        }
        Ok(Some(packed.reshape((3, 3, *outputs, *inputs))?.permute((2, 3, 0, 1))?))
    }
}

/// Zeros after the last along a dimension, to a multiple of eight.
fn fill_up(x: &Tensor, dim: usize) -> Result<Tensor> {
    let size = x.dim(dim)?;
    Ok(x.pad_with_zeros(dim, 0, size.next_multiple_of(EIGHT) - size)?)
}

/// What is added to every pixel of an image: `[outputs]`, or `[B, outputs]` for each image its own.
fn bias_stride(bias: Option<&Tensor>) -> usize {
    bias.filter(|bias| bias.rank() == 2).map_or(0, |bias| bias.dims()[1])
}

/// `[B, inputs, h, w]` to `[B, outputs, ..size]`, plus bias, plus residual. `padding` is that above and to the left; below and to
/// the right there is as much as `size` asks for.
pub fn conv3x3(
    x: &Tensor,
    kernel: &Kernel,
    (bias, residual): (Option<&Tensor>, Option<&Tensor>),
    (stride, padding): (usize, usize),
    size: (usize, usize),
) -> Result<Tensor> {
    let residual = residual.map(channels_last).transpose()?;
    let bias = bias.map(|bias| bias.contiguous()).transpose()?;
    convolve(x, kernel, (bias.as_ref(), residual.as_ref()), (stride, padding), size, false)
}

/// `[B, outputs, h, w]` to `[B, inputs, ..size]`: the input gradient of [`conv3x3`] with padding 1.
pub fn conv3x3_vjp(dy: &Tensor, kernel: &Kernel, stride: usize, size: (usize, usize)) -> Result<Tensor> {
    convolve(dy, kernel, (None, None), (stride, 1), size, true)
}

fn convolve(
    x: &Tensor,
    kernel: &Kernel,
    (bias, residual): (Option<&Tensor>, Option<&Tensor>),
    (stride, padding): (usize, usize),
    (height, width): (usize, usize),
    adjoint: bool,
) -> Result<Tensor> {
    assert!(stride == 1 || stride == 2, "a stride of {stride}");
    let x = fill_up(&channels_last(x)?, 3)?.contiguous()?;
    let (batch, h, w, channels) = x.dims4()?;
    let wanted = if adjoint { kernel.inputs } else { kernel.outputs };
    // Two channels are written together. The weights are filled up with zeros as it is.
    let outputs = wanted.next_multiple_of(2);
    let even = |t: &Tensor| t.pad_with_zeros(t.rank() - 1, 0, outputs - wanted);
    let (bias, residual) = (bias.map(even).transpose()?, residual.map(even).transpose()?);
    let (bias, residual) = (bias.as_ref(), residual.as_ref());
    // The kernels count in 32 bits.
    let largest = x.elem_count().max(batch * height * width * outputs);
    if i32::try_from(largest).is_err() {
        let message =
            format!("a convolution of {largest} values on CUDA, at most {}: take fewer images at once", i32::MAX);
        return Err(Error::Unsupported(message));
    }
    let (_, weight_rows, weight_columns) = kernel.packed.dims3()?;
    let kernels = Kernels::of(&x);
    let y = kernels.output((batch, height, width, outputs))?;
    let rows = batch * height * width;
    let Plan { size, tile, splits } = Plan::of(rows, outputs, 9 * channels.div_ceil(DEPTH));
    let shape = Shape {
        batch: batch as i32,
        from: [h as i32, w as i32, channels as i32],
        to: [height as i32, width as i32, outputs as i32],
        weights: [weight_rows as i32, weight_columns as i32],
        stride: stride as i32,
        padding: padding as i32,
        bias_stride: bias_stride(bias) as i32,
        splits: splits as i32,
    };
    let count = y.elem_count();
    let partial = (splits > 1).then(|| kernels.scratch((splits, count))).transpose()?;
    let (bias, residual) = (kernels.optional(bias)?, kernels.optional(residual)?);
    let to = kernels.address(&y)?;
    let partial = kernels.optional(partial.as_ref())?;
    let config = LaunchConfig {
        grid_dim: (rows.div_ceil(tile) as u32, outputs.div_ceil(tile) as u32, splits as u32),
        block_dim: (128, 1, 1),
        shared_mem_bytes: (STAGES * 2 * tile * DEPTH * DType::F16.size_in_bytes()) as u32,
    };
    let name = format!("convolution_{}{size}", if adjoint { "adjoint_" } else { "" });
    let (from, weights) = (kernels.address(&x)?, kernels.address(&kernel.packed)?);
    // SAFETY: the arguments of the kernel; `shape` tells the tensors' sizes, of which `x` and the weights have channels in
    // multiples of eight.
    unsafe {
        kernels.launch(&PTX, &name, config, &[&from, &weights, &bias, &residual, &to, &partial, &shape])?;
        if splits > 1 {
            let arguments: [&dyn super::Argument; 5] = [&partial, &bias, &residual, &to, &shape];
            kernels.launch(&PTX, "convolution_sum", threads_for(count), &arguments)?;
        }
    }
    Ok(channels_first(&y)?.narrow(1, 0, wanted)?)
}

/// How a convolution is cut into blocks.
struct Plan {
    size: &'static str,
    /// Pixels and channels of a block.
    tile: usize,
    /// Of the contraction, where there are too few blocks for the device.
    splits: usize,
}

impl Plan {
    /// The quickest by what was measured on an H200 with 132 multiprocessors: a step of a full wave of large blocks is the unit.
    fn of(rows: usize, columns: usize, steps: usize) -> Self {
        const MULTIPROCESSORS: f64 = 132.;
        let cost = |size, tile: usize, at_once: f64, step: f64, splits: usize| {
            let blocks = (rows.div_ceil(tile) * columns.div_ceil(tile) * splits) as f64;
            let waves = blocks / (at_once * MULTIPROCESSORS);
            // A wave that leaves multiprocessors half empty is quicker, but not twice as quick.
            let last = match waves.fract() * at_once {
                0. => 0.,
                share => 0.45 + 0.55 * (share.ceil() - 1.) / (at_once - 1.),
            };
            let sum = if splits > 1 { 2. + (splits * rows * columns) as f64 * 1.1e-6 } else { 0. };
            let time = (waves.floor() + last) * step * (steps as f64 / splits as f64 + 4.) + sum;
            (time, Self { size, tile, splits })
        };
        (1..=steps.div_ceil(4).min(16))
            .flat_map(|splits| [cost("large", 128, 2., 1., splits), cost("small", 64, 4., 0.58, splits)])
            .min_by(|a, b| a.0.total_cmp(&b.0))
            .expect("at least one split")
            .1
    }
}
