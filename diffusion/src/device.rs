//! Devices and dtypes by the names that users write.

#[cfg(feature = "cuda")]
use std::collections::HashMap;
#[cfg(feature = "cuda")]
use std::sync::{LazyLock, Mutex, PoisonError};

#[cfg(feature = "cuda")]
use candle_core::cuda::{
    CudaDevice,
    cudarc::cublas::sys as cublas,
    cudarc::driver::{DevicePtr, result, sys},
};
use candle_core::{DType, Device};

use crate::{Error, Result};

/// `cpu`, `cuda` or `cuda:N`. CUDA needs a build with the `cuda` feature; each GPU is one device in a program or library that
/// links this crate, so tensors from wherever they come can be computed with each other.
pub fn device(name: &str) -> Result<Device> {
    match name.split_once(':').map_or((name, Ok(0)), |(kind, ordinal)| (kind, ordinal.parse())) {
        ("cpu", _) if name == "cpu" => Ok(Device::Cpu),
        ("cuda", Ok(_)) if !cfg!(feature = "cuda") => {
            Err(Error::Unsupported(format!("device `{name}`: this build has no CUDA; build with `--features cuda`")))
        }
        ("cuda", Ok(ordinal)) => cuda_device(ordinal),
        _ => Err(Error::Input(format!("device `{name}`: expected `cpu`, `cuda` or `cuda:N`"))),
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda_device(_: usize) -> Result<Device> {
    unreachable!("refused before")
}

#[cfg(feature = "cuda")]
static OPEN: LazyLock<Mutex<HashMap<usize, Device>>> = LazyLock::new(Mutex::default);

/// Gives back what is free of the memory pool, once all that was asked for is done.
#[cfg(feature = "cuda")]
pub(crate) fn release_pool(device: &CudaDevice) -> Result<()> {
    let _asking = crate::asking();
    let stream = device.cuda_stream();
    let release = || -> std::result::Result<(), result::DriverError> {
        stream.synchronize()?;
        // SAFETY: the device exists, and its default pool too.
        unsafe { sys::cuMemPoolTrimTo(pool(stream.context().ordinal())?, 0) }.result()
    };
    Ok(release().map_err(candle_core::Error::wrap)?)
}

/// The same of the memory of graphs. What the driver refuses to give back it keeps.
#[cfg(feature = "cuda")]
pub(crate) fn release_graphs(ordinal: usize) {
    if let Ok(device) = result::device::get(ordinal as i32) {
        // SAFETY: the device exists.
        unsafe { sys::cuDeviceGraphMemTrim(device) };
    }
}

#[cfg(feature = "cuda")]
fn pool(ordinal: usize) -> std::result::Result<sys::CUmemoryPool, result::DriverError> {
    // SAFETY: the device exists.
    unsafe { result::device::get_default_mem_pool(result::device::get(ordinal as i32)?) }
}

#[cfg(feature = "cuda")]
fn cuda_device(ordinal: usize) -> Result<Device> {
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = open.get(&ordinal) {
        return Ok(device.clone());
    }
    let device = open_cuda(ordinal)?;
    open.insert(ordinal, device.clone());
    Ok(device)
}

/// With a stream of its own, which all work goes to in its order, whatever thread asks for it; candle's default is a stream for
/// each thread, and a tensor made on one would be read on another too early.
#[cfg(feature = "cuda")]
fn open_cuda(ordinal: usize) -> Result<Device> {
    let cuda = CudaDevice::new_with_stream(ordinal)?;
    // SAFETY: events order several streams; here all work is on one.
    unsafe { cuda.disable_event_tracking() };
    // Else freed memory would go back to the driver whenever the device is waited for, and be taken again at the next step.
    if cuda.cuda_stream().context().has_async_alloc() {
        let (mut all, threshold) = (u64::MAX, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD);
        // SAFETY: the attribute is a u64.
        let kept = pool(ordinal)
            .and_then(|pool| unsafe { result::mem_pool::set_attribute(pool, threshold, (&raw mut all).cast()) });
        kept.map_err(|error| Error::Unsupported(format!("cuda:{ordinal}: its memory pool: {error}")))?;
    }
    lend_workspace(&cuda)?;
    Ok(Device::Cuda(cuda))
}

/// Gives cuBLAS memory that it would otherwise allocate for each product of a graph. It is as much as it takes for itself by default.
#[cfg(feature = "cuda")]
fn lend_workspace(cuda: &CudaDevice) -> Result<()> {
    let stream = cuda.cuda_stream();
    let (major, _) = stream.context().compute_capability().map_err(candle_core::Error::wrap)?;
    let bytes = if major >= 9 { 32 << 20 } else { 4 << 20 };
    // SAFETY: nobody reads it but cuBLAS, which writes it before.
    let workspace = unsafe { cuda.alloc::<u8>(bytes)? };
    let first = workspace.device_ptr(&stream).0;
    // SAFETY: as many bytes, which are never freed: the device is open as long as the process lives.
    let lent = unsafe { cublas::cublasSetWorkspace_v2(*cuda.cublas_handle().handle(), first as *mut _, bytes) };
    std::mem::forget(workspace);
    Ok(lent.result().map_err(candle_core::Error::wrap)?)
}

/// `f32`, `f16` or `bf16`.
pub fn dtype(name: &str) -> Result<DType> {
    match name {
        "f32" => Ok(DType::F32),
        "f16" => Ok(DType::F16),
        "bf16" => Ok(DType::BF16),
        _ => Err(Error::Input(format!("dtype `{name}`: expected `f32`, `f16` or `bf16`"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_understood_or_refused() {
        assert!(device("cpu").unwrap().is_cpu());
        for wrong in ["", "cpu:0", "gpu", "cuda:", "cuda:x", "cuda:-1"] {
            assert!(device(wrong).unwrap_err().to_string().contains(&format!("`{wrong}`")), "{wrong}");
        }
        #[cfg(not(feature = "cuda"))]
        assert!(device("cuda:1").unwrap_err().to_string().contains("has no CUDA"));
        assert_eq!(dtype("bf16").unwrap(), DType::BF16);
        assert!(dtype("f64").unwrap_err().to_string().contains("`f64`"));
    }
}
