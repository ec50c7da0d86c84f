//! DLPack's structs, under the header's names.

use std::ffi::c_void;

use super::layout::{c_constants, c_structs};

c_structs! {
    /// Where data is.
    pub struct sh_device {
        /// `SH_DEVICE_*`, DLPack's `DLDeviceType`.
        pub device_type: i32,
        /// Ordinal of the device; 0 for the CPU.
        pub device_id: i32,
    }

    /// Element type.
    pub struct sh_dtype {
        /// `SH_DTYPE_*`, DLPack's `DLDataTypeCode`.
        pub code: u8,
        /// Bits of an element.
        pub bits: u8,
        /// 1.
        pub lanes: u16,
    }

    /// A tensor without an owner.
    pub struct sh_tensor {
        /// Start of the memory.
        pub data: *mut c_void,
        /// Where `data` is.
        pub device: sh_device,
        /// Number of dimensions.
        pub ndim: i32,
        /// Element type.
        pub dtype: sh_dtype,
        /// `ndim` extents.
        pub shape: *mut i64,
        /// `ndim` strides in elements; null: row-major and contiguous.
        pub strides: *mut i64,
        /// From `data` to the first element.
        pub byte_offset: u64,
    }
}

c_constants! {
    /// Main memory.
    pub const SH_DEVICE_CPU: i32 = 1;
    /// A CUDA device.
    pub const SH_DEVICE_CUDA: i32 = 2;
    /// IEEE 754.
    pub const SH_DTYPE_FLOAT: i32 = 2;
    /// bfloat16.
    pub const SH_DTYPE_BFLOAT: i32 = 4;
}
