use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use crate::data::{Encoder, Example, Source, TextBatch};
use crate::world::Random;
use crate::{Error, Result};

/// What one backward pass is made of; B items.
pub struct Batch {
    /// The items' latents, those of a hard and of a random negative picture each: `[B, C, h, w]`.
    pub latents: [Tensor; 3],
    /// The items' captions, a hard and a random negative each.
    pub captions: [TextBatch; 3],
    /// Noise that an item's pictures share, `[B, C, h, w]`.
    pub noise: Tensor,
    /// One timestep per item.
    pub timesteps: Vec<usize>,
    /// Items that have an expression, their texts, and the boxes `[n, 4]` (cx, cy, w, h); none when no item has.
    pub grounding: Option<(Vec<u32>, TextBatch, Tensor)>,
}

/// Draws batches. What a batch holds depends on the seed and its number alone, so that training can be resumed exactly.
pub struct Batcher<'a> {
    source: &'a dyn Source,
    seed: u64,
    /// Items of a batch.
    size: usize,
    /// Training timesteps.
    timesteps: usize,
}

impl<'a> Batcher<'a> {
    /// Of batches of `size` items. Fails when the source has no two captions to tell apart.
    pub fn new(source: &'a dyn Source, seed: u64, size: usize, timesteps: usize) -> Result<Self> {
        if size == 0 || source.len() < 2 {
            let found = source.len();
            return Err(Error::Request(format!(
                "batches of {size} from {found} example(s); expected 1 from 2 or more"
            )));
        }
        Ok(Self { source, seed, size, timesteps })
    }

    /// The indices of the examples of the `number`-th batch: every example once before any comes again.
    fn indices(&self, number: u64) -> Vec<usize> {
        let len = self.source.len() as u64;
        let mut orders = HashMap::new();
        let first = number * self.size as u64;
        let index = |at: u64| {
            let epoch = at / len;
            let order = orders.entry(epoch).or_insert_with(|| {
                let mut order: Vec<usize> = (0..len as usize).collect();
                Random::new(self.seed ^ 0x5eed_0bde, epoch).shuffle(&mut order);
                order
            });
            order[(at % len) as usize]
        };
        (first..first + self.size as u64).map(index).collect()
    }

    /// The `number`-th batch, on `device`.
    pub fn batch(&self, number: u64, encoder: &mut Encoder, device: &Device) -> Result<Batch> {
        let mut random = Random::new(self.seed, number);
        let indices = self.indices(number);
        let items = indices.iter().map(|i| self.source.example(*i)).collect::<Result<Vec<_>>>()?;
        let others = items.iter().map(|item| self.other(item, &mut random)).collect::<Result<Vec<_>>>()?;
        // Examples without hard negatives get another random one.
        let spare = items.iter().map(|item| self.other(item, &mut random)).collect::<Result<Vec<_>>>()?;
        let (mut hard_pictures, mut hard_captions) = (Vec::new(), Vec::new());
        for (item, spare) in items.iter().zip(&spare) {
            let pictures = &item.hard_pictures;
            hard_pictures.push(if pictures.is_empty() { &spare.picture } else { random.choose(pictures) });
            let captions = &item.hard_captions;
            hard_captions.push(if captions.is_empty() { spare.caption.as_str() } else { random.choose(captions) });
        }
        let pictures = |of: &'_ [Example]| of.iter().map(|e| &e.picture).cloned().collect::<Vec<_>>();
        let (own, other) = (pictures(&items), pictures(&others));
        let latents = [
            encoder.latents(&own.iter().collect::<Vec<_>>())?,
            encoder.latents(&hard_pictures)?,
            encoder.latents(&other.iter().collect::<Vec<_>>())?,
        ];
        let captions = [
            encoder.texts(&items.iter().map(|e| e.caption.as_str()).collect::<Vec<_>>())?,
            encoder.texts(&hard_captions)?,
            encoder.texts(&others.iter().map(|e| e.caption.as_str()).collect::<Vec<_>>())?,
        ];
        let (mut rows, mut phrases, mut boxes) = (Vec::new(), Vec::new(), Vec::new());
        for (row, item) in items.iter().enumerate().filter(|(_, item)| !item.expressions.is_empty()) {
            let expression = random.choose(&item.expressions);
            rows.push(row as u32);
            phrases.push(expression.text.as_str());
            boxes.extend(expression.bounding_box);
        }
        let grounding = match rows.is_empty() {
            true => None,
            false => {
                let boxes = Tensor::from_vec(boxes, (rows.len(), 4), device)?;
                Some((rows, encoder.texts(&phrases)?, boxes))
            }
        };
        let shape = latents[0].shape().clone();
        let noise = Tensor::from_vec(random.normals(shape.elem_count()), shape, device)?.to_dtype(DType::F32)?;
        let timesteps = (0..self.size).map(|_| random.below(self.timesteps)).collect();
        Ok(Batch { latents, captions, noise, timesteps, grounding })
    }

    /// Another example with another caption.
    fn other(&self, item: &Example, random: &mut Random) -> Result<Example> {
        const ATTEMPTS: usize = 1000;
        for _ in 0..ATTEMPTS {
            let other = self.source.example(random.below(self.source.len()))?;
            if other.caption != item.caption {
                return Ok(other);
            }
        }
        Err(Error::Request(format!(
            "nearly every example has the caption \"{}\": nothing to tell it from",
            item.caption
        )))
    }
}
