//! Calls into the host's table. The slot is emptied when the instance is destroyed, so that a handle which outlives it
//! cannot reach a host that is gone.

use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{self, ThreadId};

use super::handle::host_failed;
use crate::abi::{
    SH_HOST_GRADIENT, SH_HOST_PROGRESS, SH_HOST_WEIGHTS, SH_LOG_DEBUG, SH_LOG_ERROR, SH_LOG_INFO, SH_LOG_TRACE,
    SH_LOG_WARN, sh_host, sh_host_gradient, sh_host_progress, sh_host_weights, sh_string, sh_view,
};
use crate::error::{Error, Result, Status};
use crate::ffi::text::RawText;
use crate::ffi::{self, read_string, read_struct};
use crate::types::Step;
use crate::view::{View, ViewMut};

/// The host's pointers, valid until destroy by the header's rule.
#[derive(Clone, Copy)]
struct HostPointers {
    host: *const sh_host,
    table: sh_host,
    gradient: Option<sh_host_gradient>,
    weights: Option<sh_host_weights>,
    progress: Option<sh_host_progress>,
}

// SAFETY: the header lets `log`, `cancelled` and `progress` be called from any thread; the functions of gradient and weights are
// only reached on the thread of the call in progress, which `HostSlot::in_step` and `HostSlot::in_call` check.
unsafe impl Send for HostPointers {}
// SAFETY: as above; the struct is not changed after it was made.
unsafe impl Sync for HostPointers {}

/// The call in progress and the shape of the activation that the host keeps for it.
#[derive(Default)]
struct Progress {
    thread: Option<ThreadId>,
    /// Whether the call is a step, which may ask for features and gradient.
    step: bool,
    activation: Option<Vec<usize>>,
}

/// Where a host is, until it is gone.
pub(super) struct HostSlot {
    name: String,
    version: String,
    has_gradient: bool,
    has_weights: bool,
    pointers: RwLock<Option<HostPointers>>,
    progress: Mutex<Progress>,
}

impl HostSlot {
    /// # Safety
    /// `host` is null or points to an `sh_host` that lives until [`HostSlot::close`].
    pub(super) unsafe fn open(host: *const sh_host) -> Result<Self> {
        // SAFETY: the caller's promise, here and for the members below.
        let table = unsafe { read_struct(host, "host") }?;
        let missing = |name: &str| Error::invalid_argument(format!("host: {name} is NULL"));
        table.log.ok_or_else(|| missing("log"))?;
        table.cancelled.ok_or_else(|| missing("cancelled"))?;
        let extension = table.extension.ok_or_else(|| missing("extension"))?;
        // SAFETY: as above.
        let name = unsafe { read_string(table.name, "host name") }?;
        // SAFETY: as above.
        let version = unsafe { read_string(table.version, "host version") }?;
        // SAFETY: the host is valid, and the id lives as long as the program.
        let find = |id| unsafe { extension(host, sh_string::from_static(id)) };
        // SAFETY: what the host returned for an id is null or that extension's table, here and below.
        let gradient = unsafe { read_optional(find(SH_HOST_GRADIENT).cast::<sh_host_gradient>(), "host gradient") }?;
        if let Some(gradient) = &gradient {
            gradient.features.ok_or_else(|| missing("gradient features"))?;
            gradient.vjp.ok_or_else(|| missing("gradient vjp"))?;
            gradient.release.ok_or_else(|| missing("gradient release"))?;
        }
        // SAFETY: as above.
        let weights = unsafe { read_optional(find(SH_HOST_WEIGHTS).cast::<sh_host_weights>(), "host weights") }?;
        if let Some(weights) = &weights {
            weights.revision.ok_or_else(|| missing("weights revision"))?;
            weights.count.ok_or_else(|| missing("weights count"))?;
            weights.name.ok_or_else(|| missing("weights name"))?;
            weights.tensor.ok_or_else(|| missing("weights tensor"))?;
        }
        // SAFETY: as above.
        let progress = unsafe { read_optional(find(SH_HOST_PROGRESS).cast::<sh_host_progress>(), "host progress") }?;
        if let Some(progress) = &progress {
            progress.progress.ok_or_else(|| missing("progress"))?;
        }
        let pointers = HostPointers { host, table, gradient, weights, progress };
        Ok(Self {
            name,
            version,
            has_gradient: gradient.is_some(),
            has_weights: weights.is_some(),
            pointers: RwLock::new(Some(pointers)),
            progress: Mutex::default(),
        })
    }

