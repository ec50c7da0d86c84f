//! `sh_model`, `sh_run` and `sh_step`, written and read.

use std::ptr;

use crate::abi::{SH_STEP_EXTRA_INPUTS, sh_model, sh_run, sh_step, sh_string, sh_text};
use crate::error::{Error, Result};
use crate::ffi::text::TextParts;
use crate::ffi::{read_array, read_string, read_struct, struct_size};
use crate::types::{Model, Prediction, Run, Space, Step};
use crate::view::Reach;

/// What a [`Model`] borrows on the plugin's side.
pub(crate) struct ModelParts {
    family: String,
    prediction: Prediction,
    unet_in_channels: usize,
    latent_channels: usize,
    alphas_cumprod: Vec<f64>,
    unet_config: String,
}

impl ModelParts {
    /// # Safety
    /// `model` is null or points to an `sh_model` whose pointers are null or valid for what its sizes say.
    pub(crate) unsafe fn from_raw(model: *const sh_model) -> Result<Self> {
        // SAFETY: the caller's promise, here and for the members below.
        let model = unsafe { read_struct(model, "model") }?;
        // SAFETY: as above.
        let family = unsafe { read_string(model.family, "model family") }?;
        // SAFETY: as above.
        let alphas_cumprod = unsafe { read_array(model.alphas_cumprod, model.alphas_cumprod_count, "alphas_cumprod") }?;
        // SAFETY: as above.
        let unet_config = unsafe { read_string(model.unet_config, "unet_config") }?;
        if let Some(index) = alphas_cumprod.iter().position(|&alpha| !(0.0..=1.0).contains(&alpha)) {
            let message = format!("alphas_cumprod[{index}] = {} is not between 0 and 1", alphas_cumprod[index]);
            return Err(Error::invalid_argument(message));
        }
        Ok(Self {
            family,
            prediction: Prediction::from_code(model.prediction)?,
            unet_in_channels: model.unet_in_channels as usize,
            latent_channels: model.latent_channels as usize,
            alphas_cumprod,
            unet_config,
        })
    }

    pub(crate) fn model(&self) -> Model<'_> {
        Model {
            family: &self.family,
            prediction: self.prediction,
            unet_in_channels: self.unet_in_channels,
            latent_channels: self.latent_channels,
            alphas_cumprod: &self.alphas_cumprod,
            unet_config: Some(self.unet_config.as_str()).filter(|config| !config.is_empty()),
        }
    }
}

/// Narrows a count to the interface's `uint32_t`.
fn count(value: usize, what: &str) -> Result<u32> {
    u32::try_from(value).map_err(|_| Error::invalid_argument(format!("{what} {value} is too large")))
}

impl Model<'_> {
    /// Borrows from `self`.
    pub(crate) fn as_raw(&self) -> Result<sh_model> {
        Ok(sh_model {
            struct_size: struct_size::<sh_model>(),
            prediction: self.prediction.code(),
            family: sh_string::borrowing(self.family),
            unet_in_channels: count(self.unet_in_channels, "unet_in_channels")?,
            latent_channels: count(self.latent_channels, "latent_channels")?,
            alphas_cumprod: self.alphas_cumprod.as_ptr(),
            alphas_cumprod_count: self.alphas_cumprod.len() as u64,
            unet_config: self.unet_config.map_or(sh_string::EMPTY, sh_string::borrowing),
        })
    }
}

/// What a [`Run`] borrows on the plugin's side.
pub(crate) struct RunParts<'a> {
    batch: usize,
    steps: usize,
    guidance_scale: f64,
    text: TextParts<'a>,
}

