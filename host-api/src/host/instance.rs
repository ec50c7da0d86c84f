//! One instance of a plugin, as a host sees it.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;

use super::extensions::{InstanceLora, InstanceParams};
use super::plugin::Plugin;
use super::split::InstanceSplit;
use crate::abi::{
    SH_NEEDS_CONTEXT, SH_NEEDS_GRADIENT, SH_NEEDS_POOLED, SH_NEEDS_WEIGHTS, sh_needs, sh_string, sh_view,
};
use crate::error::{Error, Result, Status};
use crate::ffi::text::RawText;
use crate::ffi::{self, read_string};
use crate::types::{Device, Model, Needs, Report, Run, Step};
use crate::view::{View, ViewMut};

/// One instance of a plugin; destroyed when it and what [`Instance::params`] and [`Instance::lora`] gave are dropped.
///
/// It may move between threads but is not shared: [`InstanceParams`] and [`InstanceLora`] are, also during a step.
pub struct Instance {
    plugin: Arc<Plugin>,
    /// Of the run in progress: the plugin counts to it in a step's texts.
    batch: Option<usize>,
    not_shared: PhantomData<Cell<()>>,
}

impl Instance {
    pub(super) fn new(plugin: Plugin) -> Self {
        Self { plugin: Arc::new(plugin), batch: None, not_shared: PhantomData }
    }

    /// Fits the plugin to a model whose latents will be on `device`. Again when weights changed.
    pub fn prepare(&mut self, model: &Model<'_>, device: Device) -> Result<()> {
        let model = model.as_raw()?;
        let device = ffi::view::device_to_raw(device);
        // SAFETY: the instance lives as long as `self`; the model borrows from the caller.
        self.plugin.call(self.plugin.table().prepare, |f, plugin, error| unsafe { f(plugin, &model, device, error) })
    }

    /// What `begin` and `step` will ask of the host.
    pub fn needs(&self) -> Result<Needs> {
        let mut needs = sh_needs { struct_size: ffi::struct_size::<sh_needs>(), flags: 0, tap: sh_string::EMPTY };
        // SAFETY: the instance lives as long as `self`.
        self.plugin.call(self.plugin.table().needs, |f, plugin, error| unsafe { f(plugin, &mut needs, error) })?;
        let known = SH_NEEDS_GRADIENT | SH_NEEDS_CONTEXT | SH_NEEDS_POOLED | SH_NEEDS_WEIGHTS;
        let unknown = needs.flags & !known;
        if unknown != 0 {
            let message = format!("the plugin needs what this host does not know: flags {unknown:#x}");
            return Err(Error::new(Status::Unsupported, message));
        }
        Ok(Needs {
            gradient: needs.flags & SH_NEEDS_GRADIENT != 0,
            context: needs.flags & SH_NEEDS_CONTEXT != 0,
            pooled: needs.flags & SH_NEEDS_POOLED != 0,
            weights: needs.flags & SH_NEEDS_WEIGHTS != 0,
            // SAFETY: the tap is valid until the next prepare or destroy.
            tap: unsafe { read_string(needs.tap, "tap") }?,
        })
    }

    /// Starts a run.
    pub fn begin(&mut self, run: &Run<'_>) -> Result<()> {
        let text = RawText::new(&run.text, run.batch)?;
        let text = text.as_raw();
        let run = run.as_raw(&text)?;
        // SAFETY: the instance lives as long as `self`; the run borrows from locals and from the caller.
        self.plugin.call(self.plugin.table().begin, |f, plugin, error| unsafe { f(plugin, &run, error) })?;
        self.batch = Some(run.batch as usize);
        Ok(())
    }

    /// Reads the latents `[B, C, h, w]` and writes them, corrected, to `out` of the same shape and dtype.
    pub fn step(&mut self, step: &Step<'_>, latents: &View<'_>, out: &mut ViewMut<'_>) -> Result<Report> {
        self.step_raw(step, &latents.as_raw(), &out.as_raw(), latents.shape())
    }

    /// Corrects the latents where they are.
    pub fn step_in_place(&mut self, step: &Step<'_>, latents: &mut ViewMut<'_>) -> Result<Report> {
        let view = latents.as_raw();
        self.step_raw(step, &view, &view, latents.shape())
    }

    /// The views point to memory and layouts that live for the call.
    fn step_raw(&mut self, step: &Step<'_>, latents: &sh_view, out: &sh_view, shape: &[usize]) -> Result<Report> {
        let batch = self.batch.or(shape.first().copied()).unwrap_or(0);
        let text = step.text.as_ref().map(|text| RawText::new(text, batch)).transpose()?;
        let text = text.as_ref().map(RawText::as_raw);
        let step = step.as_raw(text.as_ref())?;
        let mut items = ffi::report::room(batch);
        let mut report = ffi::report::over(&mut items);
        // SAFETY: the instance lives as long as `self`; everything pointed to is borrowed by the callers of this function.
        self.plugin.call(self.plugin.table().step, |f, plugin, error| unsafe {
            f(plugin, &step, latents, out, &mut report, error)
        })?;
        ffi::report::read(&report, &items)
    }

    /// Ends the run, finished or not.
    pub fn end(&mut self) -> Result<()> {
        // SAFETY: the instance lives as long as `self`.
        self.plugin.call(self.plugin.table().end, |f, plugin, error| unsafe { f(plugin, error) })?;
        self.batch = None;
        Ok(())
    }

    /// Bytes of weights and buffers that the instance holds now.
    pub fn memory(&self) -> u64 {
        // SAFETY: the instance lives as long as `self`.
        self.plugin.table().memory.map_or(0, |memory| unsafe { memory(self.plugin.as_ptr()) })
    }

    /// The two halves of a step, when the plugin has them.
    pub fn split(&mut self) -> Result<Option<InstanceSplit<'_>>> {
        InstanceSplit::new(&self.plugin, self.batch)
    }

    /// The plugin's parameters, when it has them. They may be used from any thread.
    pub fn params(&self) -> Result<Option<InstanceParams>> {
        InstanceParams::new(self.plugin.clone())
    }

    /// The plugin's low-rank weights, when it has them. They may be used from any thread.
    pub fn lora(&self) -> Result<Option<InstanceLora>> {
        InstanceLora::new(self.plugin.clone())
    }
}

impl std::fmt::Debug for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Instance({:p})", self.plugin.as_ptr())
    }
}
