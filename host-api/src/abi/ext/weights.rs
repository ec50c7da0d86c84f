//! `sampler-hook.weights/1`: the host's U-Net weights.

use crate::abi::layout::{c_constants, c_structs};
use crate::abi::{sh_error, sh_host, sh_status, sh_string, sh_view};

c_constants! {
    strings {
        /// Id of the host extension.
        pub const SH_HOST_WEIGHTS = "sampler-hook.weights/1";
    }
}

c_structs! {
    /// The host's functions.
    pub struct sh_host_weights {
        /// The host's `sizeof`.
        pub struct_size: u32,
        /// 0.
        pub reserved: u32,
        /// Another number whenever a tensor has changed.
        pub revision: Option<unsafe extern "C" fn(*const sh_host) -> u64>,
        /// Number of tensors.
        pub count: Option<unsafe extern "C" fn(*const sh_host) -> u64>,
        /// The diffusers name of a tensor.
        pub name: Option<unsafe extern "C" fn(*const sh_host, u64, *mut sh_string, *mut sh_error) -> sh_status>,
        /// A tensor and its own revision.
        pub tensor: Option<unsafe extern "C" fn(*const sh_host, u64, *mut sh_view, *mut u64, *mut sh_error) -> sh_status>,
    }
}
