use std::sync::OnceLock;

use candle_core::{D, Tensor};

use super::cpu;
#[cfg(feature = "cuda")]
use super::cuda;
use crate::{Result, Scope};

/// A 3x3 convolution, padding 1, stride 1 or 2.
pub(crate) struct Conv2d {
    pub(super) kernel: Tensor,
    bias: Tensor,
    stride: usize,
    /// What the input gradient convolves with, where no kernel of the CPU takes it as it is; made at the first `vjp`, because most
    /// convolutions never need one.
    adjoint: OnceLock<Vec<Tensor>>,
    /// The kernel as those on CUDA read it, where they take it.
    #[cfg(feature = "cuda")]
    packed: Option<cuda::Kernel>,
}

impl Conv2d {
    pub(crate) fn load(scope: &Scope, inputs: usize, outputs: usize, stride: usize) -> Result<Self> {
        assert!(stride == 1 || stride == 2, "stride {stride}");
        let kernel = scope.tensor("weight", &[outputs, inputs, 3, 3])?;
        #[cfg(feature = "cuda")]
        let (kernel, packed) = Self::pack(scope, kernel)?;
        Ok(Self {
            kernel,
            bias: scope.tensor("bias", &[outputs])?,
            stride,
            adjoint: OnceLock::new(),
            #[cfg(feature = "cuda")]
            packed,
        })
    }

    /// Where the kernels on CUDA take the weights, these are in memory once, as they read them.
    #[cfg(feature = "cuda")]
    fn pack(scope: &Scope, kernel: Tensor) -> Result<(Tensor, Option<cuda::Kernel>)> {
        let Some(packed) = cuda::Kernel::new(&kernel)? else { return Ok((kernel, None)) };
        let kernel = match packed.unpacked()? {
            Some(view) => {
                scope.keep_instead("weight", &view);
                view
            }
            None => kernel,
        };
        Ok((kernel, Some(packed)))
    }

    /// `[B, in, h, w]` to `[B, out, ceil(h / stride), ceil(w / stride)]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_by(x, &self.bias, None)
    }

    /// `forward(x)` and a shift `[B, out]` of every channel of each item.
    pub(crate) fn forward_shifted(&self, x: &Tensor, shift: &Tensor) -> Result<Tensor> {
        self.forward_by(x, &shift.broadcast_add(&self.bias)?, None)
    }

    /// `residual + forward(x)`.
    pub(crate) fn forward_onto(&self, residual: &Tensor, x: &Tensor) -> Result<Tensor> {
        self.forward_by(x, &self.bias, Some(residual))
    }

    fn forward_by(&self, x: &Tensor, bias: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(kernel) = &self.packed {
            let size = (x.dim(2)?.div_ceil(self.stride), x.dim(3)?.div_ceil(self.stride));
            return cuda::conv3x3(x, kernel, (Some(bias), residual), (self.stride, 1), size);
        }
        let x = x.contiguous()?;
        if let Some(y) = cpu::conv3x3(&x, &self.kernel, Some(bias), residual, self.stride)? {
            return Ok(y);
        }
        let y = add_bias(x.conv2d(&self.kernel, 1, self.stride, 1, 1)?, bias)?;
        Ok(match residual {
            Some(residual) => (residual + y)?,
            None => y,
        })
    }

    /// Without the symmetric padding: the input is padded by one row below and one column to the right, as the VAE's
    /// downsampling does.
    pub(crate) fn forward_padded_end(&self, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(kernel) = &self.packed {
            let size = ((x.dim(2)? - 2) / self.stride + 1, (x.dim(3)? - 2) / self.stride + 1);
            return cuda::conv3x3(x, kernel, (Some(&self.bias), None), (self.stride, 0), size);
        }
        let x = x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?;
        add_bias(x.conv2d(&self.kernel, 0, self.stride, 1, 1)?, &self.bias)
    }

    /// The gradient for an input of `height x width` from that of the output, `[B, out, ..]` to `[B, in, height, width]`.
    pub(crate) fn vjp(&self, dy: &Tensor, (height, width): (usize, usize)) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(kernel) = &self.packed {
            return cuda::conv3x3_vjp(dy, kernel, self.stride, (height, width));
        }
        let dy = dy.contiguous()?;
        if let Some(dx) = cpu::conv3x3_vjp(&dy, &self.kernel, self.stride, (height, width))? {
            return Ok(dx);
        }
        if self.adjoint.get().is_none() {
            let kernels = if self.stride == 1 { vec![adjoint(&self.kernel)?] } else { phases(&self.kernel)? };
            // Losing a race only means that the other thread's equal kernels are kept.
            let _ = self.adjoint.set(kernels);
        }
        let kernels = self.adjoint.get().expect("set above");
        match &kernels[..] {
            [flipped] => Ok(dy.conv2d(flipped, 1, 1, 1, 1)?),
            phases => strided_vjp(&dy, phases, height, width),
        }
    }
}

/// `[out]`, or `[B, out]` for each item its own, to every pixel.
fn add_bias(y: Tensor, bias: &Tensor) -> Result<Tensor> {
    Ok(y.broadcast_add(&bias.reshape(((), y.dim(1)?, 1, 1))?)?)
}

/// The kernel of the adjoint convolution: flipped in space, input and output channels exchanged.
fn adjoint(kernel: &Tensor) -> Result<Tensor> {
    Ok(taps(&taps(kernel, 2, &[2, 1, 0])?, 3, &[2, 1, 0])?.transpose(0, 1)?.contiguous()?)
}

