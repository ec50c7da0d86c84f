//! What the driver knows of an address.

use std::ffi::c_void;

use candle_core::cuda::cudarc::driver::sys::{self, CUpointer_attribute as Attribute, CUresult};

/// Where memory is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Whereabouts {
    /// On the device of that ordinal.
    Device(usize),
    /// In main memory, pinned or not.
    Main,
    /// Anywhere: managed memory, or the driver does not say.
    Anywhere,
}

pub(super) fn whereabouts(address: *const c_void) -> Whereabouts {
    match attribute(Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address) {
        Ok(kind) if kind == sys::CUmemorytype::CU_MEMORYTYPE_HOST as u64 => Whereabouts::Main,
        Ok(kind) if kind == sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u64 => {
            let managed = attribute(Attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED, address);
            match (managed, attribute(Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address)) {
                (Ok(0), Ok(ordinal)) => Whereabouts::Device(ordinal as usize),
                _ => Whereabouts::Anywhere,
            }
        }
        // Memory that the driver has never seen.
        Err(CUresult::CUDA_ERROR_INVALID_VALUE) => Whereabouts::Main,
        _ => Whereabouts::Anywhere,
    }
}

/// The attributes asked for here are of 32 bits or less.
fn attribute(attribute: Attribute, address: *const c_void) -> Result<u64, CUresult> {
    let mut value = 0u64;
    // SAFETY: the value has room for the attribute; the driver looks the address up and does not follow it.
    match unsafe { sys::cuPointerGetAttribute((&raw mut value).cast(), attribute, address.addr() as u64) } {
        CUresult::CUDA_SUCCESS => Ok(value),
        error => Err(error),
    }
}
