//! `sampler-hook.lora/1`: low-rank weights that belong to the plugin.

use crate::abi::layout::{c_constants, c_structs};
use crate::abi::{sh_error, sh_plugin, sh_status, sh_string, sh_view};

c_constants! {
    /// `unet.<module>.lora_A.weight`, `lora_B.weight`, `alpha`.
    pub const SH_LORA_PEFT: i32 = 1;
    /// `lora_unet_<module with _ for .>.lora_down.weight`, `lora_up.weight`, `alpha`.
    pub const SH_LORA_KOHYA: i32 = 2;
    strings {
        /// Id of the plugin extension.
        pub const SH_PLUGIN_LORA = "sampler-hook.lora/1";
    }
}

c_structs! {
    /// One entry; owned by the caller.
    pub struct sh_lora_entry {
        /// The caller's `sizeof`.
        pub struct_size: u32,
        /// Rows of `down`.
        pub rank: u32,
        /// Diffusers path.
        pub module: sh_string,
        /// `[rank, in]`.
        pub down: *const sh_view,
        /// `[out, rank]`.
        pub up: *const sh_view,
        /// `alpha / rank`, or 1.
        pub scale: f64,
    }

    /// The plugin's functions.
    pub struct sh_plugin_lora {
        /// The plugin's `sizeof`.
        pub struct_size: u32,
        /// 0.
        pub reserved: u32,
        /// Number of entries.
        pub count: Option<unsafe extern "C" fn(*const sh_plugin) -> u64>,
        /// One entry.
        pub entry: Option<unsafe extern "C" fn(*const sh_plugin, u64, *mut sh_lora_entry, *mut sh_error) -> sh_status>,
        /// Adds an entry to a weight in place.
        pub merge: Option<unsafe extern "C" fn(*const sh_plugin, u64, f64, *const sh_view, *mut sh_error) -> sh_status>,
        /// Writes all entries as a safetensors file.
        pub write: Option<unsafe extern "C" fn(*const sh_plugin, sh_string, i32, *mut sh_error) -> sh_status>,
    }
}
