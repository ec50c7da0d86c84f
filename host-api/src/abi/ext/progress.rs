//! `sampler-hook.progress/1`: what a plugin is busy with.

use crate::abi::layout::{c_constants, c_structs};
use crate::abi::{sh_host, sh_string};

c_constants! {
    strings {
        /// Id of the host extension.
        pub const SH_HOST_PROGRESS = "sampler-hook.progress/1";
    }
}

c_structs! {
    /// The host's functions.
    pub struct sh_host_progress {
        /// The host's `sizeof`.
        pub struct_size: u32,
        /// 0.
        pub reserved: u32,
        /// Parts of a task that are finished.
        pub progress: Option<unsafe extern "C" fn(*const sh_host, sh_string, u64, u64)>,
    }
}
