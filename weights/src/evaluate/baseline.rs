use candle_core::Tensor;
use serde::Serialize;

use super::{Share, box_iou};
use crate::data::{Encoder, Example, Source};
use crate::world::Random;
use crate::{Discriminator, Result, Rows};

/// What denoising errors tell without training (the paper's Table 3).
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Baselines {
    /// The caption denoises its picture better than a hard negative one (Diffusion Classifier, arXiv 2303.16203).
    pub image_to_text: Share,
    /// The caption helps its picture more, against no text, than a hard negative picture (DiffusionITM, arXiv 2305.16397).
    pub text_to_image: Share,
    /// Both.
    pub overall: Share,
    /// Of the boxes that an example's expressions name, the expression's own is that in which its text helps most against no
    /// text (Local Denoising). Unlike the grounding heads it is given the boxes; examples with one are left out.
    pub boxes: Share,
}

/// Evaluates the first `examples` of a source; errors are means over `draws` of timestep and noise, which an item's pictures
/// and texts share.
pub fn baselines(
    discriminator: &Discriminator,
    encoder: &mut Encoder,
    source: &dyn Source,
    (examples, draws): (usize, usize),
    seed: u64,
    progress: &mut dyn FnMut(usize),
) -> Result<Baselines> {
    let mut result = Baselines::default();
    for index in 0..examples.min(source.len()) {
        let example = source.example(index)?;
        let errors = Errors { discriminator, draws, seed, index: index as u64 };
        errors.example(&example, encoder, &mut result)?;
        progress(index + 1);
    }
    result.overall = result.image_to_text.and(result.text_to_image);
    Ok(result)
}

struct Errors<'a> {
    discriminator: &'a Discriminator,
    draws: usize,
    seed: u64,
    index: u64,
}

impl Errors<'_> {
    fn example(&self, example: &Example, encoder: &mut Encoder, result: &mut Baselines) -> Result<()> {
        let own = encoder.latents(&[&example.picture])?;
        let right = mean(&self.of(&own, &example.caption, encoder)?)?;
        for text in &example.hard_captions {
            result.image_to_text.add(right < mean(&self.of(&own, text, encoder)?)?);
        }
        let without = self.of(&own, "", encoder)?;
        for picture in &example.hard_pictures {
            let other = encoder.latents(&[picture])?;
            let help = mean(&self.of(&other, "", encoder)?)? - mean(&self.of(&other, &example.caption, encoder)?)?;
            result.text_to_image.add(mean(&without)? - right > help);
        }
        let mut candidates: Vec<[f32; 4]> = Vec::new();
        for expression in &example.expressions {
            if candidates.iter().all(|other| box_iou(*other, expression.bounding_box) < 0.5) {
                candidates.push(expression.bounding_box);
            }
        }
        // One box alone cannot be mistaken.
        for expression in example.expressions.iter().filter(|_| candidates.len() > 1) {
            let help = (&without - self.of(&own, &expression.text, encoder)?)?.to_vec2::<f32>()?;
            let best = candidates.iter().max_by(|a, b| within(&help, **a).total_cmp(&within(&help, **b)));
            let best = best.expect("at least the expression's own");
            result.boxes.add(box_iou(*best, expression.bounding_box) >= 0.5);
        }
        Ok(())
    }

    /// The mean error of every cell, `[h, w]`.
    fn of(&self, latents: &Tensor, text: &str, encoder: &mut Encoder) -> Result<Tensor> {
        let n = self.draws;
        let device = latents.device();
        let mut random = Random::new(self.seed, self.index);
        let timesteps: Vec<usize> = (0..n).map(|_| random.below(self.discriminator.timesteps())).collect();
        let rows = |t: &Tensor| -> Result<Tensor> {
            Ok(t.index_select(&Tensor::zeros(n, candle_core::DType::U32, device)?, 0)?)
        };
        let latents = rows(latents)?;
        let noise = Tensor::from_vec(random.normals(latents.elem_count()), latents.shape(), device)?;
        let noisy = self.discriminator.noised(&latents, &noise, &timesteps)?;
        let target = self.discriminator.target(&latents, &noise, &timesteps)?;
        let texts = encoder.texts(&[text])?;
        let rows = Rows { noisy, timesteps, hidden: rows(&texts.hidden)?, pooled: rows(&texts.pooled)? };
        Ok(self.discriminator.denoising_errors(&rows, &target)?.mean(0)?)
    }
}

fn mean(errors: &Tensor) -> Result<f32> {
    Ok(errors.mean_all()?.to_scalar()?)
}

/// The mean over the cells whose centre is in the box; the cell of its centre where there are none.
fn within(values: &[Vec<f32>], [cx, cy, w, h]: [f32; 4]) -> f32 {
    let (rows, columns) = (values.len(), values[0].len());
    let inside = |at: usize, count: usize, centre: f32, size: f32| {
        ((at as f32 + 0.5) / count as f32 - centre).abs() <= size / 2.
    };
    let (mut sum, mut count) = (0., 0);
    for (_, row) in values.iter().enumerate().filter(|(y, _)| inside(*y, rows, cy, h)) {
        for (_, value) in row.iter().enumerate().filter(|(x, _)| inside(*x, columns, cx, w)) {
            sum += value;
            count += 1;
        }
    }
    let cell = |centre: f32, count: usize| ((centre * count as f32) as usize).min(count - 1);
    if count > 0 { sum / count as f32 } else { values[cell(cy, rows)][cell(cx, columns)] }
}
