//! The host's table.

use std::ffi::c_void;

use super::layout::{c_constants, c_structs};
use super::view::sh_string;

c_constants! {
    /// Log level.
    pub const SH_LOG_ERROR: i32 = 1;
    /// Log level.
    pub const SH_LOG_WARN: i32 = 2;
    /// Log level.
    pub const SH_LOG_INFO: i32 = 3;
    /// Log level.
    pub const SH_LOG_DEBUG: i32 = 4;
    /// Log level.
    pub const SH_LOG_TRACE: i32 = 5;
}

c_structs! {
    /// Given to `create`; lives until `destroy`.
    pub struct sh_host {
        /// The host's `sizeof`.
        pub struct_size: u32,
        /// 0.
        pub reserved: u32,
        /// The host's own.
        pub instance: *mut c_void,
        /// The host's name.
        pub name: sh_string,
        /// The host's version.
        pub version: sh_string,
        /// A message for the user.
        pub log: Option<unsafe extern "C" fn(*const sh_host, i32, sh_string)>,
        /// Nonzero when the step in progress should stop.
        pub cancelled: Option<unsafe extern "C" fn(*const sh_host) -> i32>,
        /// The host extension of that id, or null.
        pub extension: Option<unsafe extern "C" fn(*const sh_host, sh_string) -> *const c_void>,
    }
}
