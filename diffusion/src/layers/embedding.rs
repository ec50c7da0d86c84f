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

    /// Timesteps (may be fractional), one per item, to `[B, channels]` in f32.
    pub(crate) fn sinusoids(&self, timesteps: &[f64]) -> Result<Tensor> {
        let device = self.linear_1.weight.device();
        timestep_sinusoid(timesteps, self.channels, self.flip_sin_to_cos, self.freq_shift, device)
    }

    /// [`Self::sinusoids`] to `[B, width]`.
    pub(crate) fn forward(&self, sinusoids: &Tensor) -> Result<Tensor> {
        let sinusoids = sinusoids.to_dtype(self.linear_1.weight.dtype())?;
        self.linear_2.forward(&silu(&self.linear_1.forward(&sinusoids)?)?)
    }
}

/// The sinusoid `[B, channels]` of timesteps, in f32 throughout, as diffusers computes it. The sine half comes first, or
/// with `flip_sin_to_cos` the cosine half; `freq_shift` is subtracted from the number of frequencies that the exponent is
/// divided by.
pub fn timestep_sinusoid(
    timesteps: &[f64],
    channels: usize,
    flip_sin_to_cos: bool,
    freq_shift: f64,
    device: &Device,
) -> Result<Tensor> {
    let half = channels / 2;
    let exponent = -(10_000f32.ln());
    let mut wave = Vec::with_capacity(timesteps.len() * channels);
    for &t in timesteps {
        let angle = |i: usize| t as f32 * (exponent * i as f32 / (half as f32 - freq_shift as f32)).exp();
        let (sin, cos) = ((0..half).map(|i| angle(i).sin()), (0..half).map(|i| angle(i).cos()));
        if flip_sin_to_cos {
            wave.extend(cos.chain(sin))
        } else {
            wave.extend(sin.chain(cos))
        }
        wave.resize(wave.len() + channels % 2, 0.);
    }
    Ok(Tensor::from_vec(wave, (timesteps.len(), channels), device)?)
}
