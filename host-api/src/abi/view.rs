//! Strings and tensor views.

use std::ffi::{c_char, c_void};

use super::dlpack::sh_tensor;
use super::layout::{c_constants, c_structs};

c_structs! {
    /// UTF-8 with a length, not NUL-terminated.
    pub struct sh_string {
        /// Start of the text; null when empty.
        pub data: *const c_char,
        /// Bytes.
        pub size: u64,
    }

    /// A borrowed tensor.
    pub struct sh_view {
        /// The caller's `sizeof`.
        pub struct_size: u32,
        /// `SH_VIEW_*`.
        pub flags: u32,
        /// The tensor.
        pub tensor: sh_tensor,
        /// CUDA stream; null on the CPU.
        pub stream: *mut c_void,
    }
}

c_constants! {
    /// Nobody may write to the view.
    pub const SH_VIEW_READ_ONLY: u32 = 1;
}

impl sh_string {
    /// A string that lives as long as the program.
    pub const fn from_static(text: &'static str) -> Self {
        Self { data: text.as_ptr().cast(), size: text.len() as u64 }
    }

    /// A string that borrows `text`; the caller keeps `text` alive while the other side may read it.
    pub const fn borrowing(text: &str) -> Self {
        Self { data: text.as_ptr().cast(), size: text.len() as u64 }
    }

    /// The empty string.
    pub const EMPTY: Self = Self { data: std::ptr::null(), size: 0 };
}