    /// Forgets the host; waits for calls into it that other threads have begun.
    pub(super) fn close(&self) {
        *self.pointers.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn version(&self) -> &str {
        &self.version
    }

    pub(super) fn has_gradient(&self) -> bool {
        self.has_gradient
    }

    pub(super) fn has_weights(&self) -> bool {
        self.has_weights
    }

    pub(super) fn report_progress(&self, task: &str, done: u64, total: u64) {
        self.with(|pointers| {
            if let Some(progress) = pointers.progress.and_then(|table| table.progress) {
                // SAFETY: the host lives while the slot holds it; the task is borrowed for the call.
                unsafe { progress(pointers.host, sh_string::borrowing(task), done, total) };
            }
        });
    }

    /// Calls `f` with the host, unless it is gone.
    fn with<T>(&self, f: impl FnOnce(&HostPointers) -> T) -> Option<T> {
        self.pointers.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(f)
    }

    pub(super) fn log(&self, level: log::Level, message: &str) {
        let level = match level {
            log::Level::Error => SH_LOG_ERROR,
            log::Level::Warn => SH_LOG_WARN,
            log::Level::Info => SH_LOG_INFO,
            log::Level::Debug => SH_LOG_DEBUG,
            log::Level::Trace => SH_LOG_TRACE,
        };
        self.with(|pointers| {
            if let Some(log) = pointers.table.log {
                // SAFETY: the host lives while the slot holds it; the message is borrowed for the call.
                unsafe { log(pointers.host, level, sh_string::borrowing(message)) };
            }
        });
    }

    pub(super) fn cancelled(&self) -> bool {
        // SAFETY: the host lives while the slot holds it.
        let ask = |pointers: &HostPointers| pointers.table.cancelled.is_none_or(|f| unsafe { f(pointers.host) } != 0);
        self.with(ask).unwrap_or(true)
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets this thread call the functions of gradient and weights until the guard is dropped.
    pub(super) fn enter_step(&self) -> CallGuard<'_> {
        *self.progress() = Progress { thread: Some(thread::current().id()), step: true, activation: None };
        CallGuard { slot: self }
    }

    /// The same for the weights alone.
    pub(super) fn enter_call(&self) -> CallGuard<'_> {
        *self.progress() = Progress { thread: Some(thread::current().id()), step: false, activation: None };
        CallGuard { slot: self }
    }

    fn is_in(&self, step: bool) -> bool {
        let progress = self.progress();
        progress.thread == Some(thread::current().id()) && (progress.step || !step)
    }

    /// The host and its gradient extension, inside a step.
    fn in_step<T>(&self, f: impl FnOnce(&HostPointers, &sh_host_gradient) -> Result<T>) -> Result<T> {
        if !self.is_in(true) {
            let message = "the host's gradient is only lent inside a step, on its thread";
            return Err(Error::new(Status::InvalidState, message));
        }
        let call = |pointers: &HostPointers| match &pointers.gradient {
            Some(gradient) => f(pointers, gradient),
            None => Err(Error::new(Status::Unsupported, "the host lends no gradient")),
        };
        self.with(call).unwrap_or_else(|| Err(Error::new(Status::InvalidState, "the host is gone")))
    }

    /// The host and its weights, inside a call.
    fn in_call<T>(&self, f: impl FnOnce(&HostPointers, &sh_host_weights) -> Result<T>) -> Result<T> {
        if !self.is_in(false) {
            let message = "the host's weights are only lent inside prepare, begin and step, on their thread";
            return Err(Error::new(Status::InvalidState, message));
        }
        let call = |pointers: &HostPointers| match &pointers.weights {
            Some(weights) => f(pointers, weights),
            None => Err(Error::new(Status::Unsupported, "the host lends no weights")),
        };
        self.with(call).unwrap_or_else(|| Err(Error::new(Status::InvalidState, "the host is gone")))
    }

    pub(super) fn weights_revision(&self) -> Result<u64> {
        // SAFETY: the host lives while the slot holds it.
        self.in_call(|pointers, table| Ok(table.revision.map_or(0, |revision| unsafe { revision(pointers.host) })))
    }

    pub(super) fn weight_names(&self) -> Result<Vec<String>> {
        self.in_call(|pointers, table| {
            let (Some(count), Some(name)) = (table.count, table.name) else { return Ok(Vec::new()) };
            let at = |index| {
                let (mut found, mut error) = (sh_string::EMPTY, ffi::error::empty());
                // SAFETY: the host lives while the slot holds it; the other pointers are to locals here.
                let code = unsafe { name(pointers.host, index, &mut found, &mut error) };
                ffi::error::read(code, &error).map_err(|error| host_failed("weights", error))?;
                // SAFETY: names are valid until destroy.
                unsafe { read_string(found, "name") }
            };
            // SAFETY: the host lives while the slot holds it.
            (0..unsafe { count(pointers.host) }).map(at).collect()
        })
    }

    /// A tensor's own revision.
    pub(super) fn weight_revision(&self, index: usize) -> Result<u64> {
        self.ask_for_weight(index, std::ptr::null_mut())
    }

    /// A tensor's shape and numbers.
    pub(super) fn weight(&self, index: usize) -> Result<(Vec<usize>, Vec<f32>)> {
        let mut view = ffi::view::empty();
        self.ask_for_weight(index, &mut view)?;
        // SAFETY: the host filled the view, and the tensor is valid until the next one is asked for.
        let view = unsafe { View::from_raw(&view, "host weight") }.map_err(|error| host_failed("weights", error))?;
        Ok((view.shape().to_vec(), view.to_vec()))
    }

