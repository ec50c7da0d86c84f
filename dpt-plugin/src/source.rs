//! Where U-Net features and their gradient come from: the host, or a U-Net of the plugin's own up to the tap. Both speak of
//! latents in variance-preserving space and of the conditional text alone.

use candle_core::{DType, Device, Tensor};
use diffusion::{Pass, Tap, UNet};
use host_api::plugin::HostGradient;
use host_api::{Step, View, ViewMut};

use crate::batch::Batch;
use crate::borrowed::BorrowedWeights;
use crate::pool::Pool;
use crate::score::{score, score_and_gradient};
use crate::text::Conditioning;
use crate::{Adapter, Error, Result};

/// A source of features and their gradient.
pub(crate) enum Source {
    /// The host's U-Net, through `gradient/1`.
    Host(Lender),
    /// The plugin's own.
    Own(Box<OwnUNet>),
    /// The host computes both and calls `split/1`.
    Split,
}

/// The host's U-Net, and where the host's tensors are.
pub(crate) struct Lender {
    pub(crate) gradient: HostGradient,
    pub(crate) device: Device,
}

/// A U-Net of the plugin's own, up to the tap.
pub(crate) struct OwnUNet {
    pub(crate) unet: UNet,
    pub(crate) tap: Tap,
    /// Where its weights are the host's.
    pub(crate) borrowed: Option<BorrowedWeights>,
}

/// What a step's latents are scored by.
pub(crate) struct Scorer<'a> {
    pub(crate) adapter: &'a Adapter,
    pub(crate) text: &'a mut Conditioning,
    /// Where the plugin computes.
    pub(crate) pool: &'a Pool,
    /// Fails where the host wants no more of it.
    pub(crate) stop: &'a dyn Fn() -> Result<()>,
}

/// A step's latents, and how they are corrected (Eq. 9).
pub(crate) struct Correction<'a> {
    pub(crate) step: &'a Step<'a>,
    /// `[B, C, h, w]` as the host passed them, where the model computes.
    pub(crate) latents: Tensor,
    /// What brings them to VP space, `[1]`, in f64.
    pub(crate) scale: Tensor,
    /// `[1]`, in f64.
    pub(crate) eta: Tensor,
    pub(crate) bound: Option<f64>,
}

impl OwnUNet {
    /// Follows the host's weights where they are the host's.
    fn refresh(&mut self) -> Result<()> {
        if let Some(unet) = self.borrowed.as_mut().map(BorrowedWeights::refresh).transpose()?.flatten() {
            self.unet = unet;
        }
        Ok(())
    }
}

impl Source {
    /// Makes the source that of the weights as they are now.
    pub(crate) fn refresh(&mut self) -> Result<()> {
        match self {
            Source::Own(own) => own.refresh(),
            Source::Host(_) | Source::Split => Ok(()),
        }
    }

    /// What a report says of the scores of a batch's latents, as [`Batch::scored`].
    pub(crate) fn score(&mut self, step: &Step, mut batch: Batch, by: Scorer) -> Result<Tensor> {
        let Scorer { adapter, text, pool, stop } = by;
        let times = vec![step.timestep; batch.items()?];
        let features = match self {
            Source::Host(host) => {
                let features = host.features(step, &batch, adapter);
                host.gradient.release();
                features?
            }
            Source::Own(own) => {
                let keys = text.keys(&own.unet)?;
                pool.run(|| own.unet.features(batch.values(), &times, keys, own.tap))?.to_dtype(DType::F32)?
            }
            Source::Split => return Err(split()),
        };
        check_features(&features, adapter, times.len())?;
        batch.check_features(&features)?;
        stop()?;
        let scores = pool.run(|| score(adapter, &features, &adapter.sinusoids(&times)?, &text.pooled))?;
        batch.scored(&scores)
    }

    /// Latents `[B, C, h, w]` in the host's space and dtype, where the model computes, corrected, and what a report says of that: as
    /// [`Batch::corrected`].
    pub(crate) fn correct(&mut self, correction: &Correction, by: Scorer) -> Result<(Tensor, Tensor)> {
        match self {
            Source::Host(host) => host.correct(correction, by),
            Source::Own(own) => own.correct(correction, by),
            Source::Split => Err(split()),
        }
    }

    /// Drops what a step that failed has left.
    pub(crate) fn release(&mut self) {
        if let Source::Host(host) = self {
            host.gradient.release();
        }
    }
}

fn split() -> Error {
    Error::Unsupported(
        "`gradient` is \"split\": the host computes features and gradient and calls sampler-hook.split/1 instead"
            .into(),
    )
}

