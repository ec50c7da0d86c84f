//! The header `sampler_hook.h` in Rust: the same names, the same layout, no behaviour.
//!
//! The header is the specification and says what every member means; the lines here only remind. Structs and constants
//! are defined by macros that register them, so that [`structs`] and [`constants`] are complete and a test can hold them
//! against the C compiler.
#![allow(non_camel_case_types)]

mod dlpack;
mod entry;
mod error;
mod ext;
mod host;
mod layout;
mod plugin;
mod report;
mod sampling;
mod view;

pub use dlpack::*;
pub use entry::*;
pub use error::*;
pub use ext::gradient::*;
pub use ext::lora::*;
pub use ext::params::*;
pub use ext::progress::*;
pub use ext::split::*;
pub use ext::weights::*;
pub use host::*;
pub(crate) use layout::equal;
pub use layout::{Constant, ConstantValue, FieldLayout, StructLayout};
pub use plugin::*;
pub use report::*;
pub use sampling::*;
pub use view::*;

const ALL_STRUCTS: [&[StructLayout]; 14] = [
    dlpack::STRUCTS,
    entry::STRUCTS,
    error::STRUCTS,
    ext::gradient::STRUCTS,
    ext::lora::STRUCTS,
    ext::params::STRUCTS,
    ext::progress::STRUCTS,
    ext::split::STRUCTS,
    ext::weights::STRUCTS,
    host::STRUCTS,
    plugin::STRUCTS,
    report::STRUCTS,
    sampling::STRUCTS,
    view::STRUCTS,
];

const ALL_CONSTANTS: [&[Constant]; 14] = [
    dlpack::CONSTANTS,
    entry::CONSTANTS,
    error::CONSTANTS,
    ext::gradient::CONSTANTS,
    ext::lora::CONSTANTS,
    ext::params::CONSTANTS,
    ext::progress::CONSTANTS,
    ext::split::CONSTANTS,
    ext::weights::CONSTANTS,
    host::CONSTANTS,
    plugin::CONSTANTS,
    report::CONSTANTS,
    sampling::CONSTANTS,
    view::CONSTANTS,
];

/// The text of the header that this mirrors.
pub const HEADER: &str = include_str!("../../include/sampler_hook.h");

/// Identifies the layout of the tables (entry, plugin, host); the Rust door compares it when a library is loaded.
pub const TABLES_FINGERPRINT: u64 = layout::fingerprint(entry::STRUCTS, &["sh_entry"])
    ^ layout::fingerprint(plugin::STRUCTS, &["sh_plugin"]).rotate_left(1)
    ^ layout::fingerprint(host::STRUCTS, &["sh_host"]).rotate_left(2);

/// Every struct of the header.
pub fn structs() -> impl Iterator<Item = &'static StructLayout> {
    ALL_STRUCTS.into_iter().flatten()
}

/// Every constant of the header.
pub fn constants() -> impl Iterator<Item = &'static Constant> {
    ALL_CONSTANTS.into_iter().flatten()
}
