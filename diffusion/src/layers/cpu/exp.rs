use pulp::Simd;

use super::simd::Vectors;

const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 in two parts, the first exact in few bits, so that a small integer times it is exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// 1.5 * 2^23: adding and taking it away rounds to the nearest integer. And the bias of exponents, so that the sum's last bits are the
/// exponent of a power of two.
const MAGIC: f32 = 12_582_912. + 127.;
/// 2^-126 to 2^127: the powers of two that are f32.
const LEAST: f32 = -87.3;
const MOST: f32 = 88.;
/// Of the polynomial for `e^r`, from `r^7` down to `r^2` (Cephes' `expf`).
const COEFFICIENTS: [f32; 6] = [1.987_569_1e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 5e-1];

/// `e^x` to within 2 units in the last place, of operations that the compiler turns into vectors; about 1e-38 far below,
/// about 2e38 far above. `e^x = 2^n e^r` with |r| <= ln 2 / 2 and a polynomial for `e^r`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let x = x.clamp(LEAST, MOST);
    let shifted = x * LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let p = COEFFICIENTS[1..].iter().fold(COEFFICIENTS[0], |p, c| p * r + c) * r * r + r + 1.;
    p * f32::from_bits(shifted.to_bits() << 23)
}

/// [`exp`] of a vector.
#[inline(always)]
pub(super) fn exp_vector<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let given = x;
    let x = simd.min_f32s(simd.splat_f32s(MOST), simd.max_f32s(simd.splat_f32s(LEAST), x));
    let shifted = simd.scaled_plus(LOG2_E, x, simd.splat_f32s(MAGIC));
    let n = simd.sub_f32s(shifted, simd.splat_f32s(MAGIC));
    let r = simd.scaled_plus(-LN_2_LOW, n, simd.scaled_plus(-LN_2_HIGH, n, x));
    let mut p = simd.splat_f32s(COEFFICIENTS[0]);
    for i in 1..COEFFICIENTS.len() {
        p = simd.mul_add_f32s(p, r, simd.splat_f32s(COEFFICIENTS[i]));
    }
    let p = simd.mul_add_f32s(simd.mul_f32s(p, r), r, simd.add_f32s(r, simd.splat_f32s(1.)));
    let power = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    // Machines differ in what the larger of NaN and a number is.
    let is_number = simd.equal_f32s(given, given);
    simd.select_f32s(is_number, simd.mul_f32s(p, simd.transmute_f32s_u32s(power)), given)
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

    /// By vectors of whatever width.
    fn by_vectors(x: f32) -> f32 {
        struct One(f32);
        impl pulp::WithSimd for One {
            type Output = f32;

            #[inline(always)]
            fn with_simd<S: Simd>(self, simd: S) -> f32 {
                let mut values = [0f32; 16];
                // SAFETY: the widest vectors have sixteen values.
                unsafe { simd.store(values.as_mut_ptr(), exp_vector(simd, simd.splat_f32s(self.0))) };
                values[0]
            }
        }
        super::super::simd::widest(One(x))
    }

    #[test]
    fn near_the_real_one() {
        for exp in [exp, by_vectors] {
            for i in -8700..8800 {
                let x = i as f32 / 100.;
                let expected = f64::from(x).exp();
                assert!((f64::from(exp(x)) / expected - 1.).abs() < 2.5e-7, "{x}: {} is not {expected}", exp(x));
            }
            assert!(exp(-1e9) < 2e-38 && exp(1e9) > 1.6e38 && exp(f32::NAN).is_nan());
            assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(f32::INFINITY) > 1.6e38);
            assert_eq!(exp(0.), 1.);
        }
        assert_eq!(sigmoid(0.), 0.5);
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
