//! Views of the sampler-hook ABI as candle tensors and back: what a host or plugin on candle needs to lend its tensors and to
//! take those of the other side, in main memory and, in a build with the `cuda` feature, on CUDA devices.
//!
//! A tensor's numbers are copied once, on the device where both are on one, by this thread and in the order of both streams: the
//! view's, and the one that candle computes on. Nothing waits for a device but where a view of main memory is at one end.

#[cfg(feature = "cuda")]
mod cuda;
mod fill;
mod held;
mod lend;
mod read;
mod write;

use candle_core::{DType, Device};
use diffusion::{Asking, asking};
use host_api::{DeviceMemory, Dtype, Error, Result, Status};

pub use fill::fill;
pub use held::Held;
pub use lend::lend;
pub use read::read;
pub use write::write;

/// How this build reaches the memory of devices: for [`host_api::plugin::Plugin::device_memory`] and
/// [`host_api::host::Host::device_memory`].
pub fn device_memory() -> Option<&'static dyn DeviceMemory> {
    #[cfg(feature = "cuda")]
    return Some(&cuda::Cuda);
    #[cfg(not(feature = "cuda"))]
    None
}

/// candle's device of that name.
pub fn device(device: host_api::Device) -> Result<Device> {
    diffusion::device(&device.to_string()).map_err(|error| failed(&error))
}

/// The interface's name of candle's device.
pub fn name(device: &Device) -> host_api::Device {
    match device.location() {
        candle_core::DeviceLocation::Cuda { gpu_id } => host_api::Device::Cuda(gpu_id),
        _ => host_api::Device::Cpu,
    }
}

/// Makes this thread's current context that of the device, which freeing its tensors takes, and keeps others from capturing its stream
/// as long as the result lives. To be called, with the result kept, wherever a host calls.
pub fn bind(device: &Device) -> Option<Asking> {
    #[cfg(feature = "cuda")]
    cuda::bind(device);
    (!device.is_cpu()).then(asking)
}

/// candle's name of an element type.
pub fn dtype(dtype: Dtype) -> DType {
    match dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::Bf16 => DType::BF16,
    }
}

fn dtype_of(dtype: DType) -> Result<Dtype> {
    match dtype {
        DType::F32 => Ok(Dtype::F32),
        DType::F16 => Ok(Dtype::F16),
        DType::BF16 => Ok(Dtype::Bf16),
        other => Err(Error::new(Status::DtypeMismatch, format!("a tensor of {other:?}, which no view can be of"))),
    }
}

/// A failure of candle or of the device, by the ABI's codes.
fn failed(error: &diffusion::Error) -> Error {
    let status = match error {
        error if error.is_out_of_memory() => Status::OutOfMemory,
        diffusion::Error::Unsupported(_) => Status::Unsupported,
        _ => Status::Internal,
    };
    Error::new(status, error.to_string())
}

fn candle_failed(error: candle_core::Error) -> Error {
    failed(&error.into())
}
