//! What the integration tests share: where the parity cases are, and how close is close enough.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};

pub mod cc;

/// The two pipelines of the parity cases.
pub const FAMILIES: [&str; 2] = ["sd1", "sd2"];

/// The parity folder: `PARITY_CASES` when set, else the copy beside these tests.
pub fn parity(path: &str) -> PathBuf {
    match std::env::var_os("PARITY_CASES") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("parity"),
    }
    .join(path)
}

/// All tensors of one case file, on the CPU as stored.
pub fn case(path: &str) -> HashMap<String, Tensor> {
    let path = parity(path);
    candle_core::safetensors::load(&path, &Device::Cpu).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// `||a - b|| / ||b||`, computed in f64.
pub fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims(), "shapes differ");
    let a = a.to_dtype(DType::F64).unwrap();
    let b = b.to_dtype(DType::F64).unwrap();
    let norm = |t: Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    norm((a - &b).unwrap()) / norm(b)
}

/// Fails when `a` is further from `b` than `tolerance` (relative, see [`relative_error`]); NaN always fails.
pub fn assert_close(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
    let error = relative_error(a, b);
    assert!(error < tolerance, "{what}: relative error {error:.3e}, tolerance {tolerance:.1e}");
}
