//! This host as plugins see it: log and progress, and the U-Net's features and gradients (`sampler-hook.gradient/1`) and weights
//! (`sampler-hook.weights/1`).

use std::sync::{Mutex, MutexGuard};

use candle_core::{DType, Device, Tensor};
use diffusion::{Tape, TextKeys, UNet};
use host_api::host::{Gradient, Host, Weights};
use host_api::{DeviceMemory, Lent, Status, Step, View, ViewMut};

/// Shows that `done` parts of `total` of a plugin's task are finished.
pub type ShowProgress = Box<dyn Fn(&str, u64, u64) + Send + Sync>;

/// The U-Net, shared between the sampling loop and the plugin's calls back.
pub(crate) struct DemoHost {
    unet: Mutex<UNet>,
    /// The conditional text of the run in progress.
    text: Mutex<Option<TextKeys>>,
    /// What the last features call left for its gradient.
    tape: Mutex<Option<Tape>>,
    /// Where the plugin takes tensors.
    lent_on: Mutex<Device>,
    progress: Option<ShowProgress>,
}

impl DemoHost {
    pub(crate) fn new(unet: UNet, progress: Option<ShowProgress>) -> Self {
        let lent_on = Mutex::new(unet.device().clone());
        Self { unet: Mutex::new(unet), text: Mutex::new(None), tape: Mutex::new(None), lent_on, progress }
    }

    pub(crate) fn unet(&self) -> MutexGuard<'_, UNet> {
        lock(&self.unet)
    }

    /// Where tensors are lent to the plugin: where the model computes, or in main memory for plugins that reach no further.
    pub(crate) fn lent_on(&self) -> Device {
        lock(&self.lent_on).clone()
    }

    pub(crate) fn lend_on(&self, device: &Device) {
        *lock(&self.lent_on) = device.clone();
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

    fn device_memory(&self) -> Option<&'static dyn DeviceMemory> {
        tensor_views::device_memory()
    }

    fn gradient(&self) -> Option<&dyn Gradient> {
        Some(self)
    }

    fn weights(&self) -> Option<&dyn Weights> {
        Some(self)
    }

    fn progress(&self, task: &str, done: u64, total: u64) {
        if let Some(show) = &self.progress {
            show(task, done, total);
        }
    }
}

impl Weights for DemoHost {
    fn revision(&self) -> u64 {
        self.unet().revision()
    }

    fn names(&self) -> Vec<String> {
        self.unet().weights().keys().cloned().collect()
    }

    fn tensor_revision(&self, name: &str) -> host_api::Result<u64> {
        self.unet().weights().get(name).map(|weight| weight.revision).ok_or_else(|| no_tensor(name))
    }

    fn tensor(&self, name: &str) -> host_api::Result<Lent> {
        let tensor =
            self.unet().weights().get(name).map(|weight| weight.tensor.clone()).ok_or_else(|| no_tensor(name))?;
        tensor_views::lend(&tensor.to_device(&self.lent_on()).map_err(|e| failed(e.into()))?)
    }
}

fn no_tensor(name: &str) -> host_api::Error {
    host_api::Error::new(Status::NotFound, format!("the U-Net has no tensor `{name}`"))
}

impl Gradient for DemoHost {
    fn features(&self, step: &Step<'_>, latents: &View<'_>, tap: &str) -> host_api::Result<Lent> {
        let unet = self.unet();
        let text = lock(&self.text);
        let text = text
            .as_ref()
            .ok_or_else(|| host_api::Error::new(Status::InvalidState, "features were asked for outside a run"))?;
        let tap = unet.config().tap(tap).map_err(|e| host_api::Error::new(Status::NotFound, e.to_string()))?;
        let latents = tensor_views::read(latents, unet.device())?;
        let evaluate = || -> diffusion::Result<_> {
            let latents = latents.to_dtype(DType::F32)?;
            let timesteps = vec![step.timestep; latents.dim(0)?];
            let (activation, tape) = unet.forward_to(&latents, &timesteps, text, tap)?;
            Ok((activation.to_dtype(DType::F32)?.to_device(&self.lent_on())?, tape))
        };
        let (activation, tape) = evaluate().map_err(failed)?;
        let lent = tensor_views::lend(&activation)?;
        *lock(&self.tape) = Some(tape);
        Ok(lent)
    }

    fn vjp(&self, cotangent: &View<'_>, gradient: &mut ViewMut<'_>) -> host_api::Result<()> {
        let unet = self.unet();
        let tape = lock(&self.tape).take().ok_or_else(|| {
            host_api::Error::new(Status::InvalidState, "a gradient was asked for without features before it")
        })?;
        let cotangent = tensor_views::read(cotangent, unet.device())?;
        let evaluate = || -> diffusion::Result<Tensor> { unet.vjp(tape, &cotangent.to_dtype(DType::F32)?) };
        tensor_views::write(&evaluate().map_err(failed)?, gradient)
    }

    fn release(&self) {
        lock(&self.tape).take();
    }
}

fn failed(error: diffusion::Error) -> host_api::Error {
    let status = match &error {
        diffusion::Error::Input(_) => Status::ShapeMismatch,
        error if error.is_out_of_memory() => Status::OutOfMemory,
        _ => Status::Internal,
    };
    host_api::Error::new(status, error.to_string())
}
