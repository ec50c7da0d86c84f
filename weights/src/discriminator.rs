//! A U-Net and the adapter on its features: what training changes and evaluation asks.

use candle_core::{DType, Device, Tensor};
use diffusion::scheduler::{NoiseSchedule, Prediction, SchedulerConfig};
use diffusion::{LoraEntry, Tap, UNet};
use dpt_plugin::loss::{Presence, pair_scores};
use dpt_plugin::{Adapter, Grounding};

use crate::{Error, Result};

/// Scores pictures against texts, and finds what texts speak of in them.
pub struct Discriminator {
    pub(crate) unet: UNet,
    pub(crate) adapter: Adapter,
    tap: Tap,
    /// alpha_bar of every training timestep.
    alphas_cumprod: Vec<f64>,
    prediction: Prediction,
}

/// Rows to be judged: noisy latents of one picture each, with one text each.
pub struct Rows {
    /// z_t, `[R, C, h, w]`.
    pub noisy: Tensor,
    /// t of each.
    pub timesteps: Vec<usize>,
    /// What the cross-attention reads, `[R, tokens, width]`.
    pub hidden: Tensor,
    /// CLIP(y), `[R, p]`.
    pub pooled: Tensor,
}

impl Rows {
    /// Rows that are evaluated together.
    const MOST: usize = 64;

    /// The same rows, as many at a time as memory should be asked for.
    fn chunks(&self) -> Result<Vec<Self>> {
        let count = self.timesteps.len();
        let chunk = |start: usize| {
            let len = Self::MOST.min(count - start);
            let part = |t: &Tensor| t.narrow(0, start, len)?.contiguous();
            let timesteps = self.timesteps[start..start + len].to_vec();
            Ok(Self { noisy: part(&self.noisy)?, timesteps, hidden: part(&self.hidden)?, pooled: part(&self.pooled)? })
        };
        (0..count).step_by(Self::MOST).map(chunk).collect()
    }
}

/// The box that a text speaks of.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Found {
    /// (cx, cy, w, h) in shares of the picture.
    pub bounding_box: [f32; 4],
    /// The probability that the query gives it.
    pub probability: f32,
}

impl Discriminator {
    /// Fails when the adapter does not fit the U-Net.
    pub fn new(unet: UNet, adapter: Adapter, scheduler: &SchedulerConfig) -> Result<Self> {
        let sizes = adapter.sizes();
        let tap = unet.config().tap(&sizes.tap)?;
        let (found, expected) = (sizes.channels, unet.config().tap_channels(tap));
        if found != expected {
            return Err(Error::Request(format!(
                "the adapter reads {found} channels, {tap} of this U-Net has {expected}"
            )));
        }
        let (found, expected) = (sizes.clip_dim, unet.config().cross_attention_dim);
        if found != expected {
            return Err(Error::Request(format!(
                "the adapter speaks of text of width {found}, the model's has {expected}"
            )));
        }
        let alphas_cumprod = NoiseSchedule::new(scheduler)?.alphas_cumprod().to_vec();
        Ok(Self { unet, adapter, tap, alphas_cumprod, prediction: scheduler.prediction })
    }

    /// The U-Net.
    pub fn unet(&self) -> &UNet {
        &self.unet
    }

    /// What the adapter reads.
    pub fn tap(&self) -> Tap {
        self.tap
    }

    /// The adapter.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// Training timesteps.
    pub fn timesteps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// Merges low-rank changes.
    pub fn merge_lora(&mut self, entries: &[LoraEntry]) -> Result<()> {
        Ok(self.unet.merge_lora(entries, 1.)?)
    }

    /// `sqrt(alpha_bar)` and `sqrt(1 - alpha_bar)` of each timestep, `[B, 1, 1, 1]`.
    pub fn signal_and_noise(&self, timesteps: &[usize], dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
        let column = |f: fn(f64) -> f64| -> Result<Tensor> {
            let values: Vec<f64> = timesteps.iter().map(|t| f(self.alphas_cumprod[*t])).collect();
            Ok(Tensor::from_vec(values, (timesteps.len(), 1, 1, 1), device)?.to_dtype(dtype)?)
        };
        Ok((column(f64::sqrt)?, column(|alpha_bar| (1. - alpha_bar).sqrt())?))
    }

