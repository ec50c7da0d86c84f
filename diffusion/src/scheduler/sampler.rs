//! What all samplers share.

use std::fmt;
use std::str::FromStr;

use candle_core::Tensor;

use super::{Ddim, DpmSolver, Euler, Pndm, SchedulerConfig};
use crate::{Error, Result};

/// A sampling algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheduler {
    /// Denoising diffusion implicit models, deterministic (arXiv 2010.02502).
    Ddim,
    /// Euler's method in sigma space (arXiv 2206.00364, Algorithm 2 without churn).
    Euler,
    /// Pseudo linear multistep (arXiv 2202.09778), without its Runge-Kutta start.
    Pndm,
    /// DPM-Solver++, second-order multistep (arXiv 2211.01095, Algorithm 2).
    DpmSolverPlusPlus2M,
}

impl Scheduler {
    /// Every algorithm.
    pub const ALL: [Self; 4] = [Self::Ddim, Self::Euler, Self::Pndm, Self::DpmSolverPlusPlus2M];

    /// What users call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ddim => "ddim",
            Self::Euler => "euler",
            Self::Pndm => "pndm",
            Self::DpmSolverPlusPlus2M => "dpmpp-2m",
        }
    }

    /// The algorithm of a diffusers class, such as `EulerDiscreteScheduler`; `None` for those that are not implemented.
    pub fn of_class(class: &str) -> Option<Self> {
        match class {
            "DDIMScheduler" => Some(Self::Ddim),
            "EulerDiscreteScheduler" => Some(Self::Euler),
            "PNDMScheduler" => Some(Self::Pndm),
            "DPMSolverMultistepScheduler" => Some(Self::DpmSolverPlusPlus2M),
            _ => None,
        }
    }

    /// Plans a run over the schedule's steps `first .. steps`; a run from noise has `first` 0, one from a noised image starts
    /// further down.
    ///
    /// Fails when there are no steps, more than training timesteps, or none left after `first`, and when the configuration
    /// asks for what the algorithm here does not do.
    pub fn plan(self, config: &SchedulerConfig, steps: usize, first: usize) -> Result<Box<dyn Sampler>> {
        Ok(match self {
            Self::Ddim => Box::new(Ddim::new(config, steps, first)?),
            Self::Euler => Box::new(Euler::new(config, steps, first)?),
            Self::Pndm => Box::new(Pndm::new(config, steps, first)?),
            Self::DpmSolverPlusPlus2M => Box::new(DpmSolver::new(config, steps, first)?),
        })
    }
}

impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Scheduler {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|scheduler| scheduler.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join("`, `");
            Error::Input(format!("scheduler `{name}`: expected one of `{names}`"))
        })
    }
}

/// How a sampler scales its latents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Variance preserving: `z = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) noise`, what the U-Net takes.
    VariancePreserving,
    /// Sigma space: `x = z / sqrt(alpha_bar) = z_0 + sigma noise`, with `sigma^2 = 1 / alpha_bar - 1`.
    Sigma,
}

/// One evaluation of the U-Net.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// The step that it belongs to, counted from the schedule's beginning.
    pub step: usize,
    /// 0 for the step's first evaluation; 1, 2, ... for those that a sampler adds.
    pub sub_evaluation: usize,
    /// The training timestep; may lie between two.
    pub timestep: f64,
    /// alpha_bar of the latents that are evaluated.
    pub alpha_bar: f64,
}

/// A planned run. Latents are `[B, C, h, w]` in the sampler's [`Sampler::space`].
pub trait Sampler {
    /// Every evaluation of the run, the noisiest first.
    fn evaluations(&self) -> &[Evaluation];

    /// The space of the latents that `step` takes and gives.
    fn space(&self) -> Space {
        Space::VariancePreserving
    }

    /// What standard normal noise is multiplied by where a run starts from noise alone.
    fn init_noise_sigma(&self) -> f64 {
        1.
    }

    /// Takes the latents of evaluation `i` to those of the next, or to the end, by what the model said of them.
    /// `model_output` and `sample` have one shape; so has the result, in the sample's dtype. Evaluations are to be taken in
    /// order, since samplers may remember earlier outputs.
    fn step(&mut self, i: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor>;

    /// The latents of evaluation `i` as the U-Net takes them.
    fn model_input(&self, i: usize, sample: &Tensor) -> Result<Tensor> {
        match self.space() {
            Space::VariancePreserving => Ok(sample.clone()),
            Space::Sigma => Ok((sample * evaluation(self.evaluations(), i)?.alpha_bar.sqrt())?),
        }
    }

    /// An image's latents with as much noise as the run's first evaluation has: where img2img starts.
    fn add_noise(&self, image: &Tensor, noise: &Tensor) -> Result<Tensor> {
        let alpha_bar = evaluation(self.evaluations(), 0)?.alpha_bar;
        let noised = ((image * alpha_bar.sqrt())? + (noise * (1. - alpha_bar).sqrt())?)?;
        match self.space() {
            Space::VariancePreserving => Ok(noised),
            Space::Sigma => Ok((noised / alpha_bar.sqrt())?),
        }
    }
}

/// The `i`-th evaluation, or an error that says how many there are.
pub(super) fn evaluation(evaluations: &[Evaluation], i: usize) -> Result<Evaluation> {
    let count = evaluations.len();
    evaluations
        .get(i)
        .copied()
        .ok_or_else(|| Error::Input(format!("scheduler: evaluation {i} of a run of {count} evaluation(s)")))
}

/// Refuses a run that starts behind its last step.
pub(super) fn check_first(first: usize, steps: usize) -> Result<()> {
    if first >= steps {
        return Err(Error::Input(format!("scheduler: a run that starts at step {first} of {steps} has no steps left")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_understood_or_refused() {
        for scheduler in Scheduler::ALL {
            assert_eq!(scheduler.name().parse::<Scheduler>().unwrap(), scheduler);
        }
        let message = "heun".parse::<Scheduler>().unwrap_err().to_string();
        assert!(message.contains("`heun`") && message.contains("`ddim`, `euler`, `pndm`, `dpmpp-2m`"), "{message}");
        assert_eq!(Scheduler::of_class("PNDMScheduler"), Some(Scheduler::Pndm));
        assert_eq!(Scheduler::of_class("FlowMatchEulerDiscreteScheduler"), None);
    }
}
