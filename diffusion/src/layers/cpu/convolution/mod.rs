//! 3x3 convolutions, padding 1, as products of matrices: outputs by input channels with input channels by lanes, where a lane is a
//! tile of outputs ([`winograd`]) or a single one ([`direct`]), whichever is less to do.

mod direct;
mod kernel;
mod winograd;

use std::mem::MaybeUninit;

use candle_core::Tensor;

use super::memory::{Shared, by_pieces, written};
use super::skinny::{self, WORTHWHILE};
use super::{LEAST, Values, tensor};
use crate::Result;
use direct::Direct;
pub use kernel::Kernel;

const TAPS: usize = 9;

/// A 3x3 convolution, padding 1, stride 1 or 2, with its bias, `[out]` or for each item its own `[B, out]`, and a tensor of the
/// result's shape that is to be added: `[B, in, h, w]` and `[out, in, 3, 3]` to `[B, out, ceil(h / stride), ceil(w / stride)]`.
/// `None` where the tensors are not contiguous f32 in main memory, and where they do not fit each other or hold nothing: the
/// convolution of tensors says what is wrong.
pub(in crate::layers) fn conv3x3(
    x: &Tensor,
    kernel: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    stride: usize,
) -> Result<Option<Tensor>> {
    let ((batch, inputs, height, width), outputs) = (x.dims4()?, kernel.dim(0)?);
    let shape = [batch, outputs, height.div_ceil(stride), width.div_ceil(stride)];
    let fits = kernel.dims() == [outputs, inputs, 3, 3]
        && bias.is_none_or(|bias| bias.dims() == [outputs] || bias.dims() == [batch, outputs])
        && residual.is_none_or(|residual| residual.dims() == shape);
    if !fits || x.elem_count() * outputs == 0 {
        return Ok(None);
    }
    let (Some(xs), Some(weights)) = (Values::of(x), Values::of(kernel)) else { return Ok(None) };
    let (biases, residual) = (bias.map(Values::of), residual.map(Values::of));
    if matches!(biases, Some(None)) || matches!(residual, Some(None)) {
        return Ok(None);
    }
    let (biases, residual) = (biases.flatten(), residual.flatten());
    let bias_stride = if bias.is_some_and(|bias| bias.rank() == 2) { outputs } else { 0 };
    let convolution = Convolution {
        x: &xs,
        kernel: Kernel::new(&weights, inputs),
        bias: biases.as_deref().map(|values| Bias { values, stride: bias_stride }),
        residual: residual.as_deref(),
        batch,
        inputs,
        outputs,
        height,
        width,
        stride,
    };
    tensor(convolution.compute(), &shape[..]).map(Some)
}

/// The gradient for an input of `height x width` from that of the output, `[B, out, ..]` to `[B, in, height, width]`, of a
/// convolution with the kernel `[out, in, 3, 3]`. `None` as of [`conv3x3`].
pub(in crate::layers) fn conv3x3_vjp(
    dy: &Tensor,
    kernel: &Tensor,
    stride: usize,
    (height, width): (usize, usize),
) -> Result<Option<Tensor>> {
    let ((batch, outputs, rows, columns), inputs) = (dy.dims4()?, kernel.dim(1)?);
    let fits = kernel.dims() == [outputs, inputs, 3, 3]
        && (rows, columns) == (height.div_ceil(stride), width.div_ceil(stride));
    if !fits || dy.elem_count() * inputs == 0 {
        return Ok(None);
    }
    let (Some(dys), Some(weights)) = (Values::of(dy), Values::of(kernel)) else { return Ok(None) };
    let spread;
    let x = if stride == 1 {
        &*dys
    } else {
        // As if every output had been computed and most dropped: their cotangents are zero.
        spread = spread_out(&dys, (rows, columns), (height, width), stride);
        &spread
    };
    let kernel = Kernel::adjoint(&weights, inputs);
    let (inputs, outputs) = (outputs, inputs);
    let adjoint =
        Convolution { x, kernel, bias: None, residual: None, batch, inputs, outputs, height, width, stride: 1 };
    tensor(adjoint.compute(), (batch, outputs, height, width)).map(Some)
}