    /// z_t of scaled latents `[B, C, h, w]`.
    pub fn noised(&self, latents: &Tensor, noise: &Tensor, timesteps: &[usize]) -> Result<Tensor> {
        let (signal, deviation) = self.signal_and_noise(timesteps, latents.dtype(), latents.device())?;
        Ok((latents.broadcast_mul(&signal)? + noise.broadcast_mul(&deviation)?)?)
    }

    /// What the U-Net should predict at z_t, in the latents' shape.
    pub fn target(&self, latents: &Tensor, noise: &Tensor, timesteps: &[usize]) -> Result<Tensor> {
        match self.prediction {
            Prediction::Epsilon => Ok(noise.clone()),
            Prediction::Velocity => {
                let (signal, deviation) = self.signal_and_noise(timesteps, latents.dtype(), latents.device())?;
                Ok((noise.broadcast_mul(&signal)? - latents.broadcast_mul(&deviation)?)?)
            }
        }
    }

    /// s of each row, `[R]` (Eq. 2).
    pub fn scores(&self, rows: &Rows) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        for rows in rows.chunks()? {
            let h = self.adapter.matching(&self.queries(&rows)?)?;
            let scores = pair_scores(&h, &rows.pooled.to_dtype(h.dtype())?)?;
            all.extend(scores.to_dtype(DType::F32)?.to_vec1::<f32>()?);
        }
        Ok(all)
    }

    /// The box of each row's text, by the grounding query that is surest of it. Fails when the adapter has none.
    pub fn find(&self, rows: &Rows) -> Result<Vec<Found>> {
        if self.adapter.sizes().grounding_queries == 0 {
            return Err(Error::Request("the adapter has no grounding queries".into()));
        }
        let mut all = Vec::new();
        for rows in rows.chunks()? {
            let Grounding { class_logits, boxes, .. } = self.adapter.grounding(&self.queries(&rows)?)?;
            let probability = Presence::of_logits(&class_logits)?.probability;
            let surest = probability.argmax(1)?.to_vec1::<u32>()?;
            let boxes = boxes.to_dtype(DType::F32)?.to_vec3::<f32>()?;
            let probability = probability.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            all.extend(surest.iter().enumerate().map(|(row, query)| {
                let at = *query as usize;
                let [x, y, w, h] = boxes[row][at][..] else { unreachable!("boxes have four numbers") };
                Found { bounding_box: [x, y, w, h], probability: probability[row][at] }
            }));
        }
        Ok(all)
    }

    /// The mean squared error of the U-Net's prediction in each cell of each row, `[R, h, w]`: the whole U-Net runs. `target`
    /// has the latents' shape.
    pub fn denoising_errors(&self, rows: &Rows, target: &Tensor) -> Result<Tensor> {
        let (mut all, mut start) = (Vec::new(), 0);
        for rows in rows.chunks()? {
            let text = self.unet.text(&rows.hidden)?;
            let output = self.unet.forward(&rows.noisy, &as_f64(&rows.timesteps), &text)?;
            let target = target.narrow(0, start, rows.timesteps.len())?;
            start += rows.timesteps.len();
            all.push((output.to_dtype(target.dtype())? - target)?.sqr()?.mean(1)?);
        }
        Ok(Tensor::cat(&all, 0)?)
    }

    fn queries(&self, rows: &Rows) -> Result<Tensor> {
        let (text, timesteps) = (self.unet.text(&rows.hidden)?, as_f64(&rows.timesteps));
        let features = self.unet.features(&rows.noisy, &timesteps, &text, self.tap)?;
        let queries = self.adapter.queries(&features, &timesteps)?;
        Ok(queries.get(queries.dim(0)? - 1)?)
    }
}

/// As the U-Net takes them.
pub(crate) fn as_f64(timesteps: &[usize]) -> Vec<f64> {
    timesteps.iter().map(|t| *t as f64).collect()
}
