//! Where U-Net features and their gradient come from: the host, or a U-Net of the plugin's own up to the tap. Both speak of
//! latents in variance-preserving space and of the conditional text alone.

use candle_core::{DType, Device, Tensor};
use diffusion::{Tap, Tape, TextKeys, UNet};
use host_api::plugin::HostGradient;
use host_api::{Step, View, ViewMut};

use crate::borrowed::BorrowedWeights;
use crate::pool::Pool;
use crate::{Error, Result};

/// A source of features, and what it keeps of the last evaluation for the gradient.
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
    pub(crate) tape: Option<Tape>,
    /// Where its weights are the host's.
    pub(crate) borrowed: Option<BorrowedWeights>,
}

/// A step's latents `[B, C, h, w]` in VP space, f32.
pub(crate) struct Evaluation<'a> {
    pub(crate) step: &'a Step<'a>,
    pub(crate) latents: &'a Tensor,
    pub(crate) tap: &'a str,
    /// Needed by the plugin's own U-Net.
    pub(crate) keys: Option<&'a TextKeys>,
    /// Where the plugin's own U-Net computes.
    pub(crate) pool: &'a Pool,
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

    /// The tap's output `[B, C, h, w]` in f32 on `device`.
    pub(crate) fn features(&mut self, evaluation: &Evaluation, device: &Device) -> Result<Tensor> {
        let Evaluation { step, latents, tap, keys, pool } = *evaluation;
        match self {
            Source::Host(host) => {
                let latents = tensor_views::lend(&latents.to_device(&host.device)?)?;
                let read = |features: &View<'_>| tensor_views::read(features, device);
                Ok(host.gradient.features(step, &latents.view(), tap, read)?.to_dtype(DType::F32)?)
            }
            Source::Own(own) => {
                let keys = keys.ok_or_else(|| Error::Shape("the run brought no text context".into()))?;
                let timesteps = vec![step.timestep; latents.dim(0)?];
                let (features, tape) = pool.run(|| own.unet.forward_to(latents, &timesteps, keys, own.tap))?;
                own.tape = Some(tape);
                Ok(features.to_dtype(DType::F32)?.to_device(device)?)
            }
            Source::Split => Err(Error::Unsupported(
                "`gradient` is \"split\": the host computes features and gradient and calls sampler-hook.split/1 instead"
                    .into(),
            )),
        }
    }

    /// The gradient of `sum(cotangent * features)` for the latents of the last evaluation, which it ends.
    /// In f32 on the cotangent's device.
    pub(crate) fn vjp(&mut self, cotangent: &Tensor, shape: [usize; 4], pool: &Pool) -> Result<Tensor> {
        match self {
            Source::Host(host) => {
                let lent = tensor_views::lend(&cotangent.to_device(&host.device)?)?;
                let write = |gradient: &mut ViewMut<'_>| host.gradient.vjp(&lent.view(), gradient);
                Ok(tensor_views::fill(&shape, &host.device, write)?.to_device(cotangent.device())?)
            }
            Source::Own(own) => {
                let tape = own.tape.take().expect("vjp follows features");
                let gradient = pool.run(|| own.unet.vjp(tape, cotangent))?;
                Ok(gradient.to_dtype(DType::F32)?)
            }
            Source::Split => unreachable!("it gives no features"),
        }
    }

    /// Drops the last evaluation without a gradient.
    pub(crate) fn release(&mut self) {
        match self {
            Source::Host(host) => host.gradient.release(),
            Source::Own(own) => own.tape = None,
            Source::Split => {}
        }
    }
}