/// Images of `rows x columns` to those of `height x width` that have their pixels `stride` apart and zeros between.
fn spread_out(
    images: &[f32],
    (rows, columns): (usize, usize),
    (height, width): (usize, usize),
    stride: usize,
) -> Vec<f32> {
    let plane = height * width;
    let count = images.len() / (rows * columns) * plane;
    by_pieces(count, plane, LEAST.div_ceil(plane), |image, out| {
        let image = &images[image * rows * columns..][..rows * columns];
        for (line, out) in image.chunks(columns).zip(out.chunks_mut(width).step_by(stride)) {
            out.iter_mut().step_by(stride).zip(line).for_each(|(out, value)| *out = *value);
        }
    })
}

/// What is added to every pixel of a channel.
#[derive(Clone, Copy)]
pub struct Bias<'a> {
    /// `[outputs]` or `[batch, outputs]`.
    pub values: &'a [f32],
    /// From one item to the next: 0 where all have the same.
    pub stride: usize,
}

/// `[batch, inputs, height, width]` to `[batch, outputs, ceil(height / stride), ceil(width / stride)]`, nothing of it empty.
#[derive(Clone, Copy)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Convolution<'a> {
    pub x: &'a [f32],
    pub kernel: Kernel<'a>,
    pub bias: Option<Bias<'a>>,
    /// Of the result's shape, to be added.
    pub residual: Option<&'a [f32]>,
    pub batch: usize,
    pub inputs: usize,
    pub outputs: usize,
    pub height: usize,
    pub width: usize,
    /// 1 or 2.
    pub stride: usize,
}

impl Convolution<'_> {
    fn rows(&self) -> usize {
        self.height.div_ceil(self.stride)
    }

    fn columns(&self) -> usize {
        self.width.div_ceil(self.stride)
    }

    /// The result. Panics where lengths do not fit each other.
    pub fn compute(&self) -> Vec<f32> {
        let (pixels, pairs) = (self.batch * self.rows() * self.columns(), self.inputs * self.outputs);
        assert!(
            pixels * pairs > 0 && (1..=2).contains(&self.stride),
            "an empty convolution, or stride {}",
            self.stride
        );
        assert_eq!(self.x.len(), self.batch * self.height * self.width * self.inputs, "values of images");
        assert_eq!(self.kernel.values.len(), pairs * TAPS, "values of a kernel");
        assert!(self.residual.is_none_or(|residual| residual.len() == pixels * self.outputs), "values of a residual");
        let of_bias = |bias: &Bias| bias.stride * (self.batch - 1) + self.outputs;
        assert!(self.bias.is_none_or(|bias| bias.values.len() >= of_bias(&bias)), "values of a bias");
        // Products for each pair of channels. The kernel's transform takes the time of some; less for each of many images. By one image
        // alone, so that it has the same result in whatever batch.
        let transform = if pairs * TAPS >= WORTHWHILE { 660 } else { 300 };
        let image = Self { batch: 1, ..*self };
        let tiled = winograd::ELEMENTS * winograd::tiles(&image) + transform;
        if self.stride == 1 && tiled < TAPS * image.rows() * image.columns() {
            return self.compute_by_tiles();
        }
        let weights = self.kernel.weights(self.outputs, self.inputs);
        // SAFETY: every output's pixels in all lanes are written.
        unsafe { written(pixels * self.outputs, |y| skinny::multiply(weights, &Direct { convolution: self, y })) }
    }

    /// Writes pixels of an item's output channel, from one on, with bias and residual.
    ///
    /// # Safety
    /// Nobody else uses them.
    #[inline(always)]
    unsafe fn write(&self, y: &Shared, (item, output, pixel): (usize, usize, usize), values: &[f32]) {
        let plane = self.rows() * self.columns();
        assert!(item < self.batch && output < self.outputs && pixel + values.len() <= plane);
        let at = (item * self.outputs + output) * plane + pixel;
        let bias = self.bias.map_or(0., |bias| bias.values[item * bias.stride + output]);
        // SAFETY: the caller's; they are within the plane.
        let pixels = unsafe { std::slice::from_raw_parts_mut(y.at(at).cast::<MaybeUninit<f32>>(), values.len()) };
        match self.residual {
            None => pixels.iter_mut().zip(values).for_each(|(y, value)| _ = y.write(value + bias)),
            Some(residual) => {
                let sums = values.iter().zip(&residual[at..]).map(|(value, residual)| value + bias + residual);
                pixels.iter_mut().zip(sums).for_each(|(y, sum)| _ = y.write(sum));
            }
        }
    }
}
