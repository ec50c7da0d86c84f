//! DDIM.

use candle_core::Tensor;

use super::sampler::{check_first, evaluation};
use super::{Evaluation, NoiseSchedule, Prediction, Sampler, SchedulerConfig, Spacing};
use crate::{Error, Result};

/// The deterministic DDIM sampler (arXiv 2010.02502 with eta = 0), as diffusers' `DDIMScheduler`.
#[derive(Clone, Debug)]
pub struct Ddim {
    evaluations: Vec<Evaluation>,
    /// alpha_bar where each step ends.
    ends: Vec<f64>,
    prediction: Prediction,
    clip: Option<f64>,
}

impl Ddim {
    /// Plans the steps `first .. steps`; the spacing is leading and the last alpha_bar 1 where the configuration does not
    /// say.
    ///
    /// Fails where [`super::Scheduler::plan`] does, and when the noise would have to be predicted where alpha_bar is 0.
    pub fn new(config: &SchedulerConfig, steps: usize, first: usize) -> Result<Self> {
        let total = config.num_train_timesteps;
        let schedule = NoiseSchedule::new(config)?;
        let alphas = schedule.alphas_cumprod();
        let last = if config.set_alpha_to_one.unwrap_or(true) { 1.0 } else { alphas[0] };
        let spacing = config.spacing.unwrap_or(Spacing::Leading);
        let timesteps = spacing.timesteps(total, steps, config.steps_offset)?;
        check_first(first, steps)?;
        // diffusers steps down by T / steps whatever the spacing, not to the next timestep of its list.
        let stride = total / steps;
        let (mut evaluations, mut ends) = (Vec::new(), Vec::new());
        for (step, &t) in timesteps.iter().enumerate().skip(first) {
            if let (true, Prediction::Epsilon) = (alphas[t] == 0.0, config.prediction) {
                return Err(Error::Unsupported(format!(
                    "scheduler: alpha_bar is 0 at timestep {t}, where a predicted noise says nothing about the image; \
                     expected `v_prediction`"
                )));
            }
            evaluations.push(Evaluation { step, sub_evaluation: 0, timestep: t as f64, alpha_bar: alphas[t] });
            ends.push(t.checked_sub(stride).map_or(last, |next| alphas[next]));
        }
        Ok(Self { evaluations, ends, prediction: config.prediction, clip: config.clip })
    }
}

impl Sampler for Ddim {
    fn evaluations(&self) -> &[Evaluation] {
        &self.evaluations
    }

