use std::ffi::c_void;

use candle_core::{CpuStorage, Storage, Tensor};
use host_api::{Lent, Memory, Result, View};

use crate::{Held, candle_failed, dtype_of};

/// A tensor of f32, f16 or bf16 for the other side to read, where it is; it must not be written in place meanwhile.
pub fn lend(tensor: &Tensor) -> Result<Lent> {
    let tensor = tensor.contiguous().map_err(candle_failed)?;
    let dtype = dtype_of(tensor.dtype())?;
    let (start, memory) = {
        let (storage, layout) = tensor.storage_and_layout();
        let (base, memory) = match &*storage {
            Storage::Cpu(storage) => (in_main_memory(storage), Memory::Main),
            #[cfg(feature = "cuda")]
            Storage::Cuda(storage) => crate::cuda::position(storage)?,
            _ => unreachable!("a device of this build"),
        };
        (base.cast::<u8>().wrapping_add(layout.start_offset() * dtype.size()), memory)
    };
    let shape = tensor.dims().to_vec();
    // SAFETY: the storage has the layout's elements, stays where it is while the tensor lives, and on a device is used in the order
    // of candle's stream.
    let view = unsafe { View::of_memory(start.cast(), dtype, &shape, None, memory) }?;
    let device = tensor.device().clone();
    // SAFETY: as above.
    Ok(unsafe { Lent::owned(view, Held::new(tensor, &device)) })
}

fn in_main_memory(storage: &CpuStorage) -> *const c_void {
    match storage {
        CpuStorage::F32(values) => values.as_ptr().cast(),
        CpuStorage::F16(values) => values.as_ptr().cast(),
        CpuStorage::BF16(values) => values.as_ptr().cast(),
        _ => unreachable!("the dtype was looked at"),
    }
}
