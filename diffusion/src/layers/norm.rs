use candle_core::{DType, Tensor};

use super::activation::{silu, silu_vjp};
use super::cpu;
#[cfg(feature = "cuda")]
use super::cuda;
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
        if let Some(y) = cpu::group_norm(x, self.parameters(), self.groups, false)? {
            return Ok(y);
        }
        #[cfg(feature = "cuda")]
        if let Some(y) = cuda::group_norm(x, self.parameters(), self.groups, false)? {
            return Ok(y);
        }
        let (normal, _) = self.normalize(x)?;
        Ok(self.affine(&normal, x)?.to_dtype(x.dtype())?)
    }

    /// `silu(norm(x))`.
    pub(crate) fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(y) = cpu::group_norm(x, self.parameters(), self.groups, true)? {
            return Ok(y);
        }
        #[cfg(feature = "cuda")]
        if let Some(y) = cuda::group_norm(x, self.parameters(), self.groups, true)? {
            return Ok(y);
        }
        let (normal, _) = self.normalize(x)?;
        Ok(silu(&self.affine(&normal, x)?)?.to_dtype(x.dtype())?)
    }

    /// `before` plus the gradient for `x` of [`Self::forward`].
    pub(crate) fn vjp_onto(&self, before: &Tensor, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        self.vjp_by(x, dy, false, Some(before))
    }

    /// The gradient for `x` of [`Self::forward_silu`].
    pub(crate) fn vjp_silu(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        self.vjp_by(x, dy, true, None)
    }

    /// `before + vjp_silu(x, dy)`.
    pub(crate) fn vjp_silu_onto(&self, before: &Tensor, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        self.vjp_by(x, dy, true, Some(before))
    }

    fn vjp_by(&self, x: &Tensor, dy: &Tensor, silu: bool, before: Option<&Tensor>) -> Result<Tensor> {
        if let Some(dx) = cpu::group_norm_vjp(x, dy, self.parameters(), self.groups, silu, before)? {
            return Ok(dx);
        }
        #[cfg(feature = "cuda")]
        if let Some(dx) = cuda::group_norm_vjp(x, dy, self.parameters(), self.groups, silu, before)? {
            return Ok(dx);
        }
        let (normal, inverse_deviation) = self.normalize(x)?;
        let mut d = dy.to_dtype(normal.dtype())?;
        if silu {
            d = silu_vjp(&self.affine(&normal, x)?, &d)?;
        }
        let dx = self.vjp_of_affine(x, &normal, &inverse_deviation, &d)?;
        Ok(match before {
            Some(before) => (before + dx)?,
            None => dx,
        })
    }

    fn parameters(&self) -> cpu::Affine<'_> {
        cpu::Affine { weight: &self.weight, bias: &self.bias, eps: self.eps }
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
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Of weight and bias `[n]`.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self { weight, bias, eps }
    }

    pub(crate) fn load(scope: &Scope, width: usize, eps: f64) -> Result<Self> {
        Ok(Self { weight: scope.tensor("weight", &[width])?, bias: scope.tensor("bias", &[width])?, eps })
    }

    /// `[.., n]` to the same.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(y) = cpu::layer_norm(x, self.parameters())? {
            return Ok(y);
        }
        #[cfg(feature = "cuda")]
        if let Some(y) = cuda::layer_norm(x, self.parameters())? {
            return Ok(y);
        }
        let (normal, _) = self.normalize(x)?;
        let y = normal
            .broadcast_mul(&self.weight.to_dtype(normal.dtype())?)?
            .broadcast_add(&self.bias.to_dtype(normal.dtype())?)?;
        Ok(y.reshape(x.shape())?.to_dtype(x.dtype())?)
    }

    /// The gradient for `x` of [`Self::forward`].
    pub fn vjp(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        self.vjp_by(x, dy, None)
    }

    /// `before` plus the gradient for `x` of [`Self::forward`].
    pub fn vjp_onto(&self, before: &Tensor, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        self.vjp_by(x, dy, Some(before))
    }

    fn vjp_by(&self, x: &Tensor, dy: &Tensor, before: Option<&Tensor>) -> Result<Tensor> {
        if let Some(dx) = cpu::layer_norm_vjp(x, dy, self.parameters(), before)? {
            return Ok(dx);
        }
        #[cfg(feature = "cuda")]
        if let Some(dx) = cuda::layer_norm_vjp(x, dy, self.parameters(), before)? {
            return Ok(dx);
        }
        let (normal, inverse_deviation) = self.normalize(x)?;
        let weight = self.weight.to_dtype(normal.dtype())?;
        let d = dy.to_dtype(normal.dtype())?.reshape(normal.shape())?.broadcast_mul(&weight)?;
        let dx = normalize_vjp(&normal, &inverse_deviation, &d)?.reshape(x.shape())?.to_dtype(x.dtype())?;
        Ok(match before {
            Some(before) => (before + dx)?,
            None => dx,
        })
    }

    /// The gradients for weight and bias, for those who train them.
    pub fn parameters_vjp(&self, x: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
        if let Some(found) = cpu::layer_norm_parameters_vjp(x, dy, self.parameters())? {
            return Ok(found);
        }
        let (normal, _) = self.normalize(x)?;
        let dy = dy.to_dtype(normal.dtype())?.reshape(normal.shape())?;
        // Sums over rows as products: candle's own sum goes element by element.
        let ones = Tensor::ones((1, dy.dim(0)?), dy.dtype(), dy.device())?;
        let over_rows = |t: &Tensor| Ok::<_, crate::Error>(ones.matmul(t)?.squeeze(0)?.to_dtype(x.dtype())?);
        Ok((over_rows(&(normal * &dy)?)?, over_rows(&dy)?))
    }

    fn parameters(&self) -> cpu::Affine<'_> {
        cpu::Affine { weight: &self.weight, bias: &self.bias, eps: self.eps }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::finite_difference::{assert_values, assert_vjp, numbers, values, weights};

    /// Large, so that an epsilon in the wrong place shows.
    const EPS: f64 = 0.3;

    fn group_norm(dtype: DType) -> GroupNorm {
        let file = weights(&[("weight", &[6]), ("bias", &[6])]);
        let norm = GroupNorm::load(&file.root(), 6, 3, EPS).unwrap();
        let (weight, bias) = (norm.weight.to_dtype(dtype).unwrap(), norm.bias.to_dtype(dtype).unwrap());
        GroupNorm { weight, bias, ..norm }
    }

    fn layer_norm() -> LayerNorm {
        let file = weights(&[("weight", &[6]), ("bias", &[6])]);
        LayerNorm::load(&file.root(), 6, EPS).unwrap()
    }

    /// Rows of `n` values: mean and biased variance of each, then weight and bias by `channel(index)`.
    fn by_definition(
        x: &Tensor,
        n: usize,
        weight: &Tensor,
        bias: &Tensor,
        channel: impl Fn(usize) -> usize,
    ) -> Vec<f64> {
        let (x, weight, bias) = (numbers(x), numbers(weight), numbers(bias));
        let mut y = Vec::new();
        for row in x.chunks(n) {
            let mean = row.iter().sum::<f64>() / n as f64;
            let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
            for v in row {
                let c = channel(y.len());
                y.push((v - mean) / (variance + EPS).sqrt() * weight[c] + bias[c]);
            }
        }
        y
    }

    #[test]
    fn group_norm_is_the_definition() {
        let (norm, x) = (group_norm(DType::F64), values(0, (2, 6, 3, 5)));
        let expected = by_definition(&x, 2 * 15, &norm.weight, &norm.bias, |i| i / 15 % 6);
        assert_values(&norm.forward(&x).unwrap(), &expected, 1e-14);
        let silu: Vec<f64> = expected.iter().map(|v| v / (1. + (-v).exp())).collect();
        assert_values(&norm.forward_silu(&x).unwrap(), &silu, 1e-14);
    }

    #[test]
    fn layer_norm_is_the_definition() {
        let (norm, x) = (layer_norm(), values(0, (2, 5, 6)));
        assert_values(&norm.forward(&x).unwrap(), &by_definition(&x, 6, &norm.weight, &norm.bias, |i| i % 6), 1e-14);
    }

    #[test]
    fn gradients() {
        let (norm, x) = (group_norm(DType::F64), values(0, (2, 6, 3, 5)));
        let zeros = x.zeros_like().unwrap();
        assert_vjp("group norm", &x, |x| norm.forward(x), |dy| norm.vjp_onto(&zeros, &x, dy));
        assert_vjp("group norm and SiLU", &x, |x| norm.forward_silu(x), |dy| norm.vjp_silu(&x, dy));
        let (before, dy) = (values(1, x.shape()), values(2, x.shape()));
        let sum = |dx: Tensor| numbers(&(&before + dx).unwrap());
        assert_values(&norm.vjp_onto(&before, &x, &dy).unwrap(), &sum(norm.vjp_onto(&zeros, &x, &dy).unwrap()), 0.);
        assert_values(&norm.vjp_silu_onto(&before, &x, &dy).unwrap(), &sum(norm.vjp_silu(&x, &dy).unwrap()), 0.);
        let (norm, x) = (layer_norm(), values(0, (2, 5, 6)));
        assert_vjp("layer norm", &x, |x| norm.forward(x), |dy| norm.vjp(&x, dy));
        let (before, dy) = (values(1, x.shape()), values(2, x.shape()));
        let sum = (&before + norm.vjp(&x, &dy).unwrap()).unwrap();
        assert_values(&norm.vjp_onto(&before, &x, &dy).unwrap(), &numbers(&sum), 0.);
        let with = |weight: &Tensor, bias: &Tensor| LayerNorm::new(weight.clone(), bias.clone(), EPS).forward(&x);
        let (weight, bias) = (&norm.weight, &norm.bias);
        assert_vjp("weight", weight, |weight| with(weight, bias), |dy| Ok(norm.parameters_vjp(&x, dy)?.0));
        assert_vjp("bias", bias, |bias| with(weight, bias), |dy| Ok(norm.parameters_vjp(&x, dy)?.1));
    }

    /// Squares and sums of such values are beyond f16's 65504.
    #[test]
    fn half_precision_has_statistics_in_f32() {
        let norm = group_norm(DType::F16);
        let x = (values(0, (2, 6, 3, 5)) * 4e4).unwrap().to_dtype(DType::F16).unwrap();
        let expected = by_definition(&x, 2 * 15, &norm.weight, &norm.bias, |i| i / 15 % 6);
        let y = norm.forward(&x).unwrap();
        assert_eq!(y.dtype(), DType::F16);
        assert_values(&y, &expected, 1e-3);
    }

    /// The variance is that of the centred values: `E[x^2] - E[x]^2` would have lost every digit.
    #[test]
    fn a_large_mean_costs_no_precision() {
        let norm = group_norm(DType::F32);
        let x = (values(0, (2, 6, 3, 5)) + 3e4).unwrap().to_dtype(DType::F32).unwrap();
        let expected = by_definition(&x, 2 * 15, &norm.weight, &norm.bias, |i| i / 15 % 6);
        assert_values(&norm.forward(&x).unwrap(), &expected, 2e-2);
    }
}
