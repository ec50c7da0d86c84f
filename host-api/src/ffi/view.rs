//! `sh_view`, written and read.

use std::ptr;

use crate::abi::{SH_DEVICE_CPU, SH_DEVICE_CUDA, SH_VIEW_READ_ONLY, sh_device, sh_dtype, sh_tensor, sh_view};
use crate::error::{Error, Result, Status};
use crate::ffi;
use crate::types::Device;
use crate::view::{Dtype, Layout, MAX_DIMS, Memory, Reach, View, ViewMut};

fn dtype_to_raw(dtype: Dtype) -> sh_dtype {
    match dtype {
        Dtype::F32 => sh_dtype { code: 2, bits: 32, lanes: 1 },
        Dtype::F16 => sh_dtype { code: 2, bits: 16, lanes: 1 },
        Dtype::Bf16 => sh_dtype { code: 4, bits: 16, lanes: 1 },
    }
}

fn dtype_from_raw(dtype: sh_dtype, what: &str) -> Result<Dtype> {
    match (dtype.code, dtype.bits, dtype.lanes) {
        (2, 32, 1) => Ok(Dtype::F32),
        (2, 16, 1) => Ok(Dtype::F16),
        (4, 16, 1) => Ok(Dtype::Bf16),
        (code, bits, lanes) => Err(Error::new(
            Status::DtypeMismatch,
            format!("{what}: dtype (code {code}, {bits} bits, {lanes} lanes) is not f32, f16 or bf16"),
        )),
    }
}

/// A view for the other side to fill.
pub(crate) fn empty() -> sh_view {
    sh_view {
        struct_size: ffi::struct_size::<sh_view>(),
        flags: 0,
        tensor: sh_tensor {
            data: ptr::null_mut(),
            device: device_to_raw(Device::Cpu),
            ndim: 0,
            dtype: dtype_to_raw(Dtype::F32),
            shape: ptr::null_mut(),
            strides: ptr::null_mut(),
            byte_offset: 0,
        },
        stream: ptr::null_mut(),
    }
}

/// The device of the interface.
pub(crate) fn device_to_raw(device: Device) -> sh_device {
    match device {
        Device::Cpu => sh_device { device_type: SH_DEVICE_CPU, device_id: 0 },
        Device::Cuda(ordinal) => sh_device { device_type: SH_DEVICE_CUDA, device_id: ordinal as i32 },
    }
}

/// The device that the host names.
pub(crate) fn device_from_raw(device: sh_device) -> Result<Device> {
    match device.device_type {
        SH_DEVICE_CPU => Ok(Device::Cpu),
        SH_DEVICE_CUDA => usize::try_from(device.device_id)
            .map(Device::Cuda)
            .map_err(|_| Error::invalid_argument(format!("CUDA device {}", device.device_id))),
        other => Err(Error::new(Status::Unsupported, format!("device type {other} is neither CPU nor CUDA"))),
    }
}

/// Points to `base` and into `layout`.
fn to_raw(base: *const u8, layout: &Layout, memory: Memory, flags: u32) -> sh_view {
    let stream = match memory {
        Memory::Main => ptr::null_mut(),
        Memory::Cuda { stream, .. } => stream,
    };
    sh_view {
        struct_size: ffi::struct_size::<sh_view>(),
        flags,
        tensor: sh_tensor {
            data: base.cast_mut().cast(),
            device: device_to_raw(memory.device()),
            ndim: layout.ndim as i32,
            dtype: dtype_to_raw(layout.dtype),
            shape: layout.raw_shape.as_ptr().cast_mut(),
            strides: layout.strides.as_ptr().cast_mut(),
            byte_offset: 0,
        },
        stream,
    }
}

impl View<'_> {
    /// Points into `self`, which has to stay where it is while the result is used.
    pub(crate) fn as_raw(&self) -> sh_view {
        let (base, layout) = self.parts();
        to_raw(base, layout, self.memory(), SH_VIEW_READ_ONLY)
    }

    /// A view of the other side's memory, after checking all that can be checked, that it is within `reach` too.
    ///
    /// # Safety
    /// `view` is null or points to an `sh_view` whose pointers are null or valid for what its sizes say, for `'a`.
    pub(crate) unsafe fn from_raw(view: *const sh_view, what: &str, reach: Reach) -> Result<Self> {
        // SAFETY: the caller's promise.
        let (base, layout, memory, _) = unsafe { read(view, what) }?;
        // SAFETY: `read` checked alignment and address range; the memory is valid by the caller's promise.
        let view = unsafe { Self::from_parts(base, layout, memory) };
        reach.check(&view).map_err(|error| error.context(what))?;
        Ok(view)
    }
}

