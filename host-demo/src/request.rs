//! What a run is asked to do.

use std::fmt;

use candle_core::Tensor;
use diffusion::scheduler::Scheduler;

use crate::{Error, Result};

/// What to sample.
#[derive(Debug, Clone)]
pub struct Request {
    /// One prompt per item of the batch.
    pub prompts: Vec<String>,
    /// Other prompts for later steps; empty for most runs.
    pub switches: Vec<PromptSwitch>,
    /// What guidance leads away from; usually empty.
    pub negative: String,
    /// The sampling algorithm.
    pub scheduler: Scheduler,
    /// Steps of the whole schedule.
    pub steps: usize,
    /// Classifier-free guidance; 1 leaves the unconditional half out.
    pub guidance: f64,
    /// Who sees the corrected latents.
    pub mode: Mode,
    /// Whether the low-rank weights that the plugin brings are merged into the U-Net for the run.
    pub plugin_lora: bool,
    /// Standard normal noise `[batch, channels, h, w]`.
    pub noise: Tensor,
    /// Where the run starts; from noise alone when absent.
    pub image: Option<StartImage>,
}

/// A picture to start from.
#[derive(Debug, Clone)]
pub struct StartImage {
    /// Its latents, scaled as the U-Net's, in the shape of the noise.
    pub latents: Tensor,
    /// The share of the schedule that is run, in (0, 1]: how much of the picture may change.
    pub strength: f64,
}

/// From a share of the schedule on, another prompt for every item.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptSwitch {
    /// In [0, 1]; step i of n has the share i / n.
    pub from: f64,
    /// The prompt.
    pub prompt: String,
}

/// Which part of a step sees the corrected latents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// Both halves of the guidance and the scheduler's step (Eq. 9).
    #[default]
    Paper,
    /// The conditional half of the guidance alone, as in the authors' release; the step starts from the latents as they were.
    ConditionOnly,
}

impl Mode {
    /// What users call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Paper => "paper",
            Self::ConditionOnly => "condition-only",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Request {
    /// A run from noise with one prompt per item, in the paper's mode, the plugin's low-rank weights merged.
    pub fn new(prompts: Vec<String>, scheduler: Scheduler, steps: usize, guidance: f64, noise: Tensor) -> Self {
        Self {
            prompts,
            switches: Vec::new(),
            negative: String::new(),
            scheduler,
            steps,
            guidance,
            mode: Mode::default(),
            plugin_lora: true,
            noise,
            image: None,
        }
    }

    /// The first step of the schedule that is run: 0 from noise, further down from a picture.
    pub fn first_step(&self) -> Result<usize> {
        let Some(StartImage { strength, .. }) = &self.image else { return Ok(0) };
        if !(*strength > 0. && *strength <= 1.) {
            return Err(Error::Request(format!("strength {strength}: expected more than 0 and at most 1")));
        }
        match (self.steps as f64 * strength) as usize {
            0 => {
                let steps = self.steps;
                let message = format!("strength {strength} of {steps} steps leaves none to run; take more of either");
                Err(Error::Request(message))
            }
            run => Ok(self.steps - run),
        }
    }

    /// Items of the batch. Fails when prompts, noise and picture do not agree on it, or a switch's share is none.
    pub(crate) fn batch(&self) -> Result<usize> {
        let batch = self.noise.dim(0)?;
        if self.prompts.len() != batch {
            return Err(Error::Request(format!("{} prompts for a batch of {batch}", self.prompts.len())));
        }
        if let Some(image) = self.image.as_ref().filter(|image| image.latents.dims() != self.noise.dims()) {
            let (found, expected) = (image.latents.dims(), self.noise.dims());
            return Err(Error::Request(format!("the picture's latents have shape {found:?}, the noise {expected:?}")));
        }
        if let Some(switch) = self.switches.iter().find(|switch| !(0. ..=1.).contains(&switch.from)) {
            return Err(Error::Request(format!("a prompt from share {}: expected 0 to 1", switch.from)));
        }
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    fn request(steps: usize, strength: f64) -> Request {
        let noise = Tensor::zeros((1, 4, 2, 2), DType::F32, &Device::Cpu).unwrap();
        let image = Some(StartImage { latents: noise.clone(), strength });
        Request { image, ..Request::new(vec![String::new()], Scheduler::Ddim, steps, 1., noise) }
    }

    /// As diffusers counts: `steps - min(int(steps * strength), steps)`.
    #[test]
    fn strength_is_the_share_of_the_schedule() {
        for (steps, strength, first) in [(10, 1., 0), (10, 0.5, 5), (25, 0.8, 5), (10, 0.19, 9), (3, 0.5, 2)] {
            assert_eq!(request(steps, strength).first_step().unwrap(), first, "{steps} {strength}");
        }
        for wrong in [0., -1., 1.5, f64::NAN, 0.05] {
            assert!(request(10, wrong).first_step().unwrap_err().to_string().contains("strength"), "{wrong}");
        }
    }
}
