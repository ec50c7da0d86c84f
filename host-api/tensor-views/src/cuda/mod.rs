//! Views on CUDA devices.

mod copy;
mod pointer;
mod strided;
mod tensor;

use std::ffi::c_void;

use candle_core::cuda::cudarc::driver::{DriverError, result, sys};
use candle_core::{CudaDevice, Device};
use host_api::{DeviceMemory, Error, Memory, Result, Status, View, ViewMut};

use pointer::Whereabouts;
pub(crate) use tensor::{fill, position, read};

/// The devices of this process, each with the one stream that candle computes on.
pub(crate) struct Cuda;

impl DeviceMemory for Cuda {
    fn check(&self, view: &View<'_>) -> Result<()> {
        if let Memory::Cuda { ordinal, .. } = view.memory() {
            bind(&Device::Cuda(open(ordinal)?));
        }
        if view.is_empty() {
            return Ok(());
        }
        let elsewhere = match (view.memory(), pointer::whereabouts(view.as_ptr())) {
            (Memory::Main, Whereabouts::Device(found)) => format!("cuda:{found}"),
            (Memory::Cuda { ordinal, .. }, Whereabouts::Device(found)) if found != ordinal => format!("cuda:{found}"),
            (Memory::Cuda { .. }, Whereabouts::Main) => "the host's, in main memory".into(),
            _ => return Ok(()),
        };
        Err(Error::invalid_argument(format!("a view on {}, but its memory is {elsewhere}", view.device())))
    }

    fn copy(&self, from: &View<'_>, to: &mut ViewMut<'_>) -> Result<()> {
        copy::copy(from, to)
    }

    fn context(&self) -> usize {
        // Without the driver's initialization there is none.
        result::ctx::get_current().ok().flatten().map_or(0, |context| context.addr())
    }

    fn set_context(&self, context: usize) {
        if self.context() != context {
            let context = std::ptr::with_exposed_provenance_mut::<c_void>(context).cast();
            // SAFETY: it was a thread's current context and, by the rules of who made it current, still is one.
            let _ = unsafe { result::ctx::set_current(context) };
        }
    }
}

pub(crate) fn bind(device: &Device) {
    if let Device::Cuda(device) = device {
        let context = device.cuda_stream().context().clone();
        // What failed as memory was freed, in whatever thread, is of no concern to this one, and would be reported instead of binding.
        let _ = context.check_err();
        // What fails here fails again, and is reported, where the device is used.
        let _ = context.bind_to_thread();
    }
}

fn open(ordinal: usize) -> Result<CudaDevice> {
    match crate::device(host_api::Device::Cuda(ordinal)) {
        Ok(Device::Cuda(device)) => Ok(device),
        Ok(_) => unreachable!("asked for by name"),
        Err(error) if error.status == Status::Internal => {
            Err(Error::new(Status::Unsupported, format!("cuda:{ordinal} cannot be used: {}", error.message)))
        }
        Err(error) => Err(error),
    }
}

fn driver(error: DriverError) -> Error {
    let status = match error.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Status::OutOfMemory,
        _ => Status::Internal,
    };
    Error::new(status, error.to_string())
}