impl ViewMut<'_> {
    /// Points into `self`, which has to stay where it is while the result is used.
    pub(crate) fn as_raw(&self) -> sh_view {
        let (base, layout) = self.parts();
        to_raw(base, layout, self.memory(), 0)
    }

    /// As [`View::from_raw`], for memory that is written.
    ///
    /// # Safety
    /// As [`View::from_raw`], and the memory may be written.
    pub(crate) unsafe fn from_raw(view: *const sh_view, what: &str, reach: Reach) -> Result<Self> {
        // SAFETY: the caller's promise.
        let (base, layout, memory, flags) = unsafe { read(view, what) }?;
        if flags & SH_VIEW_READ_ONLY != 0 {
            return Err(Error::invalid_argument(format!("{what} is read-only but would be written")));
        }
        layout.check_writable().map_err(|error| error.context(what))?;
        // SAFETY: `read` checked alignment and address range; the memory is valid by the caller's promise.
        let view = unsafe { Self::from_parts(base.cast_mut(), layout, memory) };
        reach.check(&view.as_view()).map_err(|error| error.context(what))?;
        Ok(view)
    }
}

/// # Safety
/// As [`View::from_raw`].
unsafe fn read(view: *const sh_view, what: &str) -> Result<(*const u8, Layout, Memory, u32)> {
    // SAFETY: the caller's promise.
    let view = unsafe { ffi::read_struct(view, what) }?;
    let tensor = view.tensor;
    if view.flags & !SH_VIEW_READ_ONLY != 0 {
        return Err(Error::invalid_argument(format!("{what}: unknown flags {:#x}", view.flags)));
    }
    let memory = match device_from_raw(tensor.device).map_err(|error| error.context(what))? {
        Device::Cpu => Memory::Main,
        Device::Cuda(ordinal) => Memory::Cuda { ordinal, stream: view.stream },
    };
    let dtype = dtype_from_raw(tensor.dtype, what)?;
    let ndim = usize::try_from(tensor.ndim).ok().filter(|&ndim| ndim <= MAX_DIMS);
    let ndim = ndim.ok_or_else(|| {
        Error::invalid_argument(format!("{what}: ndim {} is not between 0 and {MAX_DIMS}", tensor.ndim))
    })?;
    // SAFETY: null or `ndim` extents by the caller's promise.
    let shape = unsafe { ffi::read_array(tensor.shape.cast_const(), ndim as u64, &format!("{what}: shape")) }?;
    let extents: Option<Vec<usize>> = shape.iter().map(|&extent| usize::try_from(extent).ok()).collect();
    let extents = extents.ok_or_else(|| Error::invalid_argument(format!("{what}: negative extent in {shape:?}")))?;
    let strides = if tensor.strides.is_null() {
        None
    } else {
        // SAFETY: not null, so `ndim` strides by the caller's promise.
        Some(unsafe { ffi::read_array(tensor.strides.cast_const(), ndim as u64, &format!("{what}: strides")) }?)
    };
    let layout = Layout::new(dtype, &extents, strides.as_deref()).map_err(|error| error.context(what))?;
    let Some((low, high)) = layout.reach() else { return Ok((ptr::null(), layout, memory, view.flags)) };
    if tensor.data.is_null() {
        return Err(Error::invalid_argument(format!("{what}: data is NULL with shape {shape:?}")));
    }
    let size = dtype.size() as i128;
    let start = tensor.data.addr() as i128 + i128::from(tensor.byte_offset);
    if start + i128::from(low) * size < 0 || start + (i128::from(high) + 1) * size > isize::MAX as i128 {
        return Err(Error::invalid_argument(format!("{what}: elements lie outside the address space")));
    }
    if start % size != 0 {
        return Err(Error::invalid_argument(format!("{what}: elements are not aligned to {size} bytes")));
    }
    let first = tensor.data.cast_const().cast::<u8>().wrapping_add(tensor.byte_offset as usize);
    Ok((first, layout, memory, view.flags))
}
