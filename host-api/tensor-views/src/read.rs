use candle_core::{Device, Tensor};
use half::{bf16, f16};
use host_api::{Dtype, Memory, Result, View};

use crate::candle_failed;

/// A copy of a view as a tensor of its shape and dtype on `device`. From one CUDA device to another is an error.
pub fn read(view: &View<'_>, device: &Device) -> Result<Tensor> {
    match view.memory() {
        Memory::Main => in_main_memory(view)?.to_device(device).map_err(candle_failed),
        #[cfg(feature = "cuda")]
        Memory::Cuda { .. } => crate::cuda::read(view, device),
        #[cfg(not(feature = "cuda"))]
        Memory::Cuda { .. } => {
            let message = format!("a tensor on {}: this build has no CUDA", view.device());
            Err(host_api::Error::new(host_api::Status::Unsupported, message))
        }
    }
}

fn in_main_memory(view: &View<'_>) -> Result<Tensor> {
    let shape = view.shape();
    let tensor = match view.dtype() {
        Dtype::F32 => Tensor::from_vec(view.elements::<f32>().expect("its type"), shape, &Device::Cpu),
        Dtype::F16 => Tensor::from_vec(view.elements::<f16>().expect("its type"), shape, &Device::Cpu),
        Dtype::Bf16 => Tensor::from_vec(view.elements::<bf16>().expect("its type"), shape, &Device::Cpu),
    };
    tensor.map_err(candle_failed)
}
