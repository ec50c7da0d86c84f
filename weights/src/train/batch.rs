use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use crate::data::{Encoder, Example, Source, TextBatch};
use crate::world::Random;
use crate::{Error, Result};

/// What one backward pass is made of; B items.
pub struct Batch {
    /// The items' latents, `[B, C, h, w]`.
    pub latents: Tensor,
    /// Their captions.
    pub captions: TextBatch,
    /// What they are held against, where that is asked for.
    pub negatives: Option<Negatives>,
    /// Noise that an item's pictures share, `[B, C, h, w]`.
    pub noise: Tensor,
    /// One timestep per item.
    pub timesteps: Vec<usize>,
    /// Items that have an expression, their texts, and the boxes `[n, 4]` (cx, cy, w, h); none when no item has.
    pub grounding: Option<(Vec<u32>, TextBatch, Tensor)>,
    /// Of what is dropped out.
    pub dropout_seed: u64,
}

/// For every item, what is nearly right, and something else at random.
pub struct Negatives {
    /// Latents of a hard and of a random picture.
    pub latents: [Tensor; 2],
    /// A hard and a random caption.
    pub captions: [TextBatch; 2],
}

/// Draws batches. What a batch holds depends on the seed and its number alone, so that training can be resumed exactly.
pub struct Batcher<'a> {
    source: &'a dyn Source,
    seed: u64,
    /// Items of a batch.
    size: usize,
    /// Training timesteps.
    timesteps: usize,
    /// Whether batches have negatives.
    negatives: bool,
}

impl<'a> Batcher<'a> {
    /// Of batches of `size` items, with `negatives` or without. Fails when there are no two examples to tell apart.
    pub fn new(source: &'a dyn Source, seed: u64, size: usize, timesteps: usize, negatives: bool) -> Result<Self> {
        if size == 0 || source.len() < 2 {
            let found = source.len();
            return Err(Error::Request(format!(
                "batches of {size} from {found} example(s); expected 1 from 2 or more"
            )));
        }
        Ok(Self { source, seed, size, timesteps, negatives })
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
        let latents = encoder.latents(&items.iter().map(|item| &item.picture).collect::<Vec<_>>())?;
        let captions = encoder.texts(&items.iter().map(|item| item.caption.as_str()).collect::<Vec<_>>())?;
        let negatives = self.negatives.then(|| self.negatives(&items, encoder, &mut random)).transpose()?;
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
        let shape = latents.shape().clone();
        let noise = Tensor::from_vec(random.normals(shape.elem_count()), shape, device)?.to_dtype(DType::F32)?;
        let timesteps = (0..self.size).map(|_| random.below(self.timesteps)).collect();
        Ok(Batch { latents, captions, negatives, noise, timesteps, grounding, dropout_seed: random.bits() })
    }

    fn negatives(&self, items: &[Example], encoder: &mut Encoder, random: &mut Random) -> Result<Negatives> {
        let others = items.iter().map(|item| self.other(item, random)).collect::<Result<Vec<_>>>()?;
        // Examples without hard negatives get another random one.
        let spare = items.iter().map(|item| self.other(item, random)).collect::<Result<Vec<_>>>()?;
        let (mut pictures, mut captions) = (Vec::new(), Vec::new());
        for (item, spare) in items.iter().zip(&spare) {
            let hard = &item.hard_pictures;
            pictures.push(if hard.is_empty() { &spare.picture } else { random.choose(hard) });
            let hard = &item.hard_captions;
            captions.push(if hard.is_empty() { spare.caption.as_str() } else { random.choose(hard) });
        }
        let other_pictures: Vec<_> = others.iter().map(|other| &other.picture).collect();
        let other_captions: Vec<_> = others.iter().map(|other| other.caption.as_str()).collect();
        Ok(Negatives {
            latents: [encoder.latents(&pictures)?, encoder.latents(&other_pictures)?],
            captions: [encoder.texts(&captions)?, encoder.texts(&other_captions)?],
        })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ShapesSource;

    /// Over batches that do not divide the examples, and epochs whose order differs.
    #[test]
    fn every_example_comes_once_before_any_comes_again() {
        let source = ShapesSource { seed: 0, split: None, len: 10 };
        let batcher = Batcher::new(&source, 3, 4, 1000, true).unwrap();
        let drawn: Vec<usize> = (0..10).flat_map(|number| batcher.indices(number)).collect();
        let mut orders: Vec<Vec<usize>> = drawn.chunks(10).map(<[usize]>::to_vec).collect();
        assert_ne!(orders[0], orders[1]);
        for order in &mut orders {
            order.sort();
            assert_eq!(*order, (0..10).collect::<Vec<_>>());
        }
        assert_eq!(batcher.indices(7), batcher.indices(7));
        assert!(Batcher::new(&ShapesSource { len: 1, ..source }, 3, 4, 1000, true).is_err());
    }
}
