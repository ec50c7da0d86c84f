//! A step whose features and gradient the host computes itself, between the plugin's two halves of it
//! (`sampler-hook.split/1`).

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
    let z: Vec<f32> = latents.to_vec().iter().map(|x| (f64::from(*x) * scale) as f32).collect();
    let (shape, features) = host.features(step, &View::new(&z, latents.shape())?, &tap)?;
    let mut cotangent = vec![0f32; features.len()];
    let scored = split.score(step, &View::new(&features, &shape)?, &mut ViewMut::new(&mut cotangent, &shape)?);
    let scored = scored.inspect_err(|_| host.release())?;
    if scored.outcome != Outcome::Corrected {
        host.release();
        return Ok(scored);
    }
    let gradient = host.vjp(&View::new(&cotangent, &shape)?)?;
    let mut applied = split.apply(step, latents, &View::new(&gradient, latents.shape())?, out)?;
    for (item, first) in applied.items.iter_mut().zip(&scored.items) {
        item.score = first.score;
        if first.status != Status::Ok {
            item.status = first.status;
        }
    }
    Ok(applied)
}
