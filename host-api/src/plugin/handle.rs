//! The host, as a plugin sees it.

use std::fmt;
use std::sync::Arc;

use super::slot::HostSlot;
use crate::error::{Error, Result};
use crate::types::Step;
use crate::view::{View, ViewMut};

/// The host that created the instance. Threads of the plugin may keep clones: once the instance is destroyed, messages go
/// nowhere and `cancelled` is true.
#[derive(Clone)]
pub struct HostHandle {
    slot: Arc<HostSlot>,
}

impl HostHandle {
    pub(super) fn new(slot: Arc<HostSlot>) -> Self {
        Self { slot }
    }

    /// The host's name.
    pub fn name(&self) -> &str {
        self.slot.name()
    }

    /// The host's version.
    pub fn version(&self) -> &str {
        self.slot.version()
    }

    /// A message for the user.
    pub fn log(&self, level: log::Level, message: &str) {
        self.slot.log(level, message);
    }

    /// Whether the step in progress should stop. A step that stops for this returns
    /// [`Status::Cancelled`](crate::Status::Cancelled); the wrapper asks before and after each step anyway.
    pub fn cancelled(&self) -> bool {
        self.slot.cancelled()
    }

    /// The host's own U-Net, when it lends it.
    pub fn gradient(&self) -> Option<HostGradient> {
        self.slot.has_gradient().then(|| HostGradient { slot: self.slot.clone() })
    }
}

impl HostHandle {
    /// The host's U-Net weights, when it lends them.
    pub fn weights(&self) -> Option<HostWeights> {
        self.slot.has_weights().then(|| HostWeights { slot: self.slot.clone() })
    }

    /// Shows the user that `done` parts of `total` of a task are finished.
    pub fn progress(&self, task: &str, done: usize, total: usize) {
        self.slot.report_progress(task, done as u64, total as u64);
    }
}

/// The host extension `sampler-hook.weights/1`. Its functions may only be called inside `prepare`, `begin` and `step`, on their
/// thread.
#[derive(Clone)]
pub struct HostWeights {
    slot: Arc<HostSlot>,
}

impl HostWeights {
    /// Another number whenever a tensor has changed.
    pub fn revision(&self) -> Result<u64> {
        self.slot.weights_revision()
    }

    /// The tensors' diffusers names, in the order of their indices.
    pub fn names(&self) -> Result<Vec<String>> {
        self.slot.weight_names()
    }

    /// Another number whenever the tensor at `index` has changed.
    pub fn tensor_revision(&self, index: usize) -> Result<u64> {
        self.slot.weight_revision(index)
    }

    /// Calls `read` with the tensor at `index`, which is valid until it returns.
    pub fn tensor<T>(&self, index: usize, read: impl FnOnce(&View<'_>) -> Result<T>) -> Result<T> {
        self.slot.weight(index, read)
    }
}

impl fmt::Debug for HostWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostWeights of {}", self.slot.name())
    }
}

impl fmt::Debug for HostHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostHandle({} {})", self.name(), self.version())
    }
}

/// The host extension `sampler-hook.gradient/1`. Its functions may only be called inside `step`, on its thread. An activation
/// that is left when the step ends is released.
#[derive(Clone)]
pub struct HostGradient {
    slot: Arc<HostSlot>,
}

impl HostGradient {
    /// Calls `read` with the output `[B, C, h, w]` of block `tap` for `latents` `[B, c, H, W]` in VP space at this step.
    pub fn features<T>(
        &self,
        step: &Step<'_>,
        latents: &View<'_>,
        tap: &str,
        read: impl FnOnce(&View<'_>) -> Result<T>,
    ) -> Result<T> {
        self.slot.features(step, latents, tap, read)
    }

    /// Writes the gradient of `sum(cotangent * activation)` with respect to the latents of the last `features` call, which it
    /// ends, to `gradient` of their shape.
    pub fn vjp(&self, cotangent: &View<'_>, gradient: &mut ViewMut<'_>) -> Result<()> {
        self.slot.vjp(cotangent, gradient)
    }

    /// Drops the last activation; nothing when there is none.
    pub fn release(&self) {
        self.slot.release();
    }
}

impl fmt::Debug for HostGradient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostGradient of {}", self.slot.name())
    }
}

/// What a failure of the host becomes for the plugin.
pub(super) fn host_failed(what: &str, error: Error) -> Error {
    use crate::error::Status;
    let status = if error.status == Status::Cancelled { Status::Cancelled } else { Status::HostFailed };
    Error::new(status, format!("host {what}: {}", error.message))
}
