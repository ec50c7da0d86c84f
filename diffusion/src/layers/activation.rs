use candle_core::{D, Tensor};

use super::cpu;
#[cfg(feature = "cuda")]
use super::cuda;
use super::norm::statistics_dtype;
use crate::Result;

/// `x sigmoid(x)`.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    Ok(x.silu()?)
}

/// `dy (s + x s (1 - s))` with `s = sigmoid(x)`.
pub fn silu_vjp(x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let s = (x.neg()?.exp()? + 1.)?.recip()?;
    let slope = (&s + ((x * &s)? * s.affine(-1., 1.)?)?)?;
    Ok((dy * slope)?)
}

/// `value * gelu(gate)` of `[.., 2 n]` = `[value | gate]`, with the exact (erf) GELU.
pub(crate) fn geglu(x: &Tensor) -> Result<Tensor> {
    if let Some(y) = cpu::geglu(x)? {
        return Ok(y);
    }
    #[cfg(feature = "cuda")]
    if let Some(y) = cuda::geglu(x)? {
        return Ok(y);
    }
    let (value, gate) = halves(x)?;
    Ok((value * gate.gelu_erf()?)?)
}

/// `gelu(g) = g Phi(g)`, so `d gelu / dg = Phi(g) + g phi(g)` with the normal distribution's `Phi` and density `phi`.
pub(crate) fn geglu_vjp(x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    if let Some(dx) = cpu::geglu_vjp(x, dy)? {
        return Ok(dx);
    }
    #[cfg(feature = "cuda")]
    if let Some(dx) = cuda::geglu_vjp(x, dy)? {
        return Ok(dx);
    }
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

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::layers::finite_difference::{assert_values, assert_vjp, numbers, values};

    #[test]
    fn silu_gradient() {
        let x = (values(0, (2, 3, 5)) * 3.).unwrap();
        assert_vjp("silu", &x, silu, |dy| silu_vjp(&x, dy));
    }

    /// `exp(-x)` overflows there; the slope is 0 below and 1 above.
    #[test]
    fn silu_gradient_far_from_zero() {
        let x = Tensor::new(&[-1e4f32, -200., 200., 1e4], &Device::Cpu).unwrap();
        let slope = silu_vjp(&x, &x.ones_like().unwrap()).unwrap();
        assert_eq!(slope.to_vec1::<f32>().unwrap(), [0., 0., 1., 1.]);
    }

    #[test]
    fn geglu_gradient() {
        let x = (values(0, (2, 3, 10)) * 2.).unwrap();
        assert_vjp("geglu", &x, geglu, |dy| geglu_vjp(&x, dy));
    }

    /// `gelu(sqrt(2) z) = sqrt(2) z (1 + erf(z)) / 2` with erf from Abramowitz and Stegun, table 7.1. The tanh
    /// approximation is off by up to 5e-4.
    #[test]
    fn geglu_values() {
        let erf = [(0.5, 0.5204998778), (1., 0.8427007929), (1.5, 0.9661051465), (-0.5, -0.5204998778)];
        let value = [2., -3., 0.5, 7.];
        let gate = erf.map(|(z, _)| std::f64::consts::SQRT_2 * z);
        let x = Tensor::new([value, gate].concat(), &Device::Cpu).unwrap();
        let expected: Vec<f64> = (0..4).map(|i| value[i] * gate[i] * (1. + erf[i].1) / 2.).collect();
        assert_values(&geglu(&x).unwrap(), &expected, 1e-9);
        assert_values(&geglu(&x.to_dtype(DType::F32).unwrap()).unwrap(), &expected, 1e-6);
    }

    #[test]
    fn geglu_gradient_in_half_precision_is_that_of_f64() {
        let (x, dy) = (values(0, (3, 8)), values(1, (3, 4)));
        let half = |t: &Tensor| t.to_dtype(DType::F16).unwrap();
        let found = geglu_vjp(&half(&x), &half(&dy)).unwrap();
        assert_eq!(found.dtype(), DType::F16);
        assert_values(&found, &numbers(&geglu_vjp(&x, &dy).unwrap()), 2e-3);
    }
}
