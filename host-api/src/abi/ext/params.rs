//! `sampler-hook.params/1`: parameters that a user may turn.

use crate::abi::layout::{c_constants, c_structs};
use crate::abi::{sh_error, sh_plugin, sh_status, sh_string};

c_constants! {
    /// A number.
    pub const SH_PARAM_FLOAT: i32 = 1;
    /// A whole number.
    pub const SH_PARAM_INTEGER: i32 = 2;
    /// 0 or 1.
    pub const SH_PARAM_BOOLEAN: i32 = 3;
    /// `0 .. choice_count - 1`.
    pub const SH_PARAM_CHOICE: i32 = 4;

    /// May change during a run.
    pub const SH_PARAM_LIVE: u32 = 1;
    strings {
        /// Id of the plugin extension.
        pub const SH_PLUGIN_PARAMS = "sampler-hook.params/1";
    }
}

c_structs! {
    /// One parameter; owned by the caller.
    pub struct sh_param {
        /// The caller's `sizeof`.
        pub struct_size: u32,
        /// `SH_PARAM_FLOAT` ... `SH_PARAM_CHOICE`.
        pub kind: i32,
        /// The key in the configuration.
        pub name: sh_string,
        /// For people.
        pub description: sh_string,
        /// Empty when it has none.
        pub unit: sh_string,
        /// Smallest value.
        pub minimum: f64,
        /// Largest value.
        pub maximum: f64,
        /// Value without configuration.
        pub default_value: f64,
        /// `SH_PARAM_LIVE`.
        pub flags: u32,
        /// Length of `choices`.
        pub choice_count: u32,
        /// Names of the choices.
        pub choices: *const sh_string,
    }

    /// The plugin's functions.
    pub struct sh_plugin_params {
        /// The plugin's `sizeof`.
        pub struct_size: u32,
        /// 0.
        pub reserved: u32,
        /// Number of parameters.
        pub count: Option<unsafe extern "C" fn(*const sh_plugin) -> u32>,
        /// One parameter.
        pub info: Option<unsafe extern "C" fn(*const sh_plugin, u32, *mut sh_param, *mut sh_error) -> sh_status>,
        /// Its value.
        pub get: Option<unsafe extern "C" fn(*const sh_plugin, u32, *mut f64, *mut sh_error) -> sh_status>,
        /// Sets it.
        pub set: Option<unsafe extern "C" fn(*const sh_plugin, u32, f64, *mut sh_error) -> sh_status>,
        /// JSON schema of the configuration.
        pub schema: Option<unsafe extern "C" fn(*const sh_plugin) -> sh_string>,
    }
}
