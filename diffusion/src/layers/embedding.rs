use candle_core::{Device, Tensor};

use super::{Linear, silu};
use crate::{Result, Scope};

/// Sinusoid of the timestep, then linear, SiLU, linear.
pub(crate) struct TimestepEmbedding {
    linear_1: Linear,
    linear_2: Linear,
    channels: usize,
    flip_sin_to_cos: bool,
    freq_shift: f64,
}

impl TimestepEmbedding {
    /// `channels` wide sinusoid to `width`.
    pub(crate) fn load(
        scope: &Scope,
        channels: usize,
        width: usize,
        flip_sin_to_cos: bool,
        freq_shift: f64,
    ) -> Result<Self> {
        Ok(Self {
            linear_1: Linear::load(&scope.enter("linear_1"), channels, width)?,
            linear_2: Linear::load(&scope.enter("linear_2"), width, width)?,
            channels,
            flip_sin_to_cos,
            freq_shift,
        })
    }

    /// Timesteps (may be fractional), one per item, to `[B, width]`.
    pub(crate) fn forward(&self, timesteps: &[f64]) -> Result<Tensor> {
        let weight = &self.linear_1.weight;
        let wave = self.sinusoid(timesteps, weight.device())?.to_dtype(weight.dtype())?;
        self.linear_2.forward(&silu(&self.linear_1.forward(&wave)?)?)
    }

    /// In f32 throughout, whatever the model's dtype, as diffusers computes it.
    fn sinusoid(&self, timesteps: &[f64], device: &Device) -> Result<Tensor> {
        let half = self.channels / 2;
        let exponent = -(10_000f32.ln());
        let mut wave = Vec::with_capacity(timesteps.len() * self.channels);
        for &t in timesteps {
            let angle = |i: usize| t as f32 * (exponent * i as f32 / (half as f32 - self.freq_shift as f32)).exp();
            let (sin, cos) = ((0..half).map(|i| angle(i).sin()), (0..half).map(|i| angle(i).cos()));
            if self.flip_sin_to_cos {
                wave.extend(cos.chain(sin))
            } else {
                wave.extend(sin.chain(cos))
            }
            wave.resize(wave.len() + self.channels % 2, 0.);
        }
        Ok(Tensor::from_vec(wave, (timesteps.len(), self.channels), device)?)
    }
}
