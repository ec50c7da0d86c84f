//! The plugin's table.

use std::ffi::c_void;

use super::dlpack::sh_device;
use super::error::{sh_error, sh_status};
use super::layout::{c_constants, c_structs};
use super::report::sh_report;
use super::sampling::{sh_model, sh_run, sh_step};
use super::view::{sh_string, sh_view};

c_constants! {
    /// The host extension `SH_HOST_GRADIENT`.
    pub const SH_NEEDS_GRADIENT: u32 = 1;
    /// `sh_text.context`.
    pub const SH_NEEDS_CONTEXT: u32 = 2;
    /// `sh_text.pooled`, or context and `end_of_text`.
    pub const SH_NEEDS_POOLED: u32 = 4;
    /// The host extension `SH_HOST_WEIGHTS`.
    pub const SH_NEEDS_WEIGHTS: u32 = 8;
}

c_structs! {
    /// What begin and step will ask of the host.
    pub struct sh_needs {
        /// The caller's `sizeof`.
        pub struct_size: u32,
        /// `SH_NEEDS_*`.
        pub flags: u32,
        /// The U-Net block whose output is used.
        pub tap: sh_string,
    }

    /// One instance.
    pub struct sh_plugin {
        /// The plugin's `sizeof`.
        pub struct_size: u32,
        /// 0.
        pub reserved: u32,
        /// The plugin's own.
        pub instance: *mut c_void,
        /// Ends the instance.
        pub destroy: Option<unsafe extern "C" fn(*const sh_plugin)>,
        /// Fits the plugin to a model.
        pub prepare: Option<unsafe extern "C" fn(*const sh_plugin, *const sh_model, sh_device, *mut sh_error) -> sh_status>,
        /// What begin and step will ask of the host.
        pub needs: Option<unsafe extern "C" fn(*const sh_plugin, *mut sh_needs, *mut sh_error) -> sh_status>,
        /// Starts a run.
        pub begin: Option<unsafe extern "C" fn(*const sh_plugin, *const sh_run, *mut sh_error) -> sh_status>,
        /// Corrects the latents of one step.
        pub step: Option<
            unsafe extern "C" fn(
                *const sh_plugin,
                *const sh_step,
                *const sh_view,
                *const sh_view,
                *mut sh_report,
                *mut sh_error,
            ) -> sh_status,
        >,
        /// Ends the run.
        pub end: Option<unsafe extern "C" fn(*const sh_plugin, *mut sh_error) -> sh_status>,
        /// Bytes that the instance holds now.
        pub memory: Option<unsafe extern "C" fn(*const sh_plugin) -> u64>,
        /// The plugin extension of that id, or null.
        pub extension: Option<unsafe extern "C" fn(*const sh_plugin, sh_string) -> *const c_void>,
    }
}
