//! candle's tensors on a device.

use std::ffi::c_void;

use candle_core::cuda::CudaDType;
use candle_core::cuda::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Storage, Tensor};
use half::{bf16, f16};
use host_api::{Dtype, Element, Error, Memory, Result, Status, View, ViewMut};

use super::copy::copy;
use crate::{candle_failed, name};

/// A copy of a view on a device.
pub(crate) fn read(view: &View<'_>, device: &Device) -> Result<Tensor> {
    match (device, view.dtype()) {
        (Device::Cpu, Dtype::F32) => to_main_memory::<f32>(view),
        (Device::Cpu, Dtype::F16) => to_main_memory::<f16>(view),
        (Device::Cpu, Dtype::Bf16) => to_main_memory::<bf16>(view),
        _ if name(device) != view.device() => {
            let message = format!("from {} to {}: nothing is copied between devices", view.device(), name(device));
            Err(Error::new(Status::Unsupported, message))
        }
        (_, dtype) if view.is_empty() => {
            Tensor::zeros(view.shape(), crate::dtype(dtype), device).map_err(candle_failed)
        }
        (Device::Cuda(cuda), Dtype::F32) => on_device::<f32>(view, cuda),
        (Device::Cuda(cuda), Dtype::F16) => on_device::<f16>(view, cuda),
        (Device::Cuda(cuda), Dtype::Bf16) => on_device::<bf16>(view, cuda),
        _ => unreachable!("named above"),
    }
}

fn to_main_memory<T: Element + candle_core::WithDType>(view: &View<'_>) -> Result<Tensor> {
    let mut values = vec![T::from_f32(0.); view.len()];
    copy(view, &mut ViewMut::new(&mut values, view.shape())?)?;
    Tensor::from_vec(values, view.shape(), &Device::Cpu).map_err(candle_failed)
}

fn on_device<T: CudaDType + DeviceRepr>(view: &View<'_>, cuda: &CudaDevice) -> Result<Tensor> {
    // SAFETY: it is written below before anything reads it.
    let slice: CudaSlice<T> = unsafe { cuda.alloc(view.len()) }.map_err(candle_failed)?;
    let (first, memory) = place(&slice, cuda);
    // SAFETY: memory of its own for as many elements, in the order of the stream that it was allocated on.
    let mut target = unsafe { ViewMut::of_memory(first.cast_mut(), view.dtype(), view.shape(), None, memory) }?;
    copy(view, &mut target)?;
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, cuda.clone()));
    Ok(Tensor::from_storage(storage, view.shape(), BackpropOp::none(), false))
}

/// A new tensor as `write` writes it.
pub(crate) fn fill(
    shape: &[usize],
    cuda: &CudaDevice,
    write: impl FnOnce(&mut ViewMut<'_>) -> Result<()>,
) -> Result<Tensor> {
    let count = shape.iter().product();
    if count == 0 {
        return Tensor::zeros(shape, DType::F32, &Device::Cuda(cuda.clone())).map_err(candle_failed);
    }
    let slice = cuda.alloc_zeros::<f32>(count).map_err(candle_failed)?;
    let (first, memory) = place(&slice, cuda);
    // SAFETY: memory of its own for as many elements, in the order of the stream that it was allocated on.
    write(&mut unsafe { ViewMut::of_memory(first.cast_mut(), Dtype::F32, shape, None, memory) }?)?;
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, cuda.clone()));
    Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
}

/// The address of a storage's first element, and where that is.
pub(crate) fn position(storage: &CudaStorage) -> Result<(*const c_void, Memory)> {
    fn of<T: CudaDType>(storage: &CudaStorage) -> Result<(*const c_void, Memory)> {
        Ok(place(storage.as_cuda_slice::<T>().map_err(candle_failed)?, &storage.device))
    }
    use candle_core::backend::BackendStorage;
    match storage.dtype() {
        DType::F16 => of::<f16>(storage),
        DType::BF16 => of::<bf16>(storage),
        _ => of::<f32>(storage),
    }
}

fn place<T>(slice: &CudaSlice<T>, cuda: &CudaDevice) -> (*const c_void, Memory) {
    let stream = cuda.cuda_stream();
    let first = std::ptr::with_exposed_provenance::<c_void>(slice.device_ptr(&stream).0 as usize);
    (first, Memory::Cuda { ordinal: stream.context().ordinal(), stream: stream.cu_stream().cast() })
}
