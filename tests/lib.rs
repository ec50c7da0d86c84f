//! What the integration tests share: where the parity cases are, and how close is close enough.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use candle_core::{DType, Device, Shape, Tensor};
use diffusion::UNet;

pub mod cc;
pub mod cli;
pub mod dpt;
pub mod hosts;
pub mod pickle;

/// The two pipelines of the parity cases.
pub const FAMILIES: [&str; 2] = ["sd1", "sd2"];

/// The parity folder: `PARITY_CASES` when set, else the copy beside these tests.
pub fn parity(path: &str) -> PathBuf {
    match std::env::var_os("PARITY_CASES") {
        Some(folder) => PathBuf::from(folder).join(path),
        None => committed(path),
    }
}

/// The copy beside these tests, whatever `PARITY_CASES` says: for tests that state its sizes.
pub fn committed(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("parity").join(path)
}

/// Where the tests that compare numbers compute: `TEST_DEVICE` (`cuda`, `cuda:1`, ..) when set, else the CPU.
pub fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| diffusion::device(&device_name()).unwrap())
}

/// The name of [`device`], as configurations take it.
pub fn device_name() -> String {
    std::env::var("TEST_DEVICE").unwrap_or_else(|_| "cpu".into())
}

/// All tensors of one case file as stored, on [`device`].
pub fn case(path: &str) -> HashMap<String, Tensor> {
    let path = parity(path);
    candle_core::safetensors::load(&path, device()).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The U-Net of a family's committed tiny pipeline, on [`device`].
pub fn tiny_unet(family: &str, dtype: DType) -> UNet {
    UNet::load(&committed(&format!("{family}-tiny/unet")), dtype, device()).unwrap()
}

/// Fixed f32 values between -1 and 1 that follow no grid; other seeds give others.
pub fn values(seed: u32, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let value = |i: usize| ((i + 1) as f64 * (1.7 + seed as f64)).sin() as f32;
    Tensor::from_vec((0..shape.elem_count()).map(value).collect(), shape, device()).unwrap()
}

/// Every value as the bits of an f32, which f32 and f16 fit in: equal bits, equal tensors.
pub fn bits(tensor: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// `||a - b|| / ||b||`, computed in f64.
pub fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims(), "shapes differ");
    let exact = |t: &Tensor| t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    let (a, b) = (exact(a), exact(b));
    let norm = |t: Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    norm((a - &b).unwrap()) / norm(b)
}

/// Fails when `a` is further from `b` than `tolerance` (relative, see [`relative_error`]); NaN always fails.
pub fn assert_close(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
    let error = relative_error(a, b);
    assert!(error < tolerance, "{what}: relative error {error:.3e}, tolerance {tolerance:.1e}");
}

/// Fails when two results of the same computation differ in a bit. On a GPU, rounding may differ from run to run: cuBLAS promises
/// the same bits only where nothing else computes at the time, and some of candle's gradients are sums in no fixed order.
pub fn assert_same(what: &str, a: &Tensor, b: &Tensor) {
    if device().is_cpu() {
        assert_eq!(a.dims(), b.dims(), "{what}");
        assert!(bits(a) == bits(b), "{what}: other bits, relative error {:.3e}", relative_error(a, b));
    } else {
        assert_close(what, a, b, 1e-3);
    }
}

/// The real plugin library, built from the current sources in the profile of the running test, so that no test loads a stale
/// one; or the one in the folder `PREBUILT`, for machines that cannot build.
pub fn plugin_library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        // What `gpu/build.sh` made is the flavour for CUDA.
        let name = if std::env::var_os("PREBUILT").is_some() { "dpt_cuda" } else { "dpt" };
        build().join(format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX))
    })
}

/// The reference host's program, built likewise; the plugin library lies beside it.
pub fn host_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| build().join(format!("host-demo{}", std::env::consts::EXE_SUFFIX)))
}

/// The program for files of weights.
pub fn weights_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| build().join(format!("weights{}", std::env::consts::EXE_SUFFIX)))
}

/// Builds the workspace; the folder that holds the results. The whole workspace, because a single package would ask other
/// features of the dependencies than the tests do, and build them all again.
fn build() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        if let Some(folder) = std::env::var_os("PREBUILT") {
            return PathBuf::from(folder);
        }
        // target/<profile>/deps/<test>
        let test = std::env::current_exe().expect("the running test has a path");
        let folder = test.ancestors().nth(2).expect("a test lies in target/<profile>/deps").to_owned();
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--workspace", "--target-dir"]).arg(folder.parent().unwrap());
        if folder.ends_with("release") {
            build.arg("--release");
        }
        let status = build.current_dir(env!("CARGO_MANIFEST_DIR")).status().expect("cargo runs");
        assert!(status.success(), "building the workspace failed");
        folder
    })
}
