//! What is done with images `[B, C, h, w]` between layers.

use candle_core::Tensor;

#[cfg(feature = "cuda")]
use super::cuda;
use crate::Result;

/// Two images one after the other along the channels.
pub(crate) fn cat_channels(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(both) = cuda::cat_channels(a, b)? {
        return Ok(both);
    }
    Ok(Tensor::cat(&[a, b], 1)?)
}

/// The channels `start .. start + len`.
pub(crate) fn narrow_channels(x: &Tensor, start: usize, len: usize) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(part) = cuda::narrow_channels(x, start, len)? {
        return Ok(part);
    }
    Ok(x.narrow(1, start, len)?.contiguous()?)
}

/// The sum of two images of one shape.
pub(crate) fn add_images(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::takes(a)
        && let Some(sum) = cuda::add(&cuda::channels_last(a)?, None, Some(&cuda::channels_last(b)?))?
    {
        return cuda::channels_first(&sum);
    }
    Ok((a + b)?)
}