impl Lender {
    /// The tap's output in f32 where the adapter is.
    fn features(&mut self, step: &Step, batch: &Batch, adapter: &Adapter) -> Result<Tensor> {
        // Its device may be another than the plugin's.
        let _asking = tensor_views::bind(&self.device);
        let latents = tensor_views::lend(&batch.values().to_device(&self.device)?)?;
        let read = |features: &View<'_>| tensor_views::read(features, adapter.device());
        Ok(self.gradient.features(step, &latents.view(), &adapter.sizes().tap, read)?.to_dtype(DType::F32)?)
    }

    fn correct(&mut self, correction: &Correction, by: Scorer) -> Result<(Tensor, Tensor)> {
        let Correction { step, latents, scale, eta, bound } = correction;
        let Scorer { adapter, text, pool, stop } = by;
        let mut batch = Batch::new(latents, scale)?;
        batch.check_texts(&text.pooled)?;
        let features = self.features(step, &batch, adapter)?;
        check_features(&features, adapter, batch.items()?)?;
        batch.check_features(&features)?;
        stop()?;
        let sinusoids = adapter.sinusoids(&vec![step.timestep; batch.items()?])?;
        let (scores, cotangent) = replayed(adapter, text, pool, &features, &sinusoids)?;
        let cotangent = batch.without_spoilt(&cotangent)?;
        stop()?;
        let _asking = tensor_views::bind(&self.device);
        let lent = tensor_views::lend(&cotangent.to_device(&self.device)?)?;
        let write = |gradient: &mut ViewMut<'_>| self.gradient.vjp(&lent.view(), gradient);
        let gradient = tensor_views::fill(latents.dims(), &self.device, write)?.to_device(latents.device())?;
        batch.corrected(&scores, &gradient, eta, *bound)
    }
}

impl OwnUNet {
    /// All of it can be replayed.
    fn correct(&self, correction: &Correction, by: Scorer) -> Result<(Tensor, Tensor)> {
        let Correction { step, latents, scale, eta, bound } = correction;
        let Scorer { adapter, text, pool, stop } = by;
        let (pooled, keys, replay) = text.replayed(&self.unet, *bound)?;
        let times = vec![step.timestep; latents.dim(0)?];
        let (own_times, adapters_times) = (self.unet.sinusoids(&times)?, adapter.sinusoids(&times)?);
        let inputs = [latents, scale, eta, &own_times, &adapters_times];
        let results = replay.run(inputs, |[latents, scale, eta, own_times, adapters_times], pass| {
            let stop = || if pass == Pass::Now { stop() } else { Ok(()) };
            let mut batch = Batch::new(latents, scale)?;
            batch.check_texts(pooled)?;
            let (features, tape) = pool.run(|| self.unet.forward_to_at(batch.values(), own_times, keys, self.tap))?;
            let features = features.to_dtype(DType::F32)?;
            check_features(&features, adapter, times.len())?;
            batch.check_features(&features)?;
            stop()?;
            let (scores, cotangent) = pool.run(|| score_and_gradient(adapter, &features, adapters_times, pooled))?;
            let cotangent = batch.without_spoilt(&cotangent)?;
            stop()?;
            let gradient = pool.run(|| self.unet.vjp(tape, &cotangent))?.to_dtype(DType::F32)?;
            let (corrected, numbers) = batch.corrected(&scores, &gradient, eta, *bound)?;
            Ok::<_, Error>([corrected, numbers])
        })?;
        Ok(results.into())
    }
}

/// The scores of a host's features, and their gradient for them.
pub(crate) fn replayed(
    adapter: &Adapter,
    text: &mut Conditioning,
    pool: &Pool,
    features: &Tensor,
    sinusoids: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let Conditioning { pooled, replay, .. } = text;
    let results = replay.run([features, sinusoids], |[features, sinusoids], _| {
        Ok::<_, Error>(pool.run(|| score_and_gradient(adapter, features, sinusoids, pooled))?.into())
    })?;
    Ok(results.into())
}

/// The features are those that the adapter reads, of a batch.
pub(crate) fn check_features(features: &Tensor, adapter: &Adapter, batch: usize) -> Result<()> {
    match features.dims() {
        [b, c, h, w] if *b == batch && *c == adapter.sizes().channels && *h > 0 && *w > 0 => Ok(()),
        found => Err(Error::Shape(format!(
            "the features at {} have shape {found:?}, expected [{batch}, {}, h, w]",
            adapter.sizes().tap,
            adapter.sizes().channels
        ))),
    }
}
