//! For host authors: open a [`Library`], create an [`Instance`] with a [`Host`], and call its steps. No `unsafe` is needed.

mod bridge;
mod door;
mod extensions;
mod gradient;
mod instance;
mod library;
mod plugin;
mod split;
mod weights;

pub use extensions::{InstanceLora, InstanceParams};
pub use instance::Instance;
pub use library::{Door, Library};
pub use split::InstanceSplit;

use crate::error::Result;
use crate::types::Step;
use crate::view::{DeviceMemory, Lent, View, ViewMut};

/// What a host offers its plugins. All functions but those of the gradient may be called from any thread at any time.
/// Panics are caught: `log` is then lost, `cancelled` is then true.
pub trait Host: Send + Sync + 'static {
    /// The host's name.
    fn name(&self) -> &str;

    /// The host's version.
    fn version(&self) -> &str;

    /// A message for the user.
    fn log(&self, level: log::Level, message: &str);

    /// Whether the user wants the step in progress to stop.
    fn cancelled(&self) -> bool {
        false
    }

    /// How views on devices are reached, which the plugin may pass to gradient and weights where the latents are there. Without it
    /// they are refused.
    fn device_memory(&self) -> Option<&'static dyn DeviceMemory> {
        None
    }

    /// The host's own U-Net, when it lends it. The answer to the first call holds for the life of an instance.
    fn gradient(&self) -> Option<&dyn Gradient> {
        None
    }

    /// The host's U-Net weights, when it lends them. The answer to the first call holds for the life of an instance.
    fn weights(&self) -> Option<&dyn Weights> {
        None
    }

    /// `done` parts of `total` of a plugin's task are finished.
    fn progress(&self, _task: &str, _done: u64, _total: u64) {}
}

/// The host extension `sampler-hook.weights/1`: the U-Net's tensors as they are when the host samples, by their diffusers names.
/// Called inside prepare, begin and step, on their thread.
pub trait Weights: Send + Sync {
    /// Another number whenever a tensor has changed.
    fn revision(&self) -> u64;

    /// The names, such as `conv_in.weight`. Asked once for the life of an instance.
    fn names(&self) -> Vec<String>;

    /// Another number whenever this tensor has changed.
    fn tensor_revision(&self, name: &str) -> Result<u64>;

    /// A tensor, kept until the next one is asked for.
    fn tensor(&self, name: &str) -> Result<Lent>;
}

/// The host extension `sampler-hook.gradient/1`. Called inside a step, on its thread.
pub trait Gradient: Send + Sync {
    /// The output `[B, C, h, w]` of block `tap` for the `latents` `[B, c, H, W]`, in VP space whatever the step's space is,
    /// with the conditional text only. The plugin's latents are on the device that `prepare` named, or in main memory.
    fn features(&self, step: &Step<'_>, latents: &View<'_>, tap: &str) -> Result<Lent>;

    /// Writes the gradient of `sum(cotangent * activation)` with respect to the latents of the last `features` call to
    /// `gradient`, of their shape. The activation is not asked for again, also when this fails.
    fn vjp(&self, cotangent: &View<'_>, gradient: &mut ViewMut<'_>) -> Result<()>;

    /// Drops what the last `features` call kept.
    fn release(&self);
}
