use std::collections::BTreeMap;

use candle_core::Tensor;
use serde::Serialize;

use super::{box_iou, wilson};
use crate::data::{Encoder, Example, Source};
use crate::world::Random;
use crate::{Discriminator, Result, Rows};

/// A share of right answers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Share {
    /// Right ones.
    pub hits: usize,
    /// All.
    pub trials: usize,
}

impl Share {
    /// Counts an answer.
    pub fn add(&mut self, right: bool) {
        self.hits += usize::from(right);
        self.trials += 1;
    }

    /// Of all, the right ones; 0 of none.
    pub fn percent(self) -> f64 {
        100. * self.hits as f64 / self.trials.max(1) as f64
    }

    /// Both shares' answers.
    pub fn and(self, other: Self) -> Self {
        Self { hits: self.hits + other.hits, trials: self.trials + other.trials }
    }
}

impl Serialize for Share {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Full {
            share: Option<f64>,
            interval: (f64, f64),
            trials: usize,
        }
        let share = (self.trials > 0).then(|| self.hits as f64 / self.trials as f64);
        Full { share, interval: wilson(self.hits, self.trials), trials: self.trials }.serialize(serializer)
    }
}

/// How well a discriminator tells pictures and texts apart at one timestep.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Discriminative {
    /// The caption scores higher than a hard negative one, for its picture.
    pub image_to_text: Share,
    /// The picture scores higher than a hard negative one, for its caption.
    pub text_to_image: Share,
    /// Both.
    pub overall: Share,
    /// Both, by the examples' category.
    pub by_category: BTreeMap<String, Share>,
    /// An expression's box is found with an intersection over union of at least 0.5.
    pub boxes: Share,
}

impl Discriminative {
    fn add_to_category(&mut self, example: &Example, right: bool) {
        if let Some(category) = &example.category {
            self.by_category.entry(category.clone()).or_default().add(right);
        }
    }
}

/// Rows of one run.
const BATCH: usize = 32;

/// Evaluates the first `examples` of a source at timestep `t`. An item's pictures and texts are seen in the same noise.
pub fn discriminative(
    discriminator: &Discriminator,
    encoder: &mut Encoder,
    source: &dyn Source,
    (examples, t): (usize, usize),
    seed: u64,
    progress: &mut dyn FnMut(usize),
) -> Result<Discriminative> {
    let mut result = Discriminative::default();
    let device = discriminator.unet().device().clone();
    for (index, start) in (0..examples.min(source.len())).step_by(BATCH).enumerate() {
        let end = (start + BATCH).min(examples).min(source.len());
        let items = (start..end).map(|i| source.example(i)).collect::<Result<Vec<_>>>()?;
        let own = encoder.latents(&items.iter().map(|item| &item.picture).collect::<Vec<_>>())?;
        let noise = Random::new(seed, index as u64).normals(own.elem_count());
        let noise = Tensor::from_vec(noise, own.shape(), &device)?;
        // A row: which item's noise, which latents, which text.
        let judge = |rows: &[(usize, &Tensor, &str)], encoder: &mut Encoder| -> Result<Rows> {
            let at: Vec<u32> = rows.iter().map(|(item, _, _)| *item as u32).collect();
            let noise = noise.index_select(&Tensor::new(at, &device)?, 0)?;
            let latents = Tensor::stack(&rows.iter().map(|(_, latents, _)| *latents).collect::<Vec<_>>(), 0)?;
            let texts = encoder.texts(&rows.iter().map(|(_, _, text)| *text).collect::<Vec<_>>())?;
            let timesteps = vec![t; rows.len()];
            let noisy = discriminator.noised(&latents, &noise, &timesteps)?;
            Ok(Rows { noisy, timesteps, hidden: texts.hidden, pooled: texts.pooled })
        };
        let latents = (0..items.len()).map(|i| Ok(own.get(i)?)).collect::<Result<Vec<_>>>()?;
        let rows: Vec<_> = items.iter().enumerate().map(|(i, item)| (i, &latents[i], item.caption.as_str())).collect();
        let right = discriminator.scores(&judge(&rows, encoder)?)?;
        let rows: Vec<_> = items
            .iter()
            .enumerate()
            .flat_map(|(i, item)| item.hard_captions.iter().map(move |text| (i, text.as_str())))
            .map(|(i, text)| (i, &latents[i], text))
            .collect();
        for chunk in rows.chunks(BATCH) {
            let scores = discriminator.scores(&judge(chunk, encoder)?)?;
            for ((i, _, _), score) in chunk.iter().zip(scores) {
                result.image_to_text.add(right[*i] > score);
                result.add_to_category(&items[*i], right[*i] > score);
            }
        }
        for (i, item) in items.iter().enumerate().filter(|(_, item)| !item.hard_pictures.is_empty()) {
            let others = encoder.latents(&item.hard_pictures.iter().collect::<Vec<_>>())?;
            let others = (0..item.hard_pictures.len()).map(|n| Ok(others.get(n)?)).collect::<Result<Vec<_>>>()?;
            let rows: Vec<_> = others.iter().map(|latents| (i, latents, item.caption.as_str())).collect();
            let scores = discriminator.scores(&judge(&rows, encoder)?)?;
            for score in scores {
                result.text_to_image.add(right[i] > score);
                result.add_to_category(item, right[i] > score);
            }
        }
        let phrases: Vec<_> =
            items.iter().enumerate().flat_map(|(i, item)| item.expressions.iter().map(move |e| (i, e))).collect();
        for chunk in phrases.chunks(BATCH) {
            let rows: Vec<_> = chunk.iter().map(|(i, e)| (*i, &latents[*i], e.text.as_str())).collect();
            let found = discriminator.find(&judge(&rows, encoder)?)?;
            for ((_, expression), found) in chunk.iter().zip(found) {
                result.boxes.add(box_iou(found.bounding_box, expression.bounding_box) >= 0.5);
            }
        }
        progress(end);
    }
    result.overall = result.image_to_text.and(result.text_to_image);
    Ok(result)
}
