//! Calls into the host's table. The slot is emptied when the instance is destroyed, so that a handle which outlives it
//! cannot reach a host that is gone.

use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{self, ThreadId};

use super::handle::host_failed;
use crate::abi::{
    SH_HOST_GRADIENT, SH_LOG_DEBUG, SH_LOG_ERROR, SH_LOG_INFO, SH_LOG_TRACE, SH_LOG_WARN, sh_host, sh_host_gradient,
    sh_string,
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
}

// SAFETY: the header lets `log` and `cancelled` be called from any thread; the gradient's functions are only reached on the
// thread of the step in progress, which `HostSlot::in_step` checks.
unsafe impl Send for HostPointers {}
// SAFETY: as above; the struct is not changed after it was made.
unsafe impl Sync for HostPointers {}

/// The step in progress and the shape of the activation that the host keeps for it.
#[derive(Default)]
struct Progress {
    thread: Option<ThreadId>,
    activation: Option<Vec<usize>>,
}

/// Where a host is, until it is gone.
pub(super) struct HostSlot {
    name: String,
    version: String,
    has_gradient: bool,
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
        let gradient = unsafe { extension(host, sh_string::from_static(SH_HOST_GRADIENT)) };
        let gradient = if gradient.is_null() {
            None
        } else {
            // SAFETY: the host returned its gradient extension.
            let gradient = unsafe { read_struct(gradient.cast::<sh_host_gradient>(), "host gradient") }?;
            gradient.features.ok_or_else(|| missing("gradient features"))?;
            gradient.vjp.ok_or_else(|| missing("gradient vjp"))?;
            gradient.release.ok_or_else(|| missing("gradient release"))?;
            Some(gradient)
        };
        let pointers = HostPointers { host, table, gradient };
        Ok(Self {
            name,
            version,
            has_gradient: gradient.is_some(),
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

    /// Lets this thread call the gradient's functions until the guard is dropped.
    pub(super) fn enter_step(&self) -> StepGuard<'_> {
        *self.progress() = Progress { thread: Some(thread::current().id()), activation: None };
        StepGuard { slot: self }
    }

    /// The host and its gradient extension, inside a step.
    fn in_step<T>(&self, f: impl FnOnce(&HostPointers, &sh_host_gradient) -> Result<T>) -> Result<T> {
        if self.progress().thread != Some(thread::current().id()) {
            let message = "the host's gradient is only lent inside a step, on its thread";
            return Err(Error::new(Status::InvalidState, message));
        }
        let call = |pointers: &HostPointers| match &pointers.gradient {
            Some(gradient) => f(pointers, gradient),
            None => Err(Error::new(Status::Unsupported, "the host lends no gradient")),
        };
        self.with(call).unwrap_or_else(|| Err(Error::new(Status::InvalidState, "the host is gone")))
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

/// Ends the step for the slot: releases what is left and closes the gradient again.
pub(super) struct StepGuard<'a> {
    slot: &'a HostSlot,
}

impl Drop for StepGuard<'_> {
    fn drop(&mut self) {
        self.slot.release();
        *self.slot.progress() = Progress::default();
    }
}
