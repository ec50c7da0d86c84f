//! For plugin authors: implement [`Plugin`], then name the type in [`export_plugins!`](crate::export_plugins) in a crate of
//! type `cdylib`. The wrapper around it keeps the rules of the header: states, one call at a time, checked views, caught
//! panics, and latents that are only written when a step succeeds.

mod extensions;
mod handle;
mod instance;
mod latents;
mod lora;
mod lora_file;
mod params;
mod registration;
mod slot;
mod split;
mod step;
mod tables;

use std::sync::Arc;

pub use handle::{HostGradient, HostHandle, HostWeights};
pub use latents::Latents;
pub use lora::{Lora, LoraEntry, LoraLayout};
pub use params::{ParamKind, ParamSpec, Params};
pub use registration::{PluginList, Registration, entry};

use crate::error::Result;
use crate::types::{Descriptor, Device, Model, Needs, Report, Run, Step};
use crate::view::{DeviceMemory, Dtype, Lent, Reach, View};

/// A plugin. The functions are called in the order of the states: create, prepare, begin, step, end; never two at a time.
///
/// A function that fails leaves the plugin as it was before the call, so that the host may go on or try again. After a
/// panic nothing but drop follows.
pub trait Plugin: Send + Sized + 'static {
    /// What the library says of this plugin.
    const DESCRIPTOR: Descriptor;

    /// How views on devices are reached. Without it every view is in main memory, and hosts with others are refused.
    fn device_memory() -> Option<&'static dyn DeviceMemory> {
        None
    }

    /// A new instance. `config` is a JSON object or empty.
    fn create(host: HostHandle, config: &str) -> Result<Self>;

    /// Fits the plugin to a model whose latents will be on `device`. Called again when weights changed.
    fn prepare(&mut self, model: &Model<'_>, device: Device) -> Result<()>;

    /// What `begin` and `step` will ask of the host. Called after `prepare`.
    fn needs(&self) -> Needs;

    /// Starts a run. Not called for a batch of 0, whose steps do nothing.
    fn begin(&mut self, run: &Run<'_>) -> Result<()>;

    /// Corrects the latents before a noise prediction. What is written with [`Latents::write_item`] or [`Latents::write`]
    /// reaches the host only when this returns `Ok` and the host has not cancelled. When an item cannot be corrected, set its status in `report`:
    /// it stays as it was, whatever was written. With an outcome other than [`Outcome::Corrected`](crate::Outcome), write
    /// nothing.
    fn step(&mut self, step: &Step<'_>, latents: &mut Latents<'_>, report: &mut Report) -> Result<()>;

    /// Whether [`Plugin::score`] and [`Plugin::apply`], the two halves of a step, are implemented.
    const SPLIT: bool = false;

    /// The first half of a step, for a host with an autograd of its own: from the features `[B, C, h, w]` of the block that
    /// `needs` names to each item's score and, when the outcome is [`Outcome::Corrected`](crate::Outcome) and `cotangent` is
    /// wanted, the scores' gradient for the features, of their shape. It says in which type the gradient is wanted: what is in main
    /// memory may be of any. Without features only the outcome is asked for.
    fn score(
        &mut self,
        step: &Step<'_>,
        features: Option<&View<'_>>,
        cotangent: Option<Dtype>,
        report: &mut Report,
    ) -> Result<Option<Lent>> {
        let _ = (step, features, cotangent, report);
        Err(split::absent())
    }

    /// The second half: as [`Plugin::step`], with the scores' gradient for the latents, of their shape and in VP space.
    fn apply(
        &mut self,
        step: &Step<'_>,
        latents: &mut Latents<'_>,
        gradient: &View<'_>,
        report: &mut Report,
    ) -> Result<()> {
        let _ = (step, latents, gradient, report);
        Err(split::absent())
    }

    /// Ends the run, finished or not. Not called for a batch of 0.
    fn end(&mut self) -> Result<()>;

    /// Bytes of weights and buffers held now.
    fn memory(&self) -> u64;

    /// Parameters that a user may turn, from any thread, also during a step. Asked once, after `create`.
    fn params(&self) -> Option<Arc<Params>> {
        None
    }

    /// Low-rank weights that the host merges into its model. Asked once, after `create`.
    fn lora(&self) -> Option<Arc<Lora>> {
        None
    }
}

/// The memory that `P` can reach.
pub(crate) fn reach<P: Plugin>() -> Reach {
    Reach(P::device_memory())
}
