use candle_core::{DType, Tensor};

use super::activation::{silu, silu_vjp};
use crate::{Result, Scope};

/// Statistics of half-precision values are computed in f32, those of f32 and f64 in their own precision.
pub(crate) fn statistics_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// Group normalisation over `[B, C, h, w]`.
pub(crate) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    pub(crate) fn load(scope: &Scope, channels: usize, groups: usize, eps: f64) -> Result<Self> {
        Ok(Self { weight: scope.tensor("weight", &[channels])?, bias: scope.tensor("bias", &[channels])?, groups, eps })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (normal, _) = self.normalize(x)?;
        Ok(self.affine(&normal, x)?.to_dtype(x.dtype())?)
    }

    /// `silu(norm(x))`.
    pub(crate) fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        let (normal, _) = self.normalize(x)?;
        Ok(silu(&self.affine(&normal, x)?)?.to_dtype(x.dtype())?)
    }

    pub(crate) fn vjp(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let (normal, inverse_deviation) = self.normalize(x)?;
        self.vjp_of_affine(x, &normal, &inverse_deviation, &dy.to_dtype(normal.dtype())?)
    }

    /// The vjp of [`Self::forward_silu`].
    pub(crate) fn vjp_silu(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let (normal, inverse_deviation) = self.normalize(x)?;
        let d = silu_vjp(&self.affine(&normal, x)?, &dy.to_dtype(normal.dtype())?)?;
        self.vjp_of_affine(x, &normal, &inverse_deviation, &d)
    }

    /// Normalised values `[B * groups, n]` and inverse deviations `[B * groups, 1]`.
    fn normalize(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let rows = x.dim(0)? * self.groups;
        normalize(&x.to_dtype(statistics_dtype(x.dtype()))?.reshape((rows, ()))?, self.eps)
    }

    fn affine(&self, normal: &Tensor, like: &Tensor) -> Result<Tensor> {
        let weight = self.weight.to_dtype(normal.dtype())?.reshape((1, (), 1, 1))?;
        let bias = self.bias.to_dtype(normal.dtype())?.reshape((1, (), 1, 1))?;
        Ok(normal.reshape(like.shape())?.broadcast_mul(&weight)?.broadcast_add(&bias)?)
    }

    fn vjp_of_affine(&self, x: &Tensor, normal: &Tensor, inverse_deviation: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let weight = self.weight.to_dtype(normal.dtype())?.reshape((1, (), 1, 1))?;
        let d = dy.broadcast_mul(&weight)?.reshape(normal.shape())?;
        Ok(normalize_vjp(normal, inverse_deviation, &d)?.reshape(x.shape())?.to_dtype(x.dtype())?)
    }
}

/// Layer normalisation over the last dimension.
pub(crate) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub(crate) fn load(scope: &Scope, width: usize, eps: f64) -> Result<Self> {
        Ok(Self { weight: scope.tensor("weight", &[width])?, bias: scope.tensor("bias", &[width])?, eps })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (normal, _) = self.normalize(x)?;
        let y = normal
            .broadcast_mul(&self.weight.to_dtype(normal.dtype())?)?
            .broadcast_add(&self.bias.to_dtype(normal.dtype())?)?;
        Ok(y.reshape(x.shape())?.to_dtype(x.dtype())?)
    }

    pub(crate) fn vjp(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let (normal, inverse_deviation) = self.normalize(x)?;
        let weight = self.weight.to_dtype(normal.dtype())?;
        let d = dy.to_dtype(normal.dtype())?.reshape(normal.shape())?.broadcast_mul(&weight)?;
        Ok(normalize_vjp(&normal, &inverse_deviation, &d)?.reshape(x.shape())?.to_dtype(x.dtype())?)
    }

    fn normalize(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        normalize(&x.to_dtype(statistics_dtype(x.dtype()))?.reshape(((), self.weight.dim(0)?))?, self.eps)
    }
}

/// Each row of `[rows, n]` to mean 0 and variance 1, and the inverse standard deviations `[rows, 1]`.
fn normalize(x: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let centred = x.broadcast_sub(&x.mean_keepdim(1)?)?;
    let inverse_deviation = (centred.sqr()?.mean_keepdim(1)? + eps)?.sqrt()?.recip()?;
    Ok((centred.broadcast_mul(&inverse_deviation)?, inverse_deviation))
}

/// `dx = (d - mean(d) - normal * mean(d * normal)) / deviation`, by rows.
fn normalize_vjp(normal: &Tensor, inverse_deviation: &Tensor, d: &Tensor) -> Result<Tensor> {
    let along = normal.broadcast_mul(&(d * normal)?.mean_keepdim(1)?)?;
    Ok((d.broadcast_sub(&d.mean_keepdim(1)?)? - along)?.broadcast_mul(inverse_deviation)?)
}
