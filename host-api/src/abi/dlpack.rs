//! DLPack's structs.

use std::ffi::c_void;

use super::layout::{c_constants, c_structs};

c_structs! {
    /// Where data is.
    pub struct DLDevice {
        /// `SH_DEVICE_*`, DLPack's `DLDeviceType`.
        pub device_type: i32,
        /// Ordinal of the device; 0 for the CPU.
        pub device_id: i32,
    }

    /// Element type.
    pub struct DLDataType {
        /// 0 int, 1 unsigned, 2 float, 4 bfloat.
        pub code: u8,
        /// Bits of an element.
        pub bits: u8,
        /// 1.
        pub lanes: u16,
    }

    /// A tensor without an owner.
    pub struct DLTensor {
        /// Start of the memory.
        pub data: *mut c_void,
        /// Where `data` is.
        pub device: DLDevice,
        /// Number of dimensions.
        pub ndim: i32,
        /// Element type.
        pub dtype: DLDataType,
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
}
