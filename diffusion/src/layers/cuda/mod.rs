//! Layers in half precision on CUDA, and what lies between products of rows in f32. Images lie in memory as `[B, h, w, C]` in half
//! precision, whatever their tensors' shapes say: the kernels want channels side by side, and tokens are images then. The
//! formulas of tensor operations beside which these stand are the reference; they serve f32 else, and every size that a kernel does
//! not take.

mod attention;
mod convolution;
mod heads;
mod norm;
mod pointwise;
mod rows;
mod scale;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{LazyLock, PoisonError, RwLock};

use candle_core::backend::BackendStorage;
use candle_core::cuda::cudarc::driver::{
    CudaFunction, CudaSlice, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg, sys,
};
use candle_core::cuda::{CudaDType, CudaDevice, CudaStorage, DeviceId};
use candle_core::op::BackpropOp;
use candle_core::{D, DType, Device, Layout, Shape, Storage, Tensor};
use half::{bf16, f16};

pub use attention::{attend, attend_vjp};
pub use convolution::{Kernel, conv3x3, conv3x3_vjp};
pub(super) use heads::{attend_heads, attend_heads_vjp};
pub use norm::{group_norm, group_norm_vjp};
pub(super) use norm::{layer_norm, layer_norm_vjp};
pub(super) use pointwise::{add, cat_channels, narrow_channels, upsample, upsample_vjp};
pub use pointwise::{geglu, geglu_vjp};
pub(super) use rows::{softmax, softmax_vjp};
pub(super) use scale::{largest, scale, unscale};

use crate::Result;

mod ptx {
    include!(concat!(env!("OUT_DIR"), "/ptx.rs"));
}

/// Values that one access moves; rows of channels are multiples of it.
const EIGHT: usize = 8;

/// Whether the kernels take this tensor's dtype and device.
pub(super) fn takes(x: &Tensor) -> bool {
    matches!(x.device(), Device::Cuda(_)) && matches!(x.dtype(), DType::F16 | DType::BF16)
}

/// Whether a tensor is on CUDA, in f32.
fn takes_wide(x: &Tensor) -> bool {
    matches!(x.device(), Device::Cuda(_)) && x.dtype() == DType::F32
}

/// Whether all these are of the dtype and on the device of `x`: kernels are given addresses alone.
fn alike<'a>(x: &Tensor, others: impl IntoIterator<Item = &'a Tensor>) -> bool {
    others.into_iter().all(|other| other.dtype() == x.dtype() && other.device().same_device(x.device()))
}

/// The file of the kernels that take rows of this tensor's last dimension, any in f32 and multiples of eight in half precision: those
/// of one name have the same arguments.
fn of_rows(x: &Tensor, half: &'static Ptx) -> Result<Option<&'static Ptx>> {
    if x.rank() == 0 || x.elem_count() == 0 {
        return Ok(None);
    }
    let in_eights = takes(x) && x.dim(D::Minus1)?.is_multiple_of(EIGHT);
    Ok(if takes_wide(x) { Some(&rows::PTX) } else { in_eights.then_some(half) })
}

/// `[B, C, h, w]` as `[B, h, w, C]`, contiguous: no copy where an image came from a kernel.
pub(super) fn channels_last(x: &Tensor) -> Result<Tensor> {
    Ok(x.permute((0, 2, 3, 1))?.contiguous()?)
}

/// The inverse of [`channels_last`]: a view.
pub(super) fn channels_first(x: &Tensor) -> Result<Tensor> {
    Ok(x.permute((0, 3, 1, 2))?)
}

/// The device and its kernels for one dtype.
struct Kernels<'a> {
    device: &'a CudaDevice,
    dtype: DType,
}

/// An address on the device. Whoever made it keeps the tensor until the kernel is launched: memory is given back in the order
/// of the stream.
type Address = u64;

impl<'a> Kernels<'a> {
    /// Of a tensor that [`takes`] approves.
    fn of(x: &'a Tensor) -> Self {
        match x.device() {
            Device::Cuda(device) => Self { device, dtype: x.dtype() },
            other => unreachable!("a tensor on {other:?}"),
        }
    }

