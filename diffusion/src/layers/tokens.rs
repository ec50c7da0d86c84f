use candle_core::Tensor;

use super::cpu;
#[cfg(feature = "cuda")]
use super::cuda;
use crate::Result;

/// `[B, C, h, w]` to `[B, h w, C]`.
pub(crate) fn to_tokens(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::takes(x) {
        return Ok(cuda::channels_last(x)?.flatten(1, 2)?);
    }
    let channels = x.flatten_from(2)?;
    match cpu::transpose_last(&channels, None)? {
        Some(tokens) => Ok(tokens),
        None => Ok(channels.transpose(1, 2)?.contiguous()?),
    }
}

/// `[B, h w, C]` to the shape of `like`.
pub(crate) fn to_image(x: &Tensor, like: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::takes(x) {
        return as_image(x, like);
    }
    let channels = match cpu::transpose_last(x, None)? {
        Some(channels) => channels,
        None => x.transpose(1, 2)?.contiguous()?,
    };
    Ok(channels.reshape(like.shape())?)
}

/// `[B, h w, C]` as the image that it is in memory.
#[cfg(feature = "cuda")]
fn as_image(x: &Tensor, like: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = like.dims4()?;
    cuda::channels_first(&x.reshape((b, h, w, c))?)
}

/// `residual + to_image(x, residual)`.
pub(crate) fn to_image_onto(residual: &Tensor, x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(sum) = cuda::add(x, None, Some(&to_tokens(residual)?))? {
        return as_image(&sum, residual);
    }
    match cpu::transpose_last(x, Some(residual))? {
        Some(sum) => Ok(sum.reshape(residual.shape())?),
        None => Ok((residual + to_image(x, residual)?)?),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::layers::finite_difference::{numbers, values};

    /// Sizes around the squares that the transposition goes by.
    #[test]
    fn there_and_back_in_either_precision() {
        for (c, h, w) in [(1, 1, 1), (3, 5, 7), (32, 8, 8), (70, 3, 31)] {
            let x = values(0, (2, c, h, w));
            let single = x.to_dtype(DType::F32).unwrap();
            let (wide, tokens) = (to_tokens(&x).unwrap(), to_tokens(&single).unwrap());
            assert_eq!(tokens.dims(), [2, h * w, c]);
            assert_eq!(numbers(&tokens), numbers(&wide.to_dtype(DType::F32).unwrap()));
            assert_eq!(numbers(&to_image(&tokens, &single).unwrap()), numbers(&single));
            let residual = values(1, x.shape());
            let sum = (&residual + &x).unwrap();
            assert_eq!(numbers(&to_image_onto(&residual, &wide).unwrap()), numbers(&sum));
            let residual = residual.to_dtype(DType::F32).unwrap();
            let sum = (&residual + &single).unwrap();
            assert_eq!(numbers(&to_image_onto(&residual, &tokens).unwrap()), numbers(&sum));
        }
    }
}
