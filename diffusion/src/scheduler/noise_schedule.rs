//! How much of the image is left at each timestep, and what the model's prediction says about it.

use std::f64::consts::FRAC_PI_2;

use candle_core::Tensor;

use super::{Betas, SchedulerConfig};
use crate::{Error, Result};

/// alpha_bar of every training timestep, with diffusers' arithmetic.
#[derive(Clone, Debug)]
pub struct NoiseSchedule {
    alphas_cumprod: Vec<f64>,
}

impl NoiseSchedule {
    /// Computes the schedule. Fails when the configuration's numbers make none.
    pub fn new(config: &SchedulerConfig) -> Result<Self> {
        config.check().map_err(|message| Error::Input(format!("scheduler: {message}")))?;
        let total = config.num_train_timesteps;
        let mut betas: Vec<f32> = match &config.betas {
            Betas::Linear { start, end } => linspace(*start as f32, *end as f32, total),
            Betas::ScaledLinear { start, end } => {
                linspace(start.sqrt() as f32, end.sqrt() as f32, total).into_iter().map(|root| root * root).collect()
            }
            Betas::SquaredCosine => squared_cosine(total),
            Betas::Trained(betas) => betas.clone(),
        };
        if config.rescale_betas_zero_snr {
            betas = rescale_zero_terminal_snr(&betas);
        }
        let alphas_cumprod: Vec<f64> = cumulative(betas.iter().map(|beta| 1.0 - beta)).map(f64::from).collect();
        match alphas_cumprod.iter().position(|alpha_bar| !(0.0..=1.0).contains(alpha_bar)) {
            None => Ok(Self { alphas_cumprod }),
            Some(t) => {
                let message = format!("scheduler: alpha_bar is {} at timestep {t}, expected 0 to 1", alphas_cumprod[t]);
                Err(Error::Input(message))
            }
        }
    }

    /// alpha_bar of timesteps 0 to T - 1, each rounded to f32 as diffusers keeps it.
    pub fn alphas_cumprod(&self) -> &[f64] {
        &self.alphas_cumprod
    }
}

/// Running products, rounded to f32 after each; torch carries them in f64.
fn cumulative(factors: impl Iterator<Item = f32>) -> impl Iterator<Item = f32> {
    factors.scan(1f64, |product, factor| {
        *product *= f64::from(factor);
        Some(*product as f32)
    })
}

/// torch.linspace in f32, which counts from the nearer end.
fn linspace(start: f32, end: f32, count: usize) -> Vec<f32> {
    let step = (end - start) / (count.max(2) - 1) as f32;
    let value = |i| if i < count / 2 { start + step * i as f32 } else { end - step * (count - 1 - i) as f32 };
    if count == 1 { vec![start] } else { (0..count).map(value).collect() }
}

/// diffusers' `betas_for_alpha_bar` with its cosine.
fn squared_cosine(count: usize) -> Vec<f32> {
    let alpha_bar = |i: usize| ((i as f64 / count as f64 + 0.008) / 1.008 * FRAC_PI_2).cos().powi(2);
    (0..count).map(|i| (1.0 - alpha_bar(i + 1) / alpha_bar(i)).min(0.999) as f32).collect()
}

/// arXiv 2305.08891, Algorithm 1: shifts and scales sqrt(alpha_bar) so that the last is 0 and the first stays.
fn rescale_zero_terminal_snr(betas: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = cumulative(betas.iter().map(|beta| 1.0 - beta)).map(f32::sqrt).collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let scale = first / (first - last);
    let alpha_bar: Vec<f32> = roots.iter().map(|root| ((root - last) * scale).powi(2)).collect();
    let alphas = std::iter::once(alpha_bar[0]).chain(alpha_bar.windows(2).map(|pair| pair[1] / pair[0]));
    alphas.map(|alpha| 1.0 - alpha).collect()
}

/// What the U-Net's output means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    /// The noise in z_t.
    Epsilon,
    /// v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) z_0 (SD 2.x at 768 pixels).
    Velocity,
}

