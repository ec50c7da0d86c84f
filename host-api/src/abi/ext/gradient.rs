//! `sampler-hook.gradient/1`: the host's own U-Net, up to a block's output and back.

use crate::abi::layout::{c_constants, c_structs};
use crate::abi::{sh_error, sh_host, sh_status, sh_step, sh_string, sh_view};

c_constants! {
    strings {
        /// Id of the host extension.
        pub const SH_HOST_GRADIENT = "sampler-hook.gradient/1";
    }
}

c_structs! {
    /// The host's functions.
    pub struct sh_host_gradient {
        /// The host's `sizeof`.
        pub struct_size: u32,
        /// 0.
        pub reserved: u32,
        /// The output of a block for the latents of this step.
        pub features: Option<
            unsafe extern "C" fn(
                *const sh_host,
                *const sh_step,
                *const sh_view,
                sh_string,
                *mut sh_view,
                *mut sh_error,
            ) -> sh_status,
        >,
        /// The vector-Jacobian product of the last `features`.
        pub vjp: Option<unsafe extern "C" fn(*const sh_host, *const sh_view, *const sh_view, *mut sh_error) -> sh_status>,
        /// Drops the last activation.
        pub release: Option<unsafe extern "C" fn(*const sh_host)>,
    }
}
