use candle_core::Tensor;

#[cfg(feature = "cuda")]
use super::cuda;
use crate::Result;

/// Nearest-neighbour doubling of `[B, C, h, w]` to a target of `2 h` or `2 h - 1` rows (columns likewise): an odd target
/// belongs to a skip connection of odd size, where diffusers interpolates to that size. Its source index
/// `floor(i h / (2 h - 1))` equals `floor(i / 2)`, so the odd size is the doubled image without its last row.
pub(crate) fn upsample_nearest(x: &Tensor, (height, width): (usize, usize)) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    if height.div_ceil(2) != h || width.div_ceil(2) != w {
        return Err(crate::Error::Input(format!("cannot upsample {h}x{w} to {height}x{width}")));
    }
    #[cfg(feature = "cuda")]
    if let Some(y) = cuda::upsample(x, (height, width))? {
        return Ok(y);
    }
    let doubled = x.reshape((b, c, h, 1, w, 1))?.broadcast_as((b, c, h, 2, w, 2))?.contiguous()?;
    let doubled = doubled.reshape((b, c, 2 * h, 2 * w))?;
    Ok(doubled.narrow(2, 0, height)?.narrow(3, 0, width)?.contiguous()?)
}

/// Sums the up to four copies of each input value.
pub(crate) fn upsample_nearest_vjp(dy: &Tensor) -> Result<Tensor> {
    let (b, c, height, width) = dy.dims4()?;
    let (h, w) = (height.div_ceil(2), width.div_ceil(2));
    #[cfg(feature = "cuda")]
    if let Some(dx) = cuda::upsample_vjp(dy, (h, w))? {
        return Ok(dx);
    }
    let dy = dy.pad_with_zeros(2, 0, 2 * h - height)?.pad_with_zeros(3, 0, 2 * w - width)?;
    Ok(dy.contiguous()?.reshape((b, c, h, 2, w, 2))?.sum(5)?.sum(3)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::finite_difference::{assert_values, assert_vjp, numbers, values};

    /// Input size and target, even and odd.
    const SIZES: [((usize, usize), (usize, usize)); 6] =
        [((3, 2), (6, 4)), ((3, 2), (5, 4)), ((3, 2), (6, 3)), ((4, 7), (7, 13)), ((1, 1), (1, 1)), ((1, 1), (2, 1))];

    /// PyTorch's nearest interpolation to a size: output `i` is input `floor(i in / out)`.
    #[test]
    fn forward_is_nearest_interpolation() {
        for ((h, w), (height, width)) in SIZES {
            let x = values(0, (2, 3, h, w));
            let xs = numbers(&x);
            let source = |i: usize| {
                let (image, row, column) = (i / (height * width), i / width % height, i % width);
                xs[(image * h + row * h / height) * w + column * w / width]
            };
            let y = upsample_nearest(&x, (height, width)).unwrap();
            assert_eq!(y.dims(), [2, 3, height, width]);
            assert_values(&y, &(0..6 * height * width).map(source).collect::<Vec<_>>(), 0.);
        }
    }

    #[test]
    fn gradient() {
        for ((h, w), size) in SIZES {
            let x = values(0, (2, 3, h, w));
            assert_vjp(&format!("{h}x{w} to {size:?}"), &x, |x| upsample_nearest(x, size), upsample_nearest_vjp);
        }
    }

    #[test]
    fn other_sizes_are_refused() {
        for size in [(7, 4), (6, 5), (4, 4), (3, 2), (0, 4)] {
            let message = upsample_nearest(&values(0, (1, 1, 3, 2)), size).unwrap_err().to_string();
            assert_eq!(message, format!("cannot upsample 3x2 to {}x{}", size.0, size.1));
        }
    }
}
