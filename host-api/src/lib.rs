//! The sampler-hook ABI: how a host that samples a diffusion model and a plugin that hooks into its steps talk to each other.
//!
//! The C header `include/sampler_hook.h` is the specification; [`abi`] mirrors it. Neither a host author nor a plugin author
//! needs the mirror, or `unsafe`:
//!
//! - a plugin implements [`plugin::Plugin`] and is exported with [`export_plugins!`];
//! - a host implements [`host::Host`], opens a [`host::Library`] and drives a [`host::Instance`].
//!
//! The life of an instance, with the states of the header:
//!
//! 1. [`host::Library::create`] - CREATED; parameters that are not live can be set.
//! 2. [`host::Instance::prepare`] - PREPARED; again at any time outside a run.
//! 3. [`host::Instance::begin`] - RUNNING; the host merges LoRA entries before.
//! 4. [`host::Instance::step`] before every noise prediction.
//! 5. [`host::Instance::end`] - PREPARED.
//! 6. Drop, in any state.
//!
//! Data crosses as views of f32, f16 or bf16 memory with any strides; a plugin reads and writes `f32`. A failing step leaves
//! the latents as they were. A panic on either side becomes a [`Status`] on the other.

pub mod abi;
mod error;
pub mod export;
mod ffi;
pub mod host;
pub mod plugin;
mod types;
mod view;

pub use error::{Error, Result, Status};
pub use types::{Descriptor, Device, ItemReport, Model, Needs, Outcome, Prediction, Report, Run, Space, Step, Text};
pub use view::{DeviceMemory, Dtype, Element, Lent, Memory, View, ViewMut};
