//! This host as plugins see it: log, and the U-Net's features and gradients (`sampler-hook.gradient/1`).

use std::sync::{Mutex, MutexGuard};

use candle_core::{DType, Tensor};
use diffusion::{Tape, TextKeys, UNet};
use host_api::host::{Gradient, Host};
use host_api::{Status, Step, View};

/// The U-Net, shared between the sampling loop and the plugin's calls back.
pub(crate) struct DemoHost {
    unet: Mutex<UNet>,
    /// The conditional text of the run in progress.
    text: Mutex<Option<TextKeys>>,
    /// What the last features call left for its gradient.
    tape: Mutex<Option<Tape>>,
}

impl DemoHost {
    pub(crate) fn new(unet: UNet) -> Self {
        Self { unet: Mutex::new(unet), text: Mutex::new(None), tape: Mutex::new(None) }
    }

    pub(crate) fn unet(&self) -> MutexGuard<'_, UNet> {
        lock(&self.unet)
    }

    pub(crate) fn set_text(&self, text: Option<TextKeys>) {
        *lock(&self.text) = text;
    }
}

/// A panic elsewhere does not make the data behind a lock unusable: every function here leaves it whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Host for DemoHost {
    fn name(&self) -> &str {
        env!("CARGO_PKG_NAME")
    }

    fn version(&self) -> &str {
        env!("CARGO_PKG_VERSION")
    }

    fn log(&self, level: log::Level, message: &str) {
        log::log!(target: "plugin", level, "{message}");
    }

    fn gradient(&self) -> Option<&dyn Gradient> {
        Some(self)
    }
}

impl Gradient for DemoHost {
    fn features(&self, step: &Step<'_>, latents: &View<'_>, tap: &str) -> host_api::Result<(Vec<usize>, Vec<f32>)> {
        let unet = self.unet();
        let text = lock(&self.text);
        let text = text
            .as_ref()
            .ok_or_else(|| host_api::Error::new(Status::InvalidState, "features were asked for outside a run"))?;
        let tap = unet.config().tap(tap).map_err(|e| host_api::Error::new(Status::NotFound, e.to_string()))?;
        let evaluate = || -> diffusion::Result<_> {
            let latents = Tensor::from_vec(latents.to_vec(), latents.shape(), unet.device())?;
            let timesteps = vec![step.timestep; latents.dim(0)?];
            let (activation, tape) = unet.forward_to(&latents, &timesteps, text, tap)?;
            let shape = activation.dims().to_vec();
            Ok((shape, activation.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?, tape))
        };
        let (shape, values, tape) = evaluate().map_err(failed)?;
        *lock(&self.tape) = Some(tape);
        Ok((shape, values))
    }

    fn vjp(&self, cotangent: &View<'_>) -> host_api::Result<Vec<f32>> {
        let unet = self.unet();
        let tape = lock(&self.tape).take().ok_or_else(|| {
            host_api::Error::new(Status::InvalidState, "a gradient was asked for without features before it")
        })?;
        let gradient = || -> diffusion::Result<_> {
            let cotangent = Tensor::from_vec(cotangent.to_vec(), cotangent.shape(), unet.device())?;
            Ok(unet.vjp(tape, &cotangent)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
        };
        gradient().map_err(failed)
    }

    fn release(&self) {
        lock(&self.tape).take();
    }
}

fn failed(error: diffusion::Error) -> host_api::Error {
    let status = match error {
        diffusion::Error::Input(_) => Status::ShapeMismatch,
        _ => Status::Internal,
    };
    host_api::Error::new(status, error.to_string())
}