impl RunParts<'_> {
    /// # Safety
    /// `run` is null or points to an `sh_run` whose pointers are null or valid, for `'a`.
    pub(crate) unsafe fn from_raw(run: *const sh_run, reach: Reach) -> Result<Self> {
        // SAFETY: the caller's promise.
        let run = unsafe { read_struct(run, "run") }?;
        if run.reserved != 0 {
            return Err(Error::invalid_argument("run: reserved is not 0"));
        }
        if run.steps == 0 {
            return Err(Error::invalid_argument("run: a run has at least one step"));
        }
        if !run.guidance_scale.is_finite() {
            return Err(Error::invalid_argument(format!("run: guidance_scale is {}", run.guidance_scale)));
        }
        let text = if run.text.is_null() {
            TextParts::default()
        } else {
            // SAFETY: not null, so a text by the caller's promise.
            unsafe { TextParts::from_raw(run.text, run.batch as usize, reach) }?
        };
        let (batch, steps) = (run.batch as usize, run.steps as usize);
        Ok(Self { batch, steps, guidance_scale: run.guidance_scale, text })
    }

    pub(crate) fn run(&self) -> Run<'_> {
        Run { batch: self.batch, steps: self.steps, guidance_scale: self.guidance_scale, text: self.text.text() }
    }
}

impl Run<'_> {
    /// Borrows from `text`.
    pub(crate) fn as_raw(&self, text: &sh_text) -> Result<sh_run> {
        Ok(sh_run {
            struct_size: struct_size::<sh_run>(),
            batch: count(self.batch, "batch")?,
            steps: count(self.steps, "steps")?,
            reserved: 0,
            guidance_scale: self.guidance_scale,
            text,
        })
    }
}

/// What a [`Step`] borrows on the other side.
pub(crate) struct StepParts<'a> {
    step: Step<'static>,
    text: Option<TextParts<'a>>,
}

impl StepParts<'_> {
    /// # Safety
    /// `step` is null or points to an `sh_step` whose text is null or valid for a batch of `batch`, for `'a`.
    pub(crate) unsafe fn from_raw(step: *const sh_step, batch: usize, reach: Reach) -> Result<Self> {
        // SAFETY: the caller's promise.
        let step = unsafe { read_struct(step, "step") }?;
        if step.index >= step.count {
            return Err(Error::invalid_argument(format!("step {} of {}", step.index, step.count)));
        }
        if !step.timestep.is_finite() {
            return Err(Error::invalid_argument(format!("step: timestep is {}", step.timestep)));
        }
        let space = Space::from_code(step.space)?;
        // A schedule with zero terminal signal-to-noise ratio starts at 0, where sigma space has no finite latents.
        let (alpha_bar, fits) = (step.alpha_bar, (0.0..=1.0).contains(&step.alpha_bar));
        if !fits || (alpha_bar == 0.0 && space == Space::Ve) {
            let range = if space == Space::Ve { "(0, 1]" } else { "[0, 1]" };
            return Err(Error::invalid_argument(format!("step: alpha_bar {alpha_bar} is not in {range}")));
        }
        if step.flags & !SH_STEP_EXTRA_INPUTS != 0 {
            return Err(Error::invalid_argument(format!("step: unknown flags {:#x}", step.flags)));
        }
        let text = if step.text.is_null() {
            None
        } else {
            // SAFETY: not null, so a text by the caller's promise.
            Some(unsafe { TextParts::from_raw(step.text, batch, reach) }?)
        };
        let step = Step {
            index: step.index as usize,
            count: step.count as usize,
            sub_evaluation: step.sub_evaluation as usize,
            timestep: step.timestep,
            alpha_bar: step.alpha_bar,
            space,
            extra_inputs: step.flags & SH_STEP_EXTRA_INPUTS != 0,
            text: None,
        };
        Ok(Self { step, text })
    }

    pub(crate) fn step(&self) -> Step<'_> {
        Step { text: self.text.as_ref().map(TextParts::text), ..self.step }
    }
}

impl Step<'_> {
    /// Borrows from `text`.
    pub(crate) fn as_raw(&self, text: Option<&sh_text>) -> Result<sh_step> {
        Ok(sh_step {
            struct_size: struct_size::<sh_step>(),
            index: count(self.index, "step index")?,
            count: count(self.count, "step count")?,
            sub_evaluation: count(self.sub_evaluation, "sub_evaluation")?,
            timestep: self.timestep,
            alpha_bar: self.alpha_bar,
            space: self.space.code(),
            flags: if self.extra_inputs { SH_STEP_EXTRA_INPUTS } else { 0 },
            text: text.map_or(ptr::null(), ptr::from_ref),
        })
    }
}
