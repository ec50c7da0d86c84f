//! The functions of `sampler-hook.split/1`: from C into [`Plugin::score`] and [`Plugin::apply`].

use std::time::Instant;

use super::instance::{Instance, State};
use super::step::{StepArguments, check_cancelled, check_count, check_device, correct};
use super::tables::enter;
use super::{Plugin, reach};
use crate::abi::{sh_error, sh_plugin, sh_plugin_split, sh_report, sh_status, sh_step, sh_view};
use crate::error::{Error, Result, Status};
use crate::ffi;
use crate::ffi::report::ReportTarget;
use crate::ffi::sampling::StepParts;
use crate::types::{Outcome, Report};
use crate::view::{View, ViewMut};

/// What a plugin without the extension answers.
pub(super) fn absent() -> Error {
    Error::new(Status::Unsupported, "this plugin has no sampler-hook.split/1")
}

/// The table of `sampler-hook.split/1`.
pub(super) fn table<P: Plugin>() -> &'static sh_plugin_split {
    const {
        &sh_plugin_split {
            struct_size: ffi::struct_size::<sh_plugin_split>(),
            reserved: 0,
            score: Some(score::<P>),
            apply: Some(apply::<P>),
        }
    }
}

unsafe extern "C" fn score<P: Plugin>(
    plugin: *const sh_plugin,
    step: *const sh_step,
    activation: *const sh_view,
    cotangent: *const sh_view,
    report: *mut sh_report,
    error: *mut sh_error,
) -> sh_status {
    // SAFETY: the host's promise.
    unsafe { enter::<P>(plugin, error, |instance| run_score(instance, step, activation, cotangent, report)) }
}

/// # Safety
/// The pointers are null or what the header says they are.
unsafe fn run_score<P: Plugin>(
    instance: &Instance<P>,
    step: *const sh_step,
    activation: *const sh_view,
    cotangent: *const sh_view,
    report: *mut sh_report,
) -> Result<()> {
    let (started, reach) = (Instant::now(), reach::<P>());
    let mut core = instance.lock("score", &[State::Running])?;
    let run = core.run.ok_or_else(|| Error::new(Status::Internal, "running without a run"))?;
    // SAFETY: the caller's promise, for this and what follows.
    let target = unsafe { ReportTarget::from_raw(report) }?;
    // SAFETY: as above.
    let parts = unsafe { StepParts::from_raw(step, run.batch, reach) }?;
    check_count(&parts.step(), run)?;
    let features = match activation.is_null() {
        true => None,
        // SAFETY: as above.
        false => Some(unsafe { View::from_raw(activation, "activation", reach) }?),
    };
    let mut cotangent = match cotangent.is_null() {
        true => None,
        // SAFETY: as above.
        false => Some(unsafe { ViewMut::from_raw(cotangent, "cotangent", reach) }?),
    };
    check_views(features.as_ref(), cotangent.as_ref(), run.batch)?;
    let devices =
        [("activation", features.map(|view| view.device())), ("cotangent", cotangent.as_ref().map(ViewMut::device))];
    for (what, device) in devices {
        device.map_or(Ok(()), |device| check_device(what, device, core.device))?;
    }
    let mut done = Report::new(run.batch);
    if run.batch == 0 {
        done.outcome = Outcome::SkippedEmpty;
    } else {
        check_cancelled(instance)?;
        let lent = instance.host.enter_call();
        let scored =
            core.plugin.score(&parts.step(), features.as_ref(), cotangent.as_ref().map(ViewMut::dtype), &mut done);
        drop(lent);
        let numbers = scored?;
        check_cancelled(instance)?;
        if let (Some(cotangent), Some(numbers)) = (&mut cotangent, numbers) {
            let wrong = |error: Error| match error.status {
                Status::ShapeMismatch | Status::DtypeMismatch => Error::new(Status::Internal, error.message),
                _ => error,
            };
            reach.copy(&numbers.view(), cotangent).map_err(wrong)?;
        }
    }
    done.seconds = started.elapsed().as_secs_f64();
    if let Some(target) = target {
        // SAFETY: the report is the caller's until this call returns.
        unsafe { target.fill(&done) };
    }
    Ok(())
}

fn check_views(features: Option<&View<'_>>, cotangent: Option<&ViewMut<'_>>, batch: usize) -> Result<()> {
    let shape = features.map(View::shape);
    if let Some(found) = shape.filter(|shape| shape.len() != 4 || shape[0] != batch) {
        let message = format!("activation of shape {found:?}, expected [{batch}, C, h, w]");
        return Err(Error::shape_mismatch(message));
    }
    match (shape, cotangent.map(ViewMut::shape)) {
        (None, Some(_)) => Err(Error::invalid_argument("a cotangent without an activation")),
        (Some(features), Some(cotangent)) if features != cotangent => {
            Err(Error::shape_mismatch(format!("cotangent of shape {cotangent:?} for an activation of {features:?}")))
        }
        _ => Ok(()),
    }
}

unsafe extern "C" fn apply<P: Plugin>(
    plugin: *const sh_plugin,
    step: *const sh_step,
    latents: *const sh_view,
    gradient: *const sh_view,
    out: *const sh_view,
    report: *mut sh_report,
    error: *mut sh_error,
) -> sh_status {
    let arguments = StepArguments { step, latents, out, report };
    let call = |instance: &Instance<P>| {
        instance.check_state("apply", &[State::Running])?;
        // SAFETY: the host's promise.
        let gradient = unsafe { View::from_raw(gradient, "gradient", reach::<P>()) }?;
        // SAFETY: as above.
        unsafe {
            correct(instance, "apply", &arguments, |plugin, step, latents, report| {
                if gradient.shape() != latents.shape() {
                    let (found, expected) = (gradient.shape(), latents.shape());
                    let message = format!("gradient of shape {found:?} for latents of {expected:?}");
                    return Err(Error::shape_mismatch(message));
                }
                check_device("gradient", gradient.device(), latents.view().device())?;
                plugin.apply(step, latents, &gradient, report)
            })
        }
    };
    // SAFETY: the host's promise.
    unsafe { enter::<P>(plugin, error, call) }
}
