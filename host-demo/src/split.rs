//! A step whose features and gradient the host computes itself, between the plugin's two halves of it
//! (`sampler-hook.split/1`).

use candle_core::{DType, Tensor};
use host_api::host::{Gradient, Instance};
use host_api::{Error, Outcome, Report, Result, Space, Status, Step, View, ViewMut};

use crate::host::DemoHost;

/// What [`Instance::step`] does, by hand.
pub(crate) fn step(
    host: &DemoHost,
    plugin: &mut Instance,
    step: &Step<'_>,
    latents: &View<'_>,
    out: &mut ViewMut<'_>,
) -> Result<Report> {
    let monitored = plugin.params()?.and_then(|params| params.get("monitor").ok()).is_some_and(|value| value != 0.);
    let tap = plugin.needs()?.tap;
    let absent = || Error::new(Status::Unsupported, "the plugin has no sampler-hook.split/1");
    let mut split = plugin.split()?.ok_or_else(absent)?;
    let corrected = split.outcome(step)?;
    if corrected.outcome != Outcome::Corrected && (!monitored || step.sub_evaluation > 0) {
        return Ok(corrected);
    }
    // The U-Net takes latents in variance-preserving space.
    let scale = if step.space == Space::Ve { step.alpha_bar.sqrt() } else { 1. };
    let device = host.lent_on();
    let z = scaled(&tensor_views::read(latents, &device)?, scale)?;
    let features = host.features(step, &tensor_views::lend(&z)?.view(), &tap)?;
    let features = features.view();
    let mut scored = None;
    let cotangent = tensor_views::fill(features.shape(), &device, |cotangent| {
        scored = Some(split.score(step, &features, cotangent)?);
        Ok(())
    });
    let cotangent = cotangent.inspect_err(|_| host.release())?;
    let scored = scored.expect("set where the score succeeded");
    if scored.outcome != Outcome::Corrected {
        host.release();
        return Ok(scored);
    }
    let cotangent = tensor_views::lend(&cotangent)?;
    let gradient = tensor_views::fill(latents.shape(), &device, |gradient| host.vjp(&cotangent.view(), gradient))?;
    let mut applied = split.apply(step, latents, &tensor_views::lend(&gradient)?.view(), out)?;
    for (item, first) in applied.items.iter_mut().zip(&scored.items) {
        item.score = first.score;
        if first.status != Status::Ok {
            item.status = first.status;
        }
    }
    Ok(applied)
}

/// In f64, rounded once.
fn scaled(latents: &Tensor, scale: f64) -> Result<Tensor> {
    let scaled = || latents.to_dtype(DType::F64)?.affine(scale, 0.)?.to_dtype(DType::F32);
    scaled().map_err(|e| Error::new(Status::Internal, e.to_string()))
}