/// Some of the taps along a dimension. candle's own ways to choose would upload their indices, in the middle of a pass.
fn taps(kernel: &Tensor, dim: usize, order: &[usize]) -> Result<Tensor> {
    let parts = order.iter().map(|tap| Ok(kernel.narrow(dim, *tap, 1)?)).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&parts, dim)?)
}

/// With stride 2, `y[o] = sum_k w[k] x[2 o + k - 1]`, so an even input position `2 i` is seen by tap 1 of output `i` alone,
/// and an odd one `2 i + 1` by tap 2 of `i` and tap 0 of `i + 1`. The gradient falls apart into four small stride-1
/// convolutions, one per phase of (row, column), that together cost what the forward pass costs.
fn phases(kernel: &Tensor) -> Result<Vec<Tensor>> {
    let flipped = adjoint(kernel)?; // taps in the order 2, 1, 0
    let [even, odd]: [&[usize]; 2] = [&[1], &[0, 2]];
    let phase = |(rows, columns)| Ok(taps(&taps(&flipped, 2, rows)?, 3, columns)?.contiguous()?);
    [(even, even), (even, odd), (odd, even), (odd, odd)].into_iter().map(phase).collect()
}

fn strided_vjp(dy: &Tensor, phases: &[Tensor], height: usize, width: usize) -> Result<Tensor> {
    let (b, _, h, w) = dy.dims4()?;
    // One more row and column of zeros: the odd phase of the last output looks at output i + 1.
    let padded = dy.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?;
    let phase = |row: usize, column: usize| -> Result<Tensor> {
        let seen = padded.narrow(2, 0, h + row)?.narrow(3, 0, w + column)?.contiguous()?;
        Ok(seen.conv2d(&phases[2 * row + column], 0, 1, 1, 1)?)
    };
    let rows = [0, 1].map(|row| -> Result<Tensor> { Ok(Tensor::stack(&[phase(row, 0)?, phase(row, 1)?], D::Minus1)?) });
    let [even, odd] = rows;
    // [B, in, h, 2, w, 2]: phases interleaved; an odd size drops the phase beyond its end.
    let dx = Tensor::stack(&[even?, odd?], 3)?.reshape((b, (), 2 * h, 2 * w))?;
    Ok(dx.narrow(2, 0, height)?.narrow(3, 0, width)?.contiguous()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::finite_difference::{assert_values, assert_vjp, numbers, values, weights};

    const SIZES: [(usize, usize); 7] = [(6, 4), (5, 7), (4, 7), (7, 2), (1, 1), (2, 1), (1, 6)];

    fn conv(inputs: usize, outputs: usize, stride: usize) -> Conv2d {
        let file = weights(&[("weight", &[outputs, inputs, 3, 3]), ("bias", &[outputs])]);
        Conv2d::load(&file.root(), inputs, outputs, stride).unwrap()
    }

    /// `y[o, i, j] = b[o] + sum w[o, c, u, v] x[c, stride i + u - before, stride j + v - before]`, zero outside.
    fn by_definition(conv: &Conv2d, x: &Tensor, before: usize, (rows, columns): (usize, usize)) -> Vec<f64> {
        let (batch, inputs, height, width) = x.dims4().unwrap();
        let outputs = conv.kernel.dim(0).unwrap();
        let (x, w, b) = (numbers(x), numbers(&conv.kernel), numbers(&conv.bias));
        let mut y = Vec::new();
        for (n, o) in (0..batch).flat_map(|n| (0..outputs).map(move |o| (n, o))) {
            for (i, j) in (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))) {
                let mut sum = b[o];
                for (c, tap) in (0..inputs).flat_map(|c| (0..9).map(move |tap| (c, tap))) {
                    let (row, column) = (conv.stride * i + tap / 3, conv.stride * j + tap % 3);
                    let inside = (before..before + height).contains(&row) && (before..before + width).contains(&column);
                    if inside {
                        let at = ((n * inputs + c) * height + row - before) * width + column - before;
                        sum += w[(o * inputs + c) * 9 + tap] * x[at];
                    }
                }
                y.push(sum);
            }
        }
        y
    }

    #[test]
    fn forward_is_the_definition() {
        for stride in [1, 2] {
            let conv = conv(3, 2, stride);
            for (h, w) in SIZES {
                let x = values(0, (2, 3, h, w));
                let size = (h.div_ceil(stride), w.div_ceil(stride));
                let y = conv.forward(&x).unwrap();
                assert_eq!(y.dims(), [2, 2, size.0, size.1]);
                assert_values(&y, &by_definition(&conv, &x, 1, size), 1e-14);
            }
        }
    }

    #[test]
    fn padding_at_the_end_only() {
        let conv = conv(3, 2, 2);
        for (h, w) in [(6, 4), (5, 7), (2, 3)] {
            let x = values(0, (2, 3, h, w));
            let y = conv.forward_padded_end(&x).unwrap();
            assert_eq!(y.dims(), [2, 2, h / 2, w / 2]);
            assert_values(&y, &by_definition(&conv, &x, 0, (h / 2, w / 2)), 1e-14);
        }
    }

    #[test]
    fn input_gradient() {
        for stride in [1, 2] {
            let conv = conv(3, 2, stride);
            for (h, w) in SIZES {
                let x = values(0, (2, 3, h, w));
                let what = format!("stride {stride}, {h}x{w}");
                assert_vjp(&what, &x, |x| conv.forward(x), |dy| conv.vjp(dy, (h, w)));
            }
        }
    }
}
