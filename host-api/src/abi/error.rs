//! Status codes and the error struct.

use std::ffi::c_char;

use super::layout::{c_constants, c_structs};

/// One of the codes below.
pub type sh_status = i32;

c_constants! {
    /// Success.
    pub const SH_OK: i32 = 0;
    /// Null pointer, struct too small, unknown flag or constant, index out of range.
    pub const SH_INVALID_ARGUMENT: i32 = 1;
    /// The call is not legal in the instance's state.
    pub const SH_INVALID_STATE: i32 = 2;
    /// Another call on this instance is in progress.
    pub const SH_BUSY: i32 = 3;
    /// The configuration is not what the plugin takes.
    pub const SH_INVALID_CONFIG: i32 = 4;
    /// Understood, but not supported.
    pub const SH_UNSUPPORTED: i32 = 5;
    /// No such file, tap, parameter, plugin id.
    pub const SH_NOT_FOUND: i32 = 6;
    /// A file does not hold what it should.
    pub const SH_INVALID_DATA: i32 = 7;
    /// A view's shape does not fit.
    pub const SH_SHAPE_MISMATCH: i32 = 8;
    /// A view's dtype does not fit.
    pub const SH_DTYPE_MISMATCH: i32 = 9;
    /// NaN or infinity where numbers are needed.
    pub const SH_NON_FINITE: i32 = 10;
    /// The host's `cancelled` said so.
    pub const SH_CANCELLED: i32 = 11;
    /// A function of the host failed.
    pub const SH_HOST_FAILED: i32 = 12;
    /// Memory ran out.
    pub const SH_OUT_OF_MEMORY: i32 = 13;
    /// A fault that is not the caller's.
    pub const SH_INTERNAL: i32 = 14;
    /// A fault was caught in this call; the instance is poisoned.
    pub const SH_PANIC: i32 = 15;
    /// An earlier call ended in `SH_PANIC`.
    pub const SH_POISONED: i32 = 16;

    /// Bytes of [`sh_error::message`].
    pub const SH_ERROR_MESSAGE_SIZE: usize = 512;
}

c_structs! {
    /// Owned by the caller, filled by the callee when a call fails.
    pub struct sh_error {
        /// The caller's `sizeof`.
        pub struct_size: u32,
        /// `SH_*`.
        pub code: sh_status,
        /// UTF-8, NUL-terminated.
        pub message: [c_char; SH_ERROR_MESSAGE_SIZE],
    }
}