    /// Calls the host's `tensor`; `target` is null or points to a view that can be filled.
    fn ask_for_weight(&self, index: usize, target: *mut sh_view) -> Result<u64> {
        self.in_call(|pointers, table| {
            let tensor = table.tensor.ok_or_else(|| Error::new(Status::Internal, "tensor is NULL"))?;
            let (mut revision, mut error) = (0, ffi::error::empty());
            // SAFETY: the host lives while the slot holds it; all other pointers are the callers' or to locals here.
            let code = unsafe { tensor(pointers.host, index as u64, target, &mut revision, &mut error) };
            ffi::error::read(code, &error).map_err(|error| host_failed("weights", error))?;
            Ok(revision)
        })
    }

    pub(super) fn features(
        &self,
        step: &Step<'_>,
        latents: &[f32],
        shape: &[usize],
        tap: &str,
    ) -> Result<(Vec<usize>, Vec<f32>)> {
        let latents = View::new(latents, shape)?;
        let batch = shape.first().copied().unwrap_or(0);
        self.in_step(|pointers, gradient| {
            let text = step.text.as_ref().map(|text| RawText::new(text, batch)).transpose()?;
            let text = text.as_ref().map(RawText::as_raw);
            let step = step.as_raw(text.as_ref())?;
            let raw_latents = latents.as_raw();
            let mut activation = ffi::view::empty();
            let mut error = ffi::error::empty();
            let features = gradient.features.ok_or_else(|| Error::new(Status::Internal, "features is NULL"))?;
            let tap = sh_string::borrowing(tap);
            // SAFETY: the host lives while the slot holds it; all other pointers are to locals that outlive the call.
            let code = unsafe { features(pointers.host, &step, &raw_latents, tap, &mut activation, &mut error) };
            ffi::error::read(code, &error).map_err(|error| host_failed("features", error))?;
            self.progress().activation = Some(Vec::new());
            // SAFETY: the host filled the view, and the activation is valid until vjp or release.
            let view = unsafe { View::from_raw(&activation, "host activation") };
            let view = view.map_err(|error| host_failed("features", error))?;
            if view.shape().first() != Some(&batch) {
                let message = format!("activation of shape {:?} for a batch of {batch}", view.shape());
                return Err(host_failed("features", Error::shape_mismatch(message)));
            }
            self.progress().activation = Some(view.shape().to_vec());
            Ok((view.shape().to_vec(), view.to_vec()))
        })
    }

    pub(super) fn vjp(&self, cotangent: &[f32], latents_shape: &[usize]) -> Result<Vec<f32>> {
        self.in_step(|pointers, table| {
            let shape = self.progress().activation.clone();
            let shape = shape.ok_or_else(|| Error::new(Status::InvalidState, "vjp without features before it"))?;
            let cotangent_view = View::new(cotangent, &shape)?;
            let count = latents_shape.iter().try_fold(1usize, |count, &extent| count.checked_mul(extent));
            let count = count.ok_or_else(|| Error::shape_mismatch(format!("latents of shape {latents_shape:?}")))?;
            let mut gradient = vec![0f32; count];
            let gradient_view = ViewMut::new(&mut gradient, latents_shape)?;
            let (cotangent, target) = (cotangent_view.as_raw(), gradient_view.as_raw());
            let mut error = ffi::error::empty();
            let vjp = table.vjp.ok_or_else(|| Error::new(Status::Internal, "vjp is NULL"))?;
            self.progress().activation = None; // its life ends here, also when the call fails
            // SAFETY: the host lives while the slot holds it; all other pointers are to locals that outlive the call.
            let code = unsafe { vjp(pointers.host, &cotangent, &target, &mut error) };
            ffi::error::read(code, &error).map_err(|error| host_failed("vjp", error))?;
            Ok(gradient)
        })
    }

    pub(super) fn release(&self) {
        let drop_activation = |pointers: &HostPointers, gradient: &sh_host_gradient| {
            let activation = self.progress().activation.take();
            if let (Some(release), Some(_)) = (gradient.release, activation) {
                // SAFETY: the host lives while the slot holds it.
                unsafe { release(pointers.host) };
            }
            Ok(())
        };
        let _ = self.in_step(drop_activation); // outside a step there is no activation
    }
}

/// A copy of an extension's table; `None` for null.
///
/// # Safety
/// `table` is null or points to a struct that starts with `struct_size` and is as large as it says.
unsafe fn read_optional<T: Copy>(table: *const T, what: &str) -> Result<Option<T>> {
    // SAFETY: the caller's promise.
    if table.is_null() { Ok(None) } else { unsafe { read_struct(table, what) }.map(Some) }
}

/// Ends the call for the slot: releases what is left and closes gradient and weights again.
pub(super) struct CallGuard<'a> {
    slot: &'a HostSlot,
}

impl Drop for CallGuard<'_> {
    fn drop(&mut self) {
        self.slot.release();
        *self.slot.progress() = Progress::default();
    }
}
