//! For host authors: open a [`Library`], create an [`Instance`] with a [`Host`], and call its steps. No `unsafe` is needed.

mod bridge;
mod door;
mod extensions;
mod gradient;
mod instance;
mod library;
mod plugin;

pub use extensions::{InstanceLora, InstanceParams};
pub use instance::Instance;
pub use library::{Door, Library};

use crate::error::Result;
use crate::types::Step;
use crate::view::View;

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

    /// The host's own U-Net, when it lends it. The answer to the first call holds for the life of an instance.
    fn gradient(&self) -> Option<&dyn Gradient> {
        None
    }
}

/// The host extension `sampler-hook.gradient/1`. Called inside a step, on its thread.
pub trait Gradient: Send + Sync {
    /// The output `[B, C, h, w]` of block `tap` for the `latents` `[B, c, H, W]`, in VP space whatever the step's space is,
    /// with the conditional text only: its shape and its numbers in row-major order.
    fn features(&self, step: &Step<'_>, latents: &View<'_>, tap: &str) -> Result<(Vec<usize>, Vec<f32>)>;

    /// The gradient of `sum(cotangent * activation)` with respect to the latents of the last `features` call, in row-major
    /// order. The activation is not asked for again, also when this fails.
    fn vjp(&self, cotangent: &View<'_>) -> Result<Vec<f32>>;

    /// Drops what the last `features` call kept.
    fn release(&self);
}