    /// Eq. 12 of the DDIM paper with sigma = 0: `z' = sqrt(alpha_bar') z_0 + sqrt(1 - alpha_bar') noise`.
    fn step(&mut self, i: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let Evaluation { alpha_bar, .. } = evaluation(&self.evaluations, i)?;
        let (z0, noise) = self.prediction.split(model_output, sample, alpha_bar)?;
        let z0 = match self.clip {
            Some(range) => z0.clamp(-range, range)?,
            None => z0,
        };
        let next = self.ends[i];
        Ok(((z0 * next.sqrt())? + (noise * (1.0 - next).sqrt())?)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::SchedulerConfig;
    use super::*;

    fn config() -> SchedulerConfig {
        SchedulerConfig { steps_offset: 1, set_alpha_to_one: Some(false), ..SchedulerConfig::stable_diffusion() }
    }

    /// Runs seven steps, the model's output the same at each, and compares the timesteps and the last latents with
    /// DDIMScheduler of diffusers 0.42.1.
    fn assert_diffusers(config: &SchedulerConfig, timesteps: [f64; 7], expected: [f32; 3]) {
        let mut ddim = Ddim::new(config, 7, 0).unwrap();
        assert!(ddim.evaluations().iter().map(|e| e.timestep).eq(timesteps));
        let output = Tensor::new(&[0.3f32, 0.9, -1.1], &Device::Cpu).unwrap();
        let mut z = Tensor::new(&[0.5f32, -1.25, 2.0], &Device::Cpu).unwrap();
        for i in 0..7 {
            z = ddim.step(i, &output, &z).unwrap();
        }
        let found = z.to_vec1::<f32>().unwrap();
        let near = |(a, b): (&f32, &f32)| (a - b).abs() < 2e-5 * b.abs();
        assert!(found.iter().zip(&expected).all(near), "{found:?} is not {expected:?}");
    }

    #[test]
    fn spacings_final_alpha_and_clipping_as_in_diffusers() {
        let leading = [853.0, 711.0, 569.0, 427.0, 285.0, 143.0, 1.0];
        let base = config();
        assert_diffusers(
            &SchedulerConfig { spacing: Some(Spacing::Trailing), ..base.clone() },
            [999.0, 856.0, 713.0, 570.0, 428.0, 285.0, 142.0],
            [2.909781, -30.993067, 44.701435],
        );
        assert_diffusers(
            &SchedulerConfig { spacing: Some(Spacing::Linspace), ..base.clone() },
            [999.0, 832.0, 666.0, 500.0, 333.0, 166.0, 0.0],
            [2.1868935, -22.157951, 32.013424],
        );
        let to_one = SchedulerConfig { set_alpha_to_one: None, ..base.clone() };
        assert_diffusers(&to_one, leading, [1.3519607, -14.221474, 20.520338]);
        let clipped = SchedulerConfig { clip: Some(0.5), ..base };
        assert_diffusers(&clipped, leading, [0.5085338, -0.4735478, 0.4677167]);
    }

    #[test]
    fn alpha_bar_belongs_to_the_timestep() {
        let config = config();
        let alphas = NoiseSchedule::new(&config).unwrap();
        for (step, at) in Ddim::new(&config, 10, 0).unwrap().evaluations().iter().enumerate() {
            assert_eq!((at.step, at.alpha_bar), (step, alphas.alphas_cumprod()[at.timestep as usize]));
        }
    }

    #[test]
    fn a_run_may_start_further_down() {
        let (whole, rest) = (Ddim::new(&config(), 10, 0).unwrap(), Ddim::new(&config(), 10, 7).unwrap());
        assert_eq!(rest.evaluations(), &whole.evaluations()[7..]);
        assert_eq!(rest.ends, whole.ends[7..]);
        let message = Ddim::new(&config(), 10, 10).unwrap_err().to_string();
        assert!(message.contains("step 10 of 10"), "{message}");
    }

    #[test]
    fn pure_noise_needs_a_velocity() {
        let mut config = SchedulerConfig { rescale_betas_zero_snr: true, spacing: Some(Spacing::Trailing), ..config() };
        let message = Ddim::new(&config, 5, 0).unwrap_err().to_string();
        assert!(message.contains("timestep 999") && message.contains("v_prediction"), "{message}");

        config.prediction = Prediction::Velocity;
        let mut ddim = Ddim::new(&config, 5, 0).unwrap();
        assert_eq!(ddim.evaluations()[0].alpha_bar, 0.0);
        let (output, sample) =
            (Tensor::new(&[0.5f32], &Device::Cpu).unwrap(), Tensor::new(&[2f32], &Device::Cpu).unwrap());
        // At alpha_bar 0, z_0 = -v and the noise is the sample itself.
        let found = ddim.step(0, &output, &sample).unwrap().to_vec1::<f32>().unwrap()[0];
        let next = NoiseSchedule::new(&config).unwrap().alphas_cumprod()[799];
        let expected = -0.5 * next.sqrt() + 2.0 * (1.0 - next).sqrt();
        assert!((f64::from(found) - expected).abs() < 1e-6, "{found} is not {expected}");
    }

    #[test]
    fn steps_out_of_range_are_refused() {
        let message = Ddim::new(&config(), 0, 0).unwrap_err().to_string();
        assert!(message.contains("0 steps"), "{message}");
        let message = Ddim::new(&config(), 1001, 0).unwrap_err().to_string();
        assert!(message.contains("1001 steps") && message.contains("1 to 1000"), "{message}");
        let z = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        let message = Ddim::new(&config(), 4, 0).unwrap().step(4, &z, &z).unwrap_err().to_string();
        assert!(message.contains("evaluation 4 of a run of 4"), "{message}");
    }
}
