//! A [`Gradient`] behind `sampler-hook.gradient/1`.

use std::sync::PoisonError;

use super::Gradient;
use super::bridge::{Bridge, bridge};
use crate::abi::{sh_error, sh_host, sh_host_gradient, sh_status, sh_step, sh_string, sh_view};
use crate::error::{Error, Result, Status};
use crate::ffi::sampling::StepParts;
use crate::ffi::{self, read_string};
use crate::view::{Lent, View, ViewMut};

pub(super) static TABLE: sh_host_gradient = sh_host_gradient {
    struct_size: ffi::struct_size::<sh_host_gradient>(),
    reserved: 0,
    features: Some(features),
    vjp: Some(vjp),
    release: Some(release),
};

impl Bridge {
    fn keep(&self, activation: Option<Box<Lent>>) {
        *self.activation.lock().unwrap_or_else(PoisonError::into_inner) = activation;
    }

    fn gradient(&self) -> Result<&dyn Gradient> {
        self.host.gradient().ok_or_else(|| Error::new(Status::Unsupported, "the host lends no gradient any more"))
    }
}

/// # Safety
/// `host` is null or the table of a living bridge; `error` is null or points to an `sh_error`.
pub(super) unsafe fn enter(
    host: *const sh_host,
    error: *mut sh_error,
    call: impl FnOnce(&Bridge) -> Result<()>,
) -> sh_status {
    // SAFETY: the caller's promise.
    if let Err(refused) = unsafe { ffi::error::check(error) } {
        return refused.status.code();
    }
    // SAFETY: the caller's promise.
    let bridge = unsafe { bridge(host) }.ok_or_else(|| Error::invalid_argument("host is NULL"));
    let result = bridge.and_then(|bridge| {
        let _inside = bridge.reach().inside();
        ffi::catch(|| call(bridge))
    });
    // SAFETY: `check` accepted the error.
    unsafe { ffi::error::finish(result, error) }
}

unsafe extern "C" fn features(
    host: *const sh_host,
    step: *const sh_step,
    latents: *const sh_view,
    tap: sh_string,
    activation: *mut sh_view,
    error: *mut sh_error,
) -> sh_status {
    let call = |bridge: &Bridge| {
        // SAFETY: the plugin's promise, for all that follow.
        unsafe { ffi::check_struct(activation.cast_const(), "activation") }?;
        // SAFETY: as above.
        let latents = unsafe { View::from_raw(latents, "latents", bridge.reach()) }?;
        let batch = latents.shape().first().copied().unwrap_or(0);
        // SAFETY: as above.
        let parts = unsafe { StepParts::from_raw(step, batch, bridge.reach()) }?;
        // SAFETY: as above.
        let tap = unsafe { read_string(tap, "tap") }?;
        bridge.keep(None);
        let kept = Box::new(bridge.gradient()?.features(&parts.step(), &latents, &tap)?);
        let raw = kept.as_raw();
        bridge.keep(Some(kept)); // moves the box, not what it points to
        // SAFETY: checked above; members are written one by one, so a larger struct keeps its tail.
        unsafe {
            (&raw mut (*activation).flags).write(raw.flags);
            (&raw mut (*activation).tensor).write(raw.tensor);
            (&raw mut (*activation).stream).write(raw.stream);
        }
        Ok(())
    };
    // SAFETY: the plugin's promise.
    unsafe { enter(host, error, call) }
}

unsafe extern "C" fn vjp(
    host: *const sh_host,
    cotangent: *const sh_view,
    gradient: *const sh_view,
    error: *mut sh_error,
) -> sh_status {
    let call = |bridge: &Bridge| {
        let activation = bridge.activation.lock().unwrap_or_else(PoisonError::into_inner).take();
        let activation =
            activation.ok_or_else(|| Error::new(Status::InvalidState, "vjp without features before it"))?;
        let reach = bridge.reach();
        let views = || {
            // SAFETY: the plugin's promise, for both.
            let (cotangent, gradient) = unsafe {
                (View::from_raw(cotangent, "cotangent", reach)?, ViewMut::from_raw(gradient, "gradient", reach)?)
            };
            let (found, expected) = (cotangent.shape(), activation.view().shape().to_vec());
            if found != expected.as_slice() {
                let message = format!("cotangent of shape {found:?} for an activation of {expected:?}");
                return Err(Error::shape_mismatch(message));
            }
            Ok((cotangent, gradient))
        };
        // The activation's life ends here, also when the host's gradient is never asked for.
        let (cotangent, mut gradient) = views().inspect_err(|_| {
            if let Ok(host) = bridge.gradient() {
                host.release();
            }
        })?;
        bridge.gradient()?.vjp(&cotangent, &mut gradient)
    };
    // SAFETY: the plugin's promise.
    unsafe { enter(host, error, call) }
}

unsafe extern "C" fn release(host: *const sh_host) {
    let call = |bridge: &Bridge| {
        bridge.keep(None);
        bridge.gradient()?.release();
        Ok(())
    };
    // SAFETY: the plugin's promise.
    unsafe { enter(host, std::ptr::null_mut(), call) };
}
