//! Compiles the CUDA kernels to PTX where the `cuda` feature asks for them.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    cuda();
}

/// For the compute capability that candle's kernels are built for: `CUDA_COMPUTE_CAP`, or that of the GPU in this machine.
#[cfg(feature = "cuda")]
fn cuda() {
    const FOLDER: &str = "src/layers/cuda/kernels";
    println!("cargo::rerun-if-changed={FOLDER}");
    let built = cudaforge::KernelBuilder::new().source_dir(FOLDER).arg("-std=c++17").arg("-O3").build_ptx();
    let table = std::path::Path::new(&std::env::var_os("OUT_DIR").expect("cargo sets it")).join("ptx.rs");
    if let Err(error) = built.and_then(|kernels| kernels.write(table)) {
        panic!("the CUDA kernels in {FOLDER}: {error}");
    }
}
