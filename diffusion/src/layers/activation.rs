use candle_core::{D, Tensor};

use super::norm::statistics_dtype;
use crate::Result;

/// `x sigmoid(x)`.
pub(crate) fn silu(x: &Tensor) -> Result<Tensor> {
    Ok(x.silu()?)
}

/// `dy (s + x s (1 - s))` with `s = sigmoid(x)`.
pub(crate) fn silu_vjp(x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let s = (x.neg()?.exp()? + 1.)?.recip()?;
    let slope = (&s + ((x * &s)? * s.affine(-1., 1.)?)?)?;
    Ok((dy * slope)?)
}

/// `value * gelu(gate)` of `[.., 2 n]` = `[value | gate]`, with the exact (erf) GELU.
pub(crate) fn geglu(x: &Tensor) -> Result<Tensor> {
    let (value, gate) = halves(x)?;
    Ok((value * gate.gelu_erf()?)?)
}

/// `gelu(g) = g Phi(g)`, so `d gelu / dg = Phi(g) + g phi(g)` with the normal distribution's `Phi` and density `phi`.
pub(crate) fn geglu_vjp(x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let wide = statistics_dtype(x.dtype());
    let (value, gate) = halves(&x.to_dtype(wide)?)?;
    let dy = dy.to_dtype(wide)?;
    let cumulative = ((&gate * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.)?.affine(0.5, 0.)?;
    let density =
        ((gate.sqr()? * -0.5)?.exp()? * (0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2))?;
    let d_value = (&dy * (&gate * &cumulative)?)?;
    let d_gate = ((dy * value)? * (cumulative + (gate * density)?)?)?;
    Ok(Tensor::cat(&[d_value, d_gate], D::Minus1)?.to_dtype(x.dtype())?)
}

fn halves(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let half = x.dim(D::Minus1)? / 2;
    Ok((x.narrow(D::Minus1, 0, half)?.contiguous()?, x.narrow(D::Minus1, half, half)?.contiguous()?))
}
