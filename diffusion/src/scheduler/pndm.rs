//! Pseudo numerical methods for diffusion models.

use std::collections::VecDeque;

use candle_core::Tensor;

use super::sampler::{check_first, evaluation};
use super::{Evaluation, NoiseSchedule, Prediction, Sampler, SchedulerConfig, Spacing};
use crate::{Error, Result};

/// The pseudo linear multistep sampler (arXiv 2202.09778), as diffusers' `PNDMScheduler` with `skip_prk_steps`: its first step
/// takes two evaluations (a pseudo improved Euler step), every other one.
#[derive(Clone, Debug)]
pub struct Pndm {
    evaluations: Vec<Evaluation>,
    /// alpha_bar where each evaluation's step starts and where it ends.
    alpha_bars: Vec<(f64, f64)>,
    prediction: Prediction,
    /// The latest model outputs, the newest first; the second evaluation's is not among them.
    outputs: VecDeque<Tensor>,
    /// Where the first step starts, kept for its second evaluation.
    start: Option<Tensor>,
}

impl Pndm {
    /// Outputs that the fourth-order formula looks at.
    const ORDER: usize = 4;

    /// Plans the steps `first .. steps`; the spacing is leading and the last alpha_bar timestep 0's where the configuration
    /// does not say. A run that starts further down begins with the same two evaluations (diffusers, there, evaluates
    /// timesteps that its latents are not at). See [`super::Scheduler::plan`] for what fails.
    pub fn new(config: &SchedulerConfig, steps: usize, first: usize) -> Result<Self> {
        if config.skip_prk_steps == Some(false) {
            let message = "scheduler pndm: `skip_prk_steps` false, a start by Runge-Kutta steps, is not supported";
            return Err(Error::Unsupported(message.into()));
        }
        check_first(first, steps)?;
        let total = config.num_train_timesteps;
        let schedule = NoiseSchedule::new(config)?;
        let alphas = schedule.alphas_cumprod();
        let last = if config.set_alpha_to_one.unwrap_or(false) { 1.0 } else { alphas[0] };
        let spacing = config.spacing.unwrap_or(Spacing::Leading);
        let timesteps = spacing.timesteps(total, steps, config.steps_offset)?;
        // diffusers steps down by T / steps whatever the spacing, not to the next timestep of its list.
        let stride = total / steps;
        let next = |t: usize| t.checked_sub(stride).map_or(last, |next| alphas[next]);
        let (mut evaluations, mut alpha_bars) = (Vec::new(), Vec::new());
        for (step, &t) in timesteps.iter().enumerate().skip(first) {
            let at = |sub_evaluation, timestep: usize| Evaluation {
                step,
                sub_evaluation,
                timestep: timestep as f64,
                alpha_bar: alphas[timestep],
            };
            evaluations.push(at(0, t));
            alpha_bars.push((alphas[t], next(t)));
            // The step is taken once more from its start, with the mean of both ends' outputs. A single step has no other end.
            if let (true, Some(&end)) = (step == first, timesteps.get(step + 1)) {
                evaluations.push(at(1, end));
                // diffusers finds the start again by adding the stride.
                let start = alphas.get(end + stride).copied().unwrap_or(alphas[t]);
                alpha_bars.push((start, alphas[end]));
            }
        }
        if let Some(i) = alpha_bars.iter().position(|(alpha_bar, _)| *alpha_bar == 0.0) {
            let timestep = evaluations[i].timestep;
            return Err(Error::Unsupported(format!("scheduler pndm: alpha_bar is 0 at timestep {timestep}")));
        }
        Ok(Self { evaluations, alpha_bars, prediction: config.prediction, outputs: VecDeque::new(), start: None })
    }

    /// Adams-Bashforth of the order that the outputs so far allow; the newest first.
    fn combined(&self) -> Result<Tensor> {
        let weights: &[f64] = match self.outputs.len() {
            1 => &[1.],
            2 => &[3. / 2., -1. / 2.],
            3 => &[23. / 12., -16. / 12., 5. / 12.],
            _ => &[55. / 24., -59. / 24., 37. / 24., -9. / 24.],
        };
        let mut sum = (&self.outputs[0] * weights[0])?;
        for (output, weight) in self.outputs.iter().zip(weights).skip(1) {
            sum = (sum + (output * *weight)?)?;
        }
        Ok(sum)
    }
}

impl Sampler for Pndm {
    fn evaluations(&self) -> &[Evaluation] {
        &self.evaluations
    }

    /// Eq. 11 of the paper (9 of its preprint): `z' = sqrt(a' / a) z - (a' - a) noise / (a sqrt(1 - a') + sqrt(a (1 - a) a'))`.
    fn step(&mut self, i: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let sub_evaluation = evaluation(&self.evaluations, i)?.sub_evaluation;
        let output = model_output.to_dtype(sample.dtype())?;
        let (sample, output) = if sub_evaluation == 1 {
            let no_start = || Error::Input(format!("scheduler pndm: evaluation {i} before evaluation {}", i - 1));
            let start = self.start.take().ok_or_else(no_start)?;
            let mean = ((output + &self.outputs[0])? / 2.)?;
            (start, mean)
        } else {
            if i == 0 {
                self.outputs.clear();
                self.start = Some(sample.clone());
            }
            self.outputs.push_front(output);
            self.outputs.truncate(Self::ORDER);
            (sample.clone(), self.combined()?)
        };
        let (a, next) = self.alpha_bars[i];
        let noise = match self.prediction {
            Prediction::Epsilon => output,
            Prediction::Velocity => ((output * a.sqrt())? + (&sample * (1. - a).sqrt())?)?,
        };
        let denominator = a * (1. - next).sqrt() + (a * (1. - a) * next).sqrt();
        Ok(((sample * (next / a).sqrt())? - (noise * ((next - a) / denominator))?)?)
    }
}
