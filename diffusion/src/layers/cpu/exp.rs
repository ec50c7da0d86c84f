/// `e^x` to within 2 units in the last place, of operations that the compiler turns into vectors; about 1e-38 far below,
/// about 2e38 far above. `e^x = 2^n e^r` with |r| <= ln 2 / 2 and a polynomial for `e^r` (Cephes' `expf`).
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, the first exact in few bits, so that n times it is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Rounds to the nearest integer by adding and taking away 1.5 * 2^23.
    const MAGIC: f32 = 12_582_912.;
    // 2^-126 to 2^127: the powers of two that are f32.
    let x = x.clamp(-87.3, 88.);
    let shifted = x * LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_6e-1;
    p = p * r + 5e-1;
    p = p * r * r + r + 1.;
    // The shifted number's low bits are n; a cast would ask for NaN first.
    let exponent = shifted.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_add(127);
    p * f32::from_bits(exponent << 23)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1. / (1. + exp(-x))
}

/// The normal distribution's density and cumulative function: `phi(x)`, `Phi(x)`, the latter to within 1.5e-7 (Abramowitz and
/// Stegun 7.1.26).
#[inline(always)]
pub(super) fn normal(x: f32) -> (f32, f32) {
    const ROOT_HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;
    const ROOT_2_PI: f32 = 2.506_628_3;
    let z = (x * ROOT_HALF).abs();
    let t = 1. / (1. + 0.327_591_1 * z);
    let gauss = exp(-z * z);
    let p = ((((1.061_405_4 * t - 1.453_152) * t + 1.421_413_8) * t - 0.284_496_74) * t + 0.254_829_6) * t;
    let tail = 0.5 * p * gauss;
    (gauss / ROOT_2_PI, if x < 0. { tail } else { 1. - tail })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_the_real_one() {
        for i in -8700..8800 {
            let x = i as f32 / 100.;
            let expected = f64::from(x).exp();
            assert!((f64::from(exp(x)) / expected - 1.).abs() < 2.5e-7, "{x}: {} is not {expected}", exp(x));
        }
        assert!(exp(-1e9) < 2e-38 && exp(1e9) > 1.6e38 && exp(f32::NAN).is_nan());
        assert_eq!((exp(0.), sigmoid(0.)), (1., 0.5));
    }

    /// Table 26.1 of Abramowitz and Stegun.
    #[test]
    fn normal_distribution() {
        for (x, density, cumulative) in
            [(0f32, 0.398_942_3, 0.5), (1., 0.241_970_7, 0.841_344_7), (2.5, 0.017_528_3, 0.993_790_3)]
        {
            let (phi, up) = normal(x);
            assert!((phi - density).abs() < 3e-7 && (up - cumulative).abs() < 3e-7, "{x}: {phi} {up}");
            assert!((normal(-x).1 - (1. - cumulative)).abs() < 3e-7);
        }
    }
}
