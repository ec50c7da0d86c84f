//! Euler's method.

use candle_core::Tensor;

use super::sampler::{check_first, evaluation};
use super::sigmas::{alpha_bar, sigmas_at};
use super::{Evaluation, Prediction, Sampler, SchedulerConfig, Space, Spacing};
use crate::{Error, Result};

/// Euler's method in sigma space (arXiv 2206.00364, Algorithm 2 without churn), as diffusers' `EulerDiscreteScheduler`.
#[derive(Clone, Debug)]
pub struct Euler {
    evaluations: Vec<Evaluation>,
    /// One more than evaluations: the last is where the run ends.
    sigmas: Vec<f64>,
    init_noise_sigma: f64,
    prediction: Prediction,
}

impl Euler {
    /// Plans the steps `first .. steps`; the spacing is linspace where the configuration does not say, and its timesteps are
    /// not rounded. See [`super::Scheduler::plan`] for what fails.
    pub fn new(config: &SchedulerConfig, steps: usize, first: usize) -> Result<Self> {
        config.sigmas.check("euler")?;
        check_first(first, steps)?;
        let total = config.num_train_timesteps;
        let spacing = config.spacing.unwrap_or(Spacing::Linspace);
        let rounded = spacing.timesteps(total, steps, config.steps_offset)?;
        let timesteps: Vec<f64> = match spacing {
            Spacing::Linspace => linspace(total, steps),
            _ => rounded.into_iter().map(|t| t as f64).collect(),
        };
        let sigmas = sigmas_at(config, &timesteps)?;
        let largest = sigmas[0];
        // Leading spacing does not start at the noisiest timestep: latents there still hold a part of the image.
        let init_noise_sigma = if spacing == Spacing::Leading { (largest * largest + 1.).sqrt() } else { largest };
        let evaluations = timesteps.iter().zip(&sigmas).enumerate().skip(first);
        let evaluations = evaluations.map(|(step, (&timestep, &sigma))| Evaluation {
            step,
            sub_evaluation: 0,
            timestep,
            alpha_bar: alpha_bar(sigma),
        });
        Ok(Self {
            evaluations: evaluations.collect(),
            sigmas: sigmas[first..].to_vec(),
            init_noise_sigma,
            prediction: config.prediction,
        })
    }
}

/// `numpy.linspace(0, total - 1, steps, dtype=float32)`, the last first.
fn linspace(total: usize, steps: usize) -> Vec<f64> {
    let ratio = (total - 1) as f64 / (steps.max(2) - 1) as f64;
    (0..steps).rev().map(|i| f64::from((i as f64 * ratio) as f32)).collect()
}

impl Sampler for Euler {
    fn evaluations(&self) -> &[Evaluation] {
        &self.evaluations
    }

    fn space(&self) -> Space {
        Space::Sigma
    }

    fn init_noise_sigma(&self) -> f64 {
        self.init_noise_sigma
    }

    /// `x' = x + (sigma' - sigma) dx/dsigma`, where `dx/dsigma = (x - z_0) / sigma` is the noise.
    fn step(&mut self, i: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let Evaluation { alpha_bar, .. } = evaluation(&self.evaluations, i)?;
        let (sigma, next) = (self.sigmas[i], self.sigmas[i + 1]);
        if sigma == 0. {
            return Err(Error::Unsupported(format!("scheduler euler: no noise is left at evaluation {i}")));
        }
        let (_, noise) = self.prediction.split(model_output, &(sample * alpha_bar.sqrt())?, alpha_bar)?;
        Ok((sample + (noise * (next - sigma))?)?)
    }
}
