//! The kernel that copies between layouts with gaps.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::CudaDevice;
use candle_core::cuda::cudarc::driver::{CudaFunction, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg, sys};
use candle_core::cuda::cudarc::nvrtc::compile_ptx;
use host_api::{Error, Result, Status};

use super::driver;
use crate::candle_failed;

const SOURCE: &str = include_str!("strided.cu");

/// Most dimensions of a view.
const DIMS: usize = 8;

/// Shape and both strides, as the kernel takes them.
#[repr(C)]
#[derive(Clone, Copy)]
struct Axes {
    count: u64,
    extent: [u64; DIMS],
    from: [i64; DIMS],
    to: [i64; DIMS],
}

// SAFETY: plain numbers, laid out as in the kernel's source.
unsafe impl DeviceRepr for Axes {}

/// First elements, strides and shape of two layouts; `size` is that of an element in bytes, 2 or 4.
pub(super) struct Strided<'a> {
    pub(super) size: usize,
    pub(super) shape: &'a [usize],
    pub(super) from: (sys::CUdeviceptr, &'a [i64]),
    pub(super) to: (sys::CUdeviceptr, &'a [i64]),
}

/// # Safety
/// All elements of both layouts lie in memory of the stream's device, and are used by nothing else in the meantime.
pub(super) unsafe fn copy(device: &CudaDevice, stream: &CudaStream, copy: &Strided<'_>) -> Result<()> {
    let mut axes = Axes { count: 1, extent: [1; DIMS], from: [0; DIMS], to: [0; DIMS] };
    let first = DIMS - copy.shape.len();
    for (axis, &extent) in copy.shape.iter().enumerate() {
        axes.count *= extent as u64;
        axes.extent[first + axis] = extent as u64;
        (axes.from[first + axis], axes.to[first + axis]) = (copy.from.1[axis], copy.to.1[axis]);
    }
    const THREADS: u32 = 256;
    let blocks = axes.count.div_ceil(u64::from(THREADS)).min(1 << 16) as u32;
    let config = LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
    let function = function(device, if copy.size == 4 { "copy_32" } else { "copy_16" })?;
    let mut launch = stream.launch_builder(&function);
    launch.arg(&axes).arg(&copy.from.0).arg(&copy.to.0);
    // SAFETY: the arguments are the kernel's, and the memory is as the caller promises.
    unsafe { launch.launch(config) }.map_err(driver)?;
    Ok(())
}

fn function(device: &CudaDevice, name: &str) -> Result<CudaFunction> {
    let ptx = compiled()?;
    Ok(device.get_or_load_custom_func(name, "tensor_views_strided", &ptx).map_err(candle_failed)?.into_cuda_function())
}

/// Compiled by the first that needs it.
fn compiled() -> Result<Arc<str>> {
    static PTX: Mutex<Option<Arc<str>>> = Mutex::new(None);
    let mut ptx = PTX.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(ptx) = &*ptx {
        return Ok(ptx.clone());
    }
    let fresh = compile_ptx(SOURCE).map_err(|error| {
        Error::new(Status::Internal, format!("the kernel for views with strides was not compiled: {error:?}"))
    })?;
    Ok(ptx.insert(fresh.to_src().into()).clone())
}
