//! Central differences, the proof of every hand-written `vjp`: for a cotangent `c` of `y = f(x)` and a direction `d` in the
//! space of `x`, `<c, f(x + h d) - f(x - h d)> / 2 h` must equal `<vjp(c), d>`. Everything in f64.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Shape, Tensor};

use crate::{Checkpoint, Result};

/// Rounding (`1e-16 / h`) and, for values and slopes of order 1, truncation (`h^2`) both stay near 1e-10.
const STEP: f64 = 2e-6;
const TOLERANCE: f64 = 1e-8;

/// `shape` filled from a fixed sequence per seed: both signs, magnitudes in [0.25, 1.25), so none is near zero.
pub(crate) fn values(seed: u64, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let value = |i: u64| {
        // SplitMix64: neighbouring counters give independent bits.
        let mut z = ((seed << 32) + i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let uniform = (z ^ (z >> 31)) as i64 as f64 / i64::MAX as f64;
        uniform + 0.25f64.copysign(uniform)
    };
    let all: Vec<f64> = (0..shape.elem_count() as u64).map(value).collect();
    Tensor::from_vec(all, shape, &Device::Cpu).unwrap()
}

/// Weights of the given names and shapes, matrices and kernels divided by the root of their fan-in.
pub(crate) fn weights(shapes: &[(&str, &[usize])]) -> Checkpoint {
    let weight = |(i, (name, shape)): (usize, &(&str, &[usize]))| {
        let fan_in: usize = shape[1..].iter().product();
        (name.to_string(), (values(1000 + i as u64, *shape) / (fan_in as f64).sqrt()).unwrap())
    };
    let tensors: HashMap<_, _> = shapes.iter().enumerate().map(weight).collect();
    Checkpoint::from_tensors(Path::new("weights of a test"), tensors, DType::F64, &Device::Cpu)
}

/// The largest difference between central differences of `f` at `x` and `vjp` over some directions, relative to the size
/// that such a number has when cotangent and slope are independent: `|c| |slope| / sqrt(n)`.
pub(crate) fn disagreement(
    directions: u64,
    x: &Tensor,
    f: impl Fn(&Tensor) -> Result<Tensor>,
    vjp: impl Fn(&Tensor) -> Result<Tensor>,
) -> f64 {
    let cotangent = values(1, f(x).unwrap().shape());
    let gradient = vjp(&cotangent).unwrap();
    assert_eq!((gradient.dims(), gradient.dtype()), (x.dims(), DType::F64), "a gradient is like its input");
    let (mut worst, mut largest) = (0f64, 0f64);
    for seed in 2..2 + directions {
        let direction = values(seed, x.shape());
        let at = |step: f64| f(&(x + (&direction * step).unwrap()).unwrap()).unwrap();
        let slope = ((at(STEP) - at(-STEP)).unwrap() / (2. * STEP)).unwrap();
        let (numeric, analytic) = (dot(&cotangent, &slope), dot(&gradient, &direction));
        let typical = (dot(&cotangent, &cotangent) * dot(&slope, &slope) / slope.elem_count() as f64).sqrt();
        assert!(typical > 1e-4 && analytic.is_finite(), "nothing to compare: {numeric} and {analytic} of {typical}");
        worst = worst.max((numeric - analytic).abs() / typical);
        largest = largest.max(numeric.abs() / typical);
    }
    // Agreement of numbers that are all about zero by chance would prove little.
    assert!(largest > 0.05, "nothing to compare: at most {largest} of what is typical");
    worst
}

/// Fails when `vjp`, a function of the cotangent, is not the vector-Jacobian product of `f` at `x`.
pub(crate) fn assert_vjp(
    what: &str,
    x: &Tensor,
    f: impl Fn(&Tensor) -> Result<Tensor>,
    vjp: impl Fn(&Tensor) -> Result<Tensor>,
) {
    let error = disagreement(3, x, f, vjp);
    assert!(error < TOLERANCE, "{what}: the gradient is off by {error:.1e}");
}

/// Fails when `found` is further from `expected` than `tolerance`, by the largest of the expected values.
pub(crate) fn assert_values(found: &Tensor, expected: &[f64], tolerance: f64) {
    let found = numbers(found);
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0., |max: f64, v| max.max(v.abs()));
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance * largest, "value {i} is {a}, expected {b}");
    }
}

/// All values in order.
pub(crate) fn numbers(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    (a * b).unwrap().sum_all().unwrap().to_scalar().unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cube(x: &Tensor) -> Result<Tensor> {
        Ok((x.sqr()? * x)?)
    }

    fn cube_vjp(x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        Ok(((x.sqr()? * 3.)? * dy)?)
    }

    #[test]
    fn accepts_a_right_gradient() {
        let x = values(0, (4, 8));
        assert!(disagreement(5, &x, cube, |dy| cube_vjp(&x, dy)) < TOLERANCE);
    }

    #[test]
    fn rejects_a_gradient_off_by_a_millionth() {
        let x = values(0, (4, 8));
        assert!(disagreement(5, &x, cube, |dy| Ok((cube_vjp(&x, dy)? * (1. + 1e-6))?)) > TOLERANCE);
    }

    #[test]
    fn rejects_a_gradient_with_one_wrong_element() {
        let x = values(0, (4, 8));
        let mut factors = vec![1.; 32];
        factors[31] = 1.01;
        let factors = Tensor::from_vec(factors, (4, 8), &Device::Cpu).unwrap();
        let last = |dy: &Tensor| Ok((cube_vjp(&x, dy)? * &factors)?);
        assert!(disagreement(5, &x, cube, last) > 1e-5);
    }

    #[test]
    fn rejects_the_transpose_and_zero() {
        let (x, w) = (values(0, (4, 8)), values(50, (8, 8)));
        let product = |x: &Tensor| Ok(x.matmul(&w)?);
        assert!(disagreement(3, &x, product, |dy| Ok(dy.matmul(&w.t()?)?)) < TOLERANCE);
        assert!(disagreement(3, &x, product, |dy| Ok(dy.matmul(&w)?)) > 1e-2);
        assert!(disagreement(3, &x, product, |dy| Ok(dy.zeros_like()?)) > 0.05);
    }

    #[test]
    #[should_panic(expected = "nothing to compare")]
    fn refuses_to_compare_nothing() {
        disagreement(1, &values(0, 8), |x| Ok(x.ones_like()?), |dy| Ok(dy.zeros_like()?));
    }
}
