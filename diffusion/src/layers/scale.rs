use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use crate::Result;

/// A power of two that brings a cotangent's largest value near 1, for a backward pass in f16. The gradients of a score can be far
/// below what f16 holds (6e-8), or beyond 65504; the pass is linear, so it may run on a multiple. On CUDA it stays on the device.
pub(crate) enum GradientScale {
    /// What is computed in other dtypes is not scaled.
    One,
    /// The cotangent's largest absolute value, a scalar in f32.
    Largest(Tensor),
}

impl GradientScale {
    /// Of a backward pass in `dtype`.
    pub(crate) fn of(cotangent: &Tensor, dtype: DType) -> Result<Self> {
        if dtype != DType::F16 {
            return Ok(Self::One);
        }
        #[cfg(feature = "cuda")]
        if let Some(largest) = cuda::largest(cotangent)? {
            return Ok(Self::Largest(largest));
        }
        Ok(Self::Largest(cotangent.to_dtype(DType::F32)?.abs()?.max_all()?))
    }

    /// Waits for the device.
    pub(crate) fn value(&self) -> Result<f64> {
        let Self::Largest(largest) = self else { return Ok(1.) };
        let largest = largest.to_scalar::<f32>()?;
        // Zero and what is not finite have no such power.
        Ok(if largest.is_normal() { 2f64.powi(-largest.log2().floor().clamp(-100., 100.) as i32) } else { 1. })
    }

    /// The cotangent, scaled, in the pass's `dtype`.
    pub(crate) fn scaled(&self, cotangent: &Tensor, dtype: DType) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Self::Largest(largest) = self
            && let Some(scaled) = cuda::scale(cotangent, largest)?
        {
            return Ok(scaled);
        }
        match self {
            Self::One => Ok(cotangent.to_dtype(dtype)?),
            Self::Largest(_) => Ok((cotangent * self.value()?)?.to_dtype(dtype)?),
        }
    }

    /// A gradient of the pass, not scaled any more, in `dtype`.
    pub(crate) fn unscaled(&self, gradient: &Tensor, dtype: DType) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Self::Largest(largest) = self
            && dtype == DType::F32
            && let Some(unscaled) = cuda::unscale(gradient, largest)?
        {
            return Ok(unscaled);
        }
        match self {
            Self::One => Ok(gradient.to_dtype(dtype)?),
            Self::Largest(_) => Ok((gradient.to_dtype(dtype)? / self.value()?)?),
        }
    }
}
