//! DPM-Solver++.

use candle_core::Tensor;
use serde::Deserialize;

use super::sampler::{check_first, evaluation};
use super::sigmas::{alpha_bar, sigmas_at};
use super::{Evaluation, FinalSigma, Prediction, Sampler, SchedulerConfig, Spacing};
use crate::{Error, Result};

/// How the second-order step uses the difference of the two newest predictions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SolverType {
    /// As a midpoint rule.
    #[default]
    Midpoint,
    /// As Heun's rule.
    Heun,
}

/// What a scheduler configuration says of DPM-Solver. Absent keys have diffusers' defaults.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct DpmSolverOptions {
    /// 2 is supported.
    pub solver_order: Option<usize>,
    /// `dpmsolver++` is supported.
    pub algorithm_type: Option<String>,
    /// See [`SolverType`].
    pub solver_type: Option<SolverType>,
    /// Whether the last step is of first order in runs of fewer than 15 steps.
    pub lower_order_final: Option<bool>,
    /// Whether it is in every run.
    pub euler_at_final: Option<bool>,
    /// Bound on ln(sqrt(alpha_bar) / sqrt(1 - alpha_bar)) where steps start; none is supported.
    pub lambda_min_clipped: Option<f64>,
    /// For models that predict a variance too, which are not supported.
    pub variance_type: Option<String>,
}

impl DpmSolverOptions {
    fn check(&self) -> Result<()> {
        let unsupported = |what: String| Err(Error::Unsupported(format!("scheduler dpmpp-2m: {what}")));
        match (self.solver_order, self.algorithm_type.as_deref(), self.variance_type.as_deref()) {
            (Some(order), ..) if order != 2 => {
                unsupported(format!("solver_order {order} is not supported; expected 2"))
            }
            (_, Some(other), _) if other != "dpmsolver++" => {
                unsupported(format!("algorithm_type `{other}` is not supported; expected `dpmsolver++`"))
            }
            (.., Some(learned)) => unsupported(format!("variance_type `{learned}` is not supported")),
            _ => match self.lambda_min_clipped {
                Some(bound) => unsupported(format!("lambda_min_clipped {bound} is not supported")),
                None => Ok(()),
            },
        }
    }
}

/// DPM-Solver++, second-order multistep (arXiv 2211.01095, Algorithm 2), as diffusers' `DPMSolverMultistepScheduler`.
#[derive(Clone, Debug)]
pub struct DpmSolver {
    evaluations: Vec<Evaluation>,
    /// One more than evaluations: the last is where the run ends.
    sigmas: Vec<f64>,
    prediction: Prediction,
    solver_type: SolverType,
    /// Whether the last step is of first order.
    lower_order_final: bool,
    /// z_0 as the evaluation before predicted it.
    previous: Option<Tensor>,
}

impl DpmSolver {
    /// Plans the steps `first .. steps`; the spacing is linspace where the configuration does not say. See
    /// [`super::Scheduler::plan`] for what fails.
    pub fn new(config: &SchedulerConfig, steps: usize, first: usize) -> Result<Self> {
        config.sigmas.check("dpmpp-2m")?;
        config.dpm_solver.check()?;
        check_first(first, steps)?;
        let total = config.num_train_timesteps;
        if steps >= total {
            let message =
                format!("scheduler: {steps} steps; expected 1 to {}, fewer than training timesteps", total - 1);
            return Err(Error::Input(message));
        }
        let spacing = config.spacing.unwrap_or(Spacing::Linspace);
        let mut timesteps = match spacing {
            Spacing::Trailing => spacing.timesteps(total, steps, 0)?,
            // The timestep that one more step would start from is where the last one ends.
            _ => spacing.timesteps(total, steps + 1, config.steps_offset)?,
        };
        timesteps.truncate(steps);
        let timesteps: Vec<f64> = timesteps.into_iter().map(|t| t as f64).collect();
        let sigmas = sigmas_at(config, &timesteps)?;
        let evaluations = timesteps.iter().zip(&sigmas).enumerate().skip(first);
        let evaluations = evaluations.map(|(step, (&timestep, &sigma))| Evaluation {
            step,
            sub_evaluation: 0,
            timestep,
            alpha_bar: alpha_bar(sigma),
        });
        let options = &config.dpm_solver;
        let ends_at_zero = config.sigmas.final_sigmas_type.unwrap_or_default() == FinalSigma::Zero;
        let lower = options.euler_at_final == Some(true) || (options.lower_order_final != Some(false) && steps < 15);
        Ok(Self {
            evaluations: evaluations.collect(),
            sigmas: sigmas[first..].to_vec(),
            prediction: config.prediction,
            solver_type: options.solver_type.unwrap_or_default(),
            lower_order_final: ends_at_zero || lower,
            previous: None,
        })
    }

    /// sqrt(alpha_bar), sqrt(1 - alpha_bar), and the logarithm of their ratio.
    fn signal_noise_lambda(&self, i: usize) -> (f64, f64, f64) {
        let sigma = self.sigmas[i];
        let signal = alpha_bar(sigma).sqrt();
        (signal, sigma * signal, -sigma.ln())
    }
}

impl Sampler for DpmSolver {
    fn evaluations(&self) -> &[Evaluation] {
        &self.evaluations
    }

    /// `z' = (sigma' / sigma) z - alpha' (exp(-h) - 1) D`, where h is the step in lambda and D the predicted z_0, extrapolated
    /// with the one before where there is one.
    fn step(&mut self, i: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let at = evaluation(&self.evaluations, i)?;
        let (z0, _) = self.prediction.split(model_output, sample, at.alpha_bar)?;
        let previous = if i == 0 { None } else { self.previous.take() };
        self.previous = Some(z0.clone());
        let (_, noise, lambda) = self.signal_noise_lambda(i);
        if noise == 0. {
            return Err(Error::Unsupported(format!("scheduler dpmpp-2m: no noise is left at evaluation {i}")));
        }
        let (signal_next, noise_next, lambda_next) = self.signal_noise_lambda(i + 1);
        let h = lambda_next - lambda; // infinite where the run ends without noise
        let first_order = ((sample * (noise_next / noise))? - (&z0 * (signal_next * (-h).exp_m1()))?)?;
        let last = i + 1 == self.evaluations.len();
        match previous.filter(|_| !(last && self.lower_order_final)) {
            None => Ok(first_order),
            Some(previous) => {
                let (.., lambda_before) = self.signal_noise_lambda(i - 1);
                let slope = ((z0 - previous)? * (h / (lambda - lambda_before)))?;
                let weight = match self.solver_type {
                    SolverType::Midpoint => -0.5 * (-h).exp_m1(),
                    SolverType::Heun => (-h).exp_m1() / h + 1.,
                };
                Ok((first_order + (slope * (signal_next * weight))?)?)
            }
        }
    }
}
