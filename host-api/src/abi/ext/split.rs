//! `sampler-hook.split/1`: the two halves of a step, for hosts with an autograd of their own.

use crate::abi::layout::{c_constants, c_structs};
use crate::abi::{sh_error, sh_plugin, sh_report, sh_status, sh_step, sh_view};

c_constants! {
    strings {
        /// Id of the plugin extension.
        pub const SH_PLUGIN_SPLIT = "sampler-hook.split/1";
    }
}

c_structs! {
    /// The plugin's functions.
    pub struct sh_plugin_split {
        /// The plugin's `sizeof`.
        pub struct_size: u32,
        /// 0.
        pub reserved: u32,
        /// From features to scores and their gradient for the features.
        pub score: Option<
            unsafe extern "C" fn(
                *const sh_plugin,
                *const sh_step,
                *const sh_view,
                *const sh_view,
                *mut sh_report,
                *mut sh_error,
            ) -> sh_status,
        >,
        /// From the gradient for the latents to corrected latents.
        pub apply: Option<
            unsafe extern "C" fn(
                *const sh_plugin,
                *const sh_step,
                *const sh_view,
                *const sh_view,
                *const sh_view,
                *mut sh_report,
                *mut sh_error,
            ) -> sh_status,
        >,
    }
}
