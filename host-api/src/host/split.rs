//! The two halves of a step, as a host with an autograd of its own sees them.

use std::ptr;
use std::sync::Arc;

use super::plugin::Plugin;
use crate::abi::{SH_PLUGIN_SPLIT, sh_plugin_split, sh_text};
use crate::error::Result;
use crate::ffi;
use crate::ffi::text::RawText;
use crate::types::{Report, Step};
use crate::view::{View, ViewMut};

/// `sampler-hook.split/1` of an instance, which it borrows: no other call may be made meanwhile.
pub struct InstanceSplit<'a> {
    plugin: &'a Arc<Plugin>,
    table: sh_plugin_split,
    batch: Option<usize>,
}

impl<'a> InstanceSplit<'a> {
    pub(super) fn new(plugin: &'a Arc<Plugin>, batch: Option<usize>) -> Result<Option<Self>> {
        // SAFETY: the struct of this extension.
        let table = unsafe { plugin.extension::<sh_plugin_split>(SH_PLUGIN_SPLIT) }?;
        Ok(table.map(|table| Self { plugin, table, batch }))
    }

    /// Whether this step is corrected, before its features are computed; the report has no more than the outcome.
    pub fn outcome(&mut self, step: &Step<'_>) -> Result<Report> {
        self.call_score(step, None, None)
    }

    /// Scores the features `[B, C, h, w]` of the block that the plugin needs, for the step's latents in VP space. When the
    /// report says that the step is corrected, `cotangent`, of the same shape, holds the scores' gradient for them.
    pub fn score(&mut self, step: &Step<'_>, features: &View<'_>, cotangent: &mut ViewMut<'_>) -> Result<Report> {
        self.call_score(step, Some(features), Some(cotangent))
    }

    fn call_score(
        &mut self,
        step: &Step<'_>,
        features: Option<&View<'_>>,
        cotangent: Option<&mut ViewMut<'_>>,
    ) -> Result<Report> {
        let (features, cotangent) = (features.map(View::as_raw), cotangent.map(|cotangent| cotangent.as_raw()));
        let pointer = |view: &Option<_>| view.as_ref().map_or(ptr::null(), ptr::from_ref);
        self.call(step, |this, step, report| {
            // SAFETY: the instance lives as long as `self`; everything pointed to is borrowed for this call.
            this.plugin.call(this.table.score, |f, plugin, error| unsafe {
                f(plugin, step, pointer(&features), pointer(&cotangent), report, error)
            })
        })
    }

    /// Reads the latents `[B, C, h, w]` and writes them, corrected by the scores' `gradient` for them (in VP space), to `out`.
    pub fn apply(
        &mut self,
        step: &Step<'_>,
        latents: &View<'_>,
        gradient: &View<'_>,
        out: &mut ViewMut<'_>,
    ) -> Result<Report> {
        let (latents, gradient, out) = (latents.as_raw(), gradient.as_raw(), out.as_raw());
        self.call(step, |this, step, report| {
            // SAFETY: the instance lives as long as `self`; everything pointed to is borrowed for this call.
            this.plugin.call(this.table.apply, |f, plugin, error| unsafe {
                f(plugin, step, &latents, &gradient, &out, report, error)
            })
        })
    }

    fn call(
        &self,
        step: &Step<'_>,
        call: impl FnOnce(&Self, &crate::abi::sh_step, &mut crate::abi::sh_report) -> Result<()>,
    ) -> Result<Report> {
        let batch = self.batch.unwrap_or(0);
        let text = step.text.as_ref().map(|text| RawText::new(text, batch)).transpose()?;
        let text: Option<sh_text> = text.as_ref().map(RawText::as_raw);
        let step = step.as_raw(text.as_ref())?;
        let mut items = ffi::report::room(batch);
        let mut report = ffi::report::over(&mut items);
        call(self, &step, &mut report)?;
        ffi::report::read(&report, &items)
    }
}
