//! DDIM.

use candle_core::Tensor;

use super::{NoiseSchedule, Prediction, SchedulerConfig, Spacing};
use crate::{Error, Result};

/// The deterministic DDIM sampler (arXiv 2010.02502 with eta = 0), as diffusers' `DDIMScheduler`.
#[derive(Clone, Debug)]
pub struct Ddim {
    timesteps: Vec<f64>,
    /// alpha_bar where each step starts, and where it ends.
    alpha_bars: Vec<(f64, f64)>,
    prediction: Prediction,
    clip: Option<f64>,
}

impl Ddim {
    /// Plans `steps` steps; the spacing is leading and the last alpha_bar 1 where the configuration does not say.
    ///
    /// Fails when there are no steps or more than training timesteps, and when the noise would have to be predicted
    /// where alpha_bar is 0.
    pub fn new(config: &SchedulerConfig, steps: usize) -> Result<Self> {
        let total = config.num_train_timesteps;
        let schedule = NoiseSchedule::new(config)?;
        let alphas = schedule.alphas_cumprod();
        let last = if config.set_alpha_to_one.unwrap_or(true) { 1.0 } else { alphas[0] };
        let spacing = config.spacing.unwrap_or(Spacing::Leading);
        let timesteps = spacing.timesteps(total, steps, config.steps_offset)?;
        // diffusers steps down by T / steps whatever the spacing, not to the next timestep of its list.
        let stride = total / steps;
        let alpha_bars: Vec<_> =
            timesteps.iter().map(|&t| (alphas[t], t.checked_sub(stride).map_or(last, |next| alphas[next]))).collect();
        let pure_noise = alpha_bars.iter().position(|(alpha_bar, _)| *alpha_bar == 0.0);
        if let (Some(i), Prediction::Epsilon) = (pure_noise, config.prediction) {
            return Err(Error::Unsupported(format!(
                "scheduler: alpha_bar is 0 at timestep {}, where a predicted noise says nothing about the image; \
                 expected `v_prediction`",
                timesteps[i]
            )));
        }
        let timesteps = timesteps.into_iter().map(|t| t as f64).collect();
        Ok(Self { timesteps, alpha_bars, prediction: config.prediction, clip: config.clip })
    }

    /// The timesteps, noisiest first: what the U-Net is given at each step.
    pub fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    /// alpha_bar of the latents that step `i` starts from. Panics unless `i` is below the number of steps.
    pub fn alpha_bar(&self, i: usize) -> f64 {
        self.alpha_bars[i].0
    }

    /// The standard deviation of the latents that a run starts from.
    pub fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    /// Eq. 12 of the DDIM paper with sigma = 0: `z' = sqrt(alpha_bar') z_0 + sqrt(1 - alpha_bar') noise`.
    ///
    /// `model_output` and `sample` (z_t) have one shape, usually `[B, 4, H/8, W/8]`; so has the result, in the sample's
    /// dtype.
    pub fn step(&self, i: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let steps = self.alpha_bars.len();
        let past_end = || Error::Input(format!("scheduler: step {i} of a run of {steps}"));
        let &(alpha_bar, next) = self.alpha_bars.get(i).ok_or_else(past_end)?;
        let (z0, noise) = self.prediction.split(model_output, sample, alpha_bar)?;
        let z0 = match self.clip {
            Some(range) => z0.clamp(-range, range)?,
            None => z0,
        };
        Ok(((z0 * next.sqrt())? + (noise * (1.0 - next).sqrt())?)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::Betas;
    use super::*;

    fn config() -> SchedulerConfig {
        SchedulerConfig {
            num_train_timesteps: 1000,
            betas: Betas::ScaledLinear { start: 0.00085, end: 0.012 },
            rescale_betas_zero_snr: false,
            prediction: Prediction::Epsilon,
            spacing: None,
            steps_offset: 1,
            set_alpha_to_one: Some(false),
            clip: None,
        }
    }

    /// Runs seven steps, the model's output the same at each, and compares the timesteps and the last latents with
    /// DDIMScheduler of diffusers 0.42.1.
    fn assert_diffusers(config: &SchedulerConfig, timesteps: [f64; 7], expected: [f32; 3]) {
        let ddim = Ddim::new(config, 7).unwrap();
        assert_eq!(ddim.timesteps(), timesteps);
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
        let ddim = Ddim::new(&config, 10).unwrap();
        for (i, t) in ddim.timesteps().iter().enumerate() {
            assert_eq!(ddim.alpha_bar(i), alphas.alphas_cumprod()[*t as usize]);
        }
    }

    #[test]
    fn pure_noise_needs_a_velocity() {
        let mut config = SchedulerConfig { rescale_betas_zero_snr: true, spacing: Some(Spacing::Trailing), ..config() };
        let message = Ddim::new(&config, 5).unwrap_err().to_string();
        assert!(message.contains("timestep 999") && message.contains("v_prediction"), "{message}");

        config.prediction = Prediction::Velocity;
        let ddim = Ddim::new(&config, 5).unwrap();
        assert_eq!(ddim.alpha_bar(0), 0.0);
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
        let message = Ddim::new(&config(), 0).unwrap_err().to_string();
        assert!(message.contains("0 steps"), "{message}");
        let message = Ddim::new(&config(), 1001).unwrap_err().to_string();
        assert!(message.contains("1001 steps") && message.contains("1 to 1000"), "{message}");
        let z = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        let message = Ddim::new(&config(), 4).unwrap().step(4, &z, &z).unwrap_err().to_string();
        assert!(message.contains("step 4 of a run of 4"), "{message}");
    }
}