impl Prediction {
    /// The model's (z_0, noise), such that `sample = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) noise`. All of one shape,
    /// in the sample's dtype.
    pub fn split(self, model_output: &Tensor, sample: &Tensor, alpha_bar: f64) -> Result<(Tensor, Tensor)> {
        let output = model_output.to_dtype(sample.dtype())?;
        let (signal, noise) = (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
        Ok(match self {
            Self::Epsilon => (((sample - (&output * noise)?)? / signal)?, output),
            Self::Velocity => (((sample * signal)? - (&output * noise)?)?, ((&output * signal)? + (sample * noise)?)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::SchedulerConfig;
    use super::*;

    fn schedule(num_train_timesteps: usize, betas: Betas, rescale_betas_zero_snr: bool) -> Result<NoiseSchedule> {
        NoiseSchedule::new(&SchedulerConfig {
            num_train_timesteps,
            betas,
            rescale_betas_zero_snr,
            steps_offset: 0,
            ..SchedulerConfig::stable_diffusion()
        })
    }

    fn assert_near(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        let near = |(a, b): (&f64, &f64)| (a - b).abs() <= 2e-7 * b.abs();
        assert!(found.iter().zip(expected).all(near), "{found:?} is not {expected:?}");
    }

    #[test]
    fn schedules_by_hand() {
        let linear = schedule(3, Betas::Linear { start: 0.1, end: 0.3 }, false).unwrap();
        assert_near(linear.alphas_cumprod(), &[0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7]);
        let scaled = schedule(3, Betas::ScaledLinear { start: 0.04, end: 0.16 }, false).unwrap();
        assert_near(scaled.alphas_cumprod(), &[0.96, 0.96 * 0.91, 0.96 * 0.91 * 0.84]);
        let trained = schedule(2, Betas::Trained(vec![0.5, 0.25]), false).unwrap();
        assert_near(trained.alphas_cumprod(), &[0.5, 0.375]);
        let single = schedule(1, Betas::Linear { start: 0.1, end: 0.3 }, false).unwrap();
        assert_near(single.alphas_cumprod(), &[0.9]);
    }

    // What diffusers 0.42.1 (torch 2.15) has in DDIMScheduler(..).alphas_cumprod at timesteps 0, 1, 250, 500, 750, 999 of
    // 1000.
    fn assert_diffusers(betas: Betas, zero_snr: bool, expected: [f64; 6]) {
        let schedule = schedule(1000, betas, zero_snr).unwrap();
        assert_near(&[0, 1, 250, 500, 750, 999].map(|t| schedule.alphas_cumprod()[t]), &expected);
    }

    #[test]
    fn schedules_as_in_diffusers() {
        let sd = Betas::ScaledLinear { start: 0.00085, end: 0.012 };
        assert_diffusers(
            sd.clone(),
            false,
            [
                0.9991499781608582,
                0.9982960224151611,
                0.67379230260849,
                0.27633246779441833,
                0.05616980418562889,
                0.00466009508818388,
            ],
        );
        assert_diffusers(
            sd,
            true,
            [
                0.9991499781608582,
                0.9982334971427917,
                0.6524567008018494,
                0.24101854860782623,
                0.032799094915390015,
                0.0,
            ],
        );
        assert_diffusers(
            Betas::SquaredCosine,
            false,
            [
                0.9999586939811707,
                0.9999125599861145,
                0.8458880186080933,
                0.4922850430011749,
                0.14317865669727325,
                2.4287349909002387e-09,
            ],
        );
        assert_diffusers(
            Betas::Linear { start: 0.0001, end: 0.02 },
            false,
            [
                0.9998999834060669,
                0.9997800588607788,
                0.5214229822158813,
                0.07779665291309357,
                0.003300158539786935,
                4.035830352222547e-05,
            ],
        );
    }

    #[test]
    fn both_predictions_split_the_same_sample() {
        let row = |values: [f64; 3]| Tensor::new(&values, &Device::Cpu).unwrap();
        let (z0, noise, alpha_bar) = (row([1.0, -2.0, 0.5]), row([0.3, 0.1, -1.5]), 0.36f64);
        let sample = ((&z0 * 0.6).unwrap() + (&noise * 0.8).unwrap()).unwrap();
        let velocity = ((&noise * 0.6).unwrap() - (&z0 * 0.8).unwrap()).unwrap();
        for (prediction, output) in [(Prediction::Epsilon, &noise), (Prediction::Velocity, &velocity)] {
            let (found_z0, found_noise) = prediction.split(output, &sample, alpha_bar).unwrap();
            assert_near(&found_z0.to_vec1().unwrap(), &z0.to_vec1().unwrap());
            assert_near(&found_noise.to_vec1().unwrap(), &noise.to_vec1().unwrap());
        }
    }

    #[test]
    fn a_configuration_without_a_schedule_is_refused() {
        let message = schedule(3, Betas::Trained(vec![0.1]), false).unwrap_err().to_string();
        assert!(message.contains("1 trained_betas for 3"), "{message}");
    }
}
