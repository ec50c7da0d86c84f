//! One step: checks, the plugin's correction, and the commit.

use std::time::Instant;

use super::instance::{Instance, RunShape, State};
use super::latents::Latents;
use super::{Plugin, reach};
use crate::abi::{sh_report, sh_step, sh_view};
use crate::error::{Error, Result, Status};
use crate::ffi::report::ReportTarget;
use crate::ffi::sampling::StepParts;
use crate::types::{Device, Outcome, Report, Step};
use crate::view::{View, ViewMut};

/// The raw arguments of a step or of its second half.
pub(super) struct StepArguments {
    pub(super) step: *const sh_step,
    pub(super) latents: *const sh_view,
    pub(super) out: *const sh_view,
    pub(super) report: *mut sh_report,
}

/// # Safety
/// The pointers are null or what the header says they are.
pub(super) unsafe fn step<P: Plugin>(instance: &Instance<P>, arguments: &StepArguments) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { correct(instance, "step", arguments, |plugin, step, latents, report| plugin.step(step, latents, report)) }
}

/// Checks the arguments, lets `correct` write latents, and hands them over when all went well.
///
/// # Safety
/// The pointers are null or what the header says they are.
pub(super) unsafe fn correct<P: Plugin>(
    instance: &Instance<P>,
    call: &str,
    arguments: &StepArguments,
    correct: impl FnOnce(&mut P, &Step<'_>, &mut Latents<'_>, &mut Report) -> Result<()>,
) -> Result<()> {
    let started = Instant::now();
    let mut core = instance.lock(call, &[State::Running])?;
    let reach = reach::<P>();
    let no_run = || Error::new(Status::Internal, "running without a run");
    let run = core.run.ok_or_else(no_run)?;
    // SAFETY: the caller's promise, for this and the next three.
    let target = unsafe { ReportTarget::from_raw(arguments.report) }?;
    // SAFETY: as above.
    let parts = unsafe { StepParts::from_raw(arguments.step, run.batch, reach) }?;
    // SAFETY: as above.
    let latents = unsafe { View::from_raw(arguments.latents, "latents", reach) }?;
    // SAFETY: as above.
    let mut out = unsafe { ViewMut::from_raw(arguments.out, "out", reach) }?;
    let step = parts.step();
    check_count(&step, run)?;
    let shape = check_latents(&latents, run, core.latent_channels)?;
    check_device("latents", latents.device(), core.device)?;
    check_device("out", out.device(), core.device)?;
    let in_place = check_out(&latents, &out)?;

    let mut report = Report::new(run.batch);
    if run.batch == 0 {
        report.outcome = Outcome::SkippedEmpty;
    } else {
        let mut latents = Latents::new(latents, shape);
        check_cancelled(instance)?;
        let lent = instance.host.enter_step();
        let stepped = correct(&mut core.plugin, &step, &mut latents, &mut report);
        drop(lent);
        stepped?;
        check_cancelled(instance)?;
        check_report(&report, &latents)?;
        latents.commit(&mut out, in_place, reach, |index| kept(&report, index))?;
        instance.remember_memory(&core);
    }
    report.seconds = started.elapsed().as_secs_f64();
    if let Some(target) = target {
        // SAFETY: the report is the caller's until this call returns.
        unsafe { target.fill(&report) };
    }
    Ok(())
}

pub(super) fn check_count(step: &Step<'_>, run: RunShape) -> Result<()> {
    if step.count != run.steps {
        return Err(Error::invalid_argument(format!("step: count {} in a run of {} steps", step.count, run.steps)));
    }
    Ok(())
}

pub(super) fn check_cancelled<P>(instance: &Instance<P>) -> Result<()> {
    match instance.host.cancelled() {
        true => Err(Error::new(Status::Cancelled, "the host cancelled the step")),
        false => Ok(()),
    }
}

/// That a view is where `prepare` was told that the latents would be.
pub(super) fn check_device(what: &str, found: Device, prepared: Device) -> Result<()> {
    if found != prepared {
        let message = format!("{what} on {found}, but prepare was told that the latents are on {prepared}");
        return Err(Error::invalid_argument(message));
    }
    Ok(())
}

fn check_latents(latents: &View<'_>, run: RunShape, channels: usize) -> Result<[usize; 4]> {
    let found = latents.shape();
    let fits = |[b, c, h, w]: &[usize; 4]| *b == run.batch && *c == channels && *h > 0 && *w > 0;
    <[usize; 4]>::try_from(found).ok().filter(fits).ok_or_else(|| {
        let expected = format!("[{}, {channels}, h, w] with h and w at least 1", run.batch);
        Error::shape_mismatch(format!("latents have shape {found:?}, expected {expected}"))
    })
}

/// Whether `out` is the very memory of the latents.
fn check_out(latents: &View<'_>, out: &ViewMut<'_>) -> Result<bool> {
    if latents.shape() != out.shape() {
        let message = format!("out has shape {:?}, the latents {:?}", out.shape(), latents.shape());
        return Err(Error::shape_mismatch(message));
    }
    if latents.dtype() != out.dtype() {
        let message = format!("out is {:?}, the latents are {:?}", out.dtype(), latents.dtype());
        return Err(Error::new(Status::DtypeMismatch, message));
    }
    let ((from, from_layout), (to, to_layout)) = (latents.parts(), out.parts());
    from_layout.same_memory(from.addr(), to_layout, to.addr())
}

fn kept(report: &Report, index: usize) -> bool {
    report.items.get(index).is_none_or(|item| item.status == Status::Ok)
}

/// Holds what the plugin reports against what it did.
fn check_report(report: &Report, latents: &Latents<'_>) -> Result<()> {
    let batch = latents.shape()[0];
    if report.outcome != Outcome::Corrected {
        if latents.is_written() {
            let message = format!("the plugin wrote latents in a step that it reports as {:?}", report.outcome);
            return Err(Error::new(Status::Internal, message));
        }
        return Ok(());
    }
    if (0..batch).any(|index| kept(report, index)) {
        return Ok(());
    }
    let status = report.items[0].status;
    Err(Error::new(status, format!("no item could be corrected; item 0: {status:?}")))
}
