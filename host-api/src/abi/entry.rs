//! The library's table.

use super::error::{sh_error, sh_status};
use super::host::sh_host;
use super::layout::{c_constants, c_structs};
use super::plugin::sh_plugin;
use super::view::sh_string;

c_constants! {
    /// Major version of the interface.
    pub const SH_ABI_MAJOR: u32 = 0;
    /// Minor version of the interface.
    pub const SH_ABI_MINOR: u32 = 3;
    strings {
        /// The one symbol that a plugin library exports.
        pub const SH_ENTRY_SYMBOL = "sampler_hook_entry";
    }
}

c_structs! {
    /// Describes one plugin of a library.
    pub struct sh_descriptor {
        /// The library's `sizeof`.
        pub struct_size: u32,
        /// 0.
        pub reserved: u32,
        /// Stable id.
        pub id: sh_string,
        /// For people.
        pub name: sh_string,
        /// Of the plugin.
        pub version: sh_string,
        /// Who made it.
        pub vendor: sh_string,
        /// What it does.
        pub description: sh_string,
    }

    /// The library.
    pub struct sh_entry {
        /// The library's `sizeof`.
        pub struct_size: u32,
        /// The library's `SH_ABI_MAJOR`.
        pub abi_major: u32,
        /// The library's `SH_ABI_MINOR`.
        pub abi_minor: u32,
        /// Number of plugins.
        pub plugin_count: u32,
        /// Null when the index is out of range.
        pub descriptor: Option<unsafe extern "C" fn(u32) -> *const sh_descriptor>,
        /// Creates an instance.
        pub create: Option<
            unsafe extern "C" fn(
                sh_string,
                *const sh_host,
                sh_string,
                *mut *const sh_plugin,
                *mut sh_error,
            ) -> sh_status,
        >,
    }
}

/// The type of the exported symbol.
pub type sh_entry_fn = Option<unsafe extern "C" fn(u32) -> *const sh_entry>;