    /// Uninitialised.
    fn output(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        let storage = self.storage(&shape)?;
        Ok(Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false))
    }

    /// Uninitialised, in f32.
    fn scratch(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        Kernels { dtype: DType::F32, ..*self }.output(shape)
    }

    /// Uninitialised.
    fn storage(&self, shape: &Shape) -> Result<CudaStorage> {
        match self.dtype {
            DType::F16 => self.allocate::<f16>(shape.elem_count()),
            DType::BF16 => self.allocate::<bf16>(shape.elem_count()),
            _ => self.allocate::<f32>(shape.elem_count()),
        }
    }

    fn allocate<T: DeviceRepr + CudaDType>(&self, count: usize) -> Result<CudaStorage> {
        // SAFETY: the kernel that it is for writes every element before another reads any.
        let slice = unsafe { self.device.alloc::<T>(count)? };
        Ok(CudaStorage::wrap_cuda_slice(slice, self.device.clone()))
    }

    /// The first element of a contiguous tensor on this device.
    fn address(&self, x: &Tensor) -> Result<Address> {
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { unreachable!("beside tensors on CUDA") };
        self.address_in(storage, layout)
    }

    fn address_in(&self, storage: &CudaStorage, layout: &Layout) -> Result<Address> {
        assert!(layout.is_contiguous(), "a kernel was given strides {:?}", layout.stride());
        let start = layout.start_offset();
        match storage.dtype() {
            DType::F32 => self.address_of(storage.as_cuda_slice::<f32>()?, start),
            DType::F16 => self.address_of(storage.as_cuda_slice::<f16>()?, start),
            DType::BF16 => self.address_of(storage.as_cuda_slice::<bf16>()?, start),
            other => unreachable!("a kernel was given {other:?}"),
        }
    }

    fn address_of<T>(&self, slice: &CudaSlice<T>, start: usize) -> Result<Address> {
        let stream = self.device.cuda_stream();
        let address = slice.slice(start..).device_ptr(&stream).0;
        // Parts of tensors begin at whole rows, which in half precision are multiples of eight values.
        assert!(self.dtype == DType::F32 || address.is_multiple_of(16), "a kernel was given the address {address:#x}");
        Ok(address)
    }

    fn optional(&self, x: Option<&Tensor>) -> Result<Address> {
        x.map_or(Ok(0), |x| self.address(x))
    }

    /// Launches `name`, for this dtype, of the module `ptx`.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and the tensors behind them have the sizes that it is told.
    unsafe fn launch(&self, ptx: &Ptx, name: &str, config: LaunchConfig, arguments: &[&dyn Argument]) -> Result<()> {
        let function = self.function(ptx, format!("{name}_{}", self.dtype.as_str()), config.shared_mem_bytes)?;
        let stream = self.device.cuda_stream();
        let mut builder = stream.launch_builder(&function);
        for argument in arguments {
            argument.push(&mut builder);
        }
        // SAFETY: the caller's promise.
        unsafe { builder.launch(config) }.map_err(candle_core::Error::wrap)?;
        Ok(())
    }

    /// A kernel that may use `shared` bytes of shared memory. They are kept: asking the driver takes as long as a launch.
    fn function(&self, ptx: &Ptx, name: String, shared: u32) -> Result<CudaFunction> {
        type Functions = HashMap<(DeviceId, String, u32), CudaFunction>;
        static FUNCTIONS: LazyLock<RwLock<Functions>> = LazyLock::new(RwLock::default);
        let key = (self.device.id(), name, shared);
        if let Some(function) = FUNCTIONS.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(function.clone());
        }
        let function = self.device.get_or_load_custom_func(&key.1, ptx.name, ptx.source)?.into_cuda_function();
        if shared > 48 << 10 {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, shared as i32).map_err(candle_core::Error::wrap)?;
        }
        FUNCTIONS.write().unwrap_or_else(PoisonError::into_inner).insert(key, function.clone());
        Ok(function)
    }
}

/// The kernels of one file.
struct Ptx {
    name: &'static str,
    source: &'static str,
}

/// What a kernel takes by value.
trait Argument {
    fn push<'b>(&'b self, builder: &mut candle_core::cuda::cudarc::driver::LaunchArgs<'b>);
}

impl<T: DeviceRepr> Argument for T {
    fn push<'b>(&'b self, builder: &mut candle_core::cuda::cudarc::driver::LaunchArgs<'b>) {
        builder.arg(self);
    }
}

/// One thread for each of `count` pieces of work.
fn threads_for(count: usize) -> LaunchConfig {
    LaunchConfig { grid_dim: (count.div_ceil(256) as u32, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 }
}
