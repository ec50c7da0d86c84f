//! Devices and dtypes by the names that users write.

#[cfg(feature = "cuda")]
use std::collections::HashMap;
#[cfg(feature = "cuda")]
use std::sync::{LazyLock, Mutex, PoisonError};

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

/// Gives back what is free of the devices' memory pools, and of the memory of graphs.
#[cfg(feature = "cuda")]
pub(crate) fn release_memory() {
    use candle_core::cuda::cudarc::driver::{result, sys};

    let _asking = crate::asking();
    for ordinal in OPEN.lock().unwrap_or_else(PoisonError::into_inner).keys() {
        // SAFETY: the device is open. What cannot be given back is kept.
        unsafe {
            let Ok(device) = result::device::get(*ordinal as i32) else { continue };
            if let Ok(pool) = result::device::get_default_mem_pool(device) {
                sys::cuMemPoolTrimTo(pool, 0);
            }
            sys::cuDeviceGraphMemTrim(device);
        }
    }
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
    use candle_core::cuda::CudaDevice;
    use candle_core::cuda::cudarc::driver::{result, sys};

    let cuda = CudaDevice::new_with_stream(ordinal)?;
    // SAFETY: events order several streams; here all work is on one.
    unsafe { cuda.disable_event_tracking() };
    let keep = || -> std::result::Result<(), result::DriverError> {
        let mut all = u64::MAX;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the device exists, its default pool too, and the attribute is a u64.
        unsafe {
            let pool = result::device::get_default_mem_pool(result::device::get(ordinal as i32)?)?;
            result::mem_pool::set_attribute(pool, threshold, (&raw mut all).cast())
        }
    };
    // Else freed memory would go back to the driver whenever the device is waited for, and be taken again at the next step.
    if cuda.cuda_stream().context().has_async_alloc() {
        keep().map_err(|error| Error::Unsupported(format!("cuda:{ordinal}: its memory pool: {error}")))?;
    }
    Ok(Device::Cuda(cuda))
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
