use std::collections::HashMap;

use candle_core::{Device, Tensor};

use super::AdapterSizes;
use crate::Result;

/// How a tensor begins.
#[derive(Clone, Copy)]
enum Start {
    Zeros,
    Ones,
    /// Standard normal, as PyTorch's `Embedding`.
    Normal,
    /// Uniform in +-sqrt(6 / (in + out)): Xavier, as DETR's matrices.
    Xavier,
    /// ln(1 / 0.07), CLIP's first temperature.
    LogScale,
}

impl AdapterSizes {
    /// Name, shape and start of every tensor of an adapter in the released names, with the paper's semantic head.
    fn tensors(&self) -> Vec<(String, Vec<usize>, Start)> {
        let (d, p) = (self.d_model, self.clip_dim);
        let mut all = Vec::new();
        let mut add = |name: String, shape: &[usize], start: Start| all.push((name, shape.to_vec(), start));
        let linear = |name: &str, inputs: usize, outputs: usize| {
            [
                (format!("{name}.weight"), vec![outputs, inputs], Start::Xavier),
                (format!("{name}.bias"), vec![outputs], Start::Zeros),
            ]
        };
        let norm = |name: &str| {
            [(format!("{name}.weight"), vec![d], Start::Ones), (format!("{name}.bias"), vec![d], Start::Zeros)]
        };
        let attention = |name: &str| {
            let [weight, bias] = linear(&format!("{name}.out_proj"), d, d);
            let joint = [
                (format!("{name}.in_proj_weight"), vec![3 * d, d], Start::Xavier),
                (format!("{name}.in_proj_bias"), vec![3 * d], Start::Zeros),
            ];
            joint.into_iter().chain([weight, bias])
        };
        let feed_forward = |name: &str| {
            let first = linear(&format!("{name}.linear1"), d, self.feedforward);
            first.into_iter().chain(linear(&format!("{name}.linear2"), self.feedforward, d))
        };
        add("input_proj.weight".into(), &[d, self.channels, 1, 1], Start::Xavier);
        add("input_proj.bias".into(), &[d], Start::Zeros);
        add("query_embed.weight".into(), &[self.queries(), d], Start::Normal);
        add("logit_scale".into(), &[], Start::LogScale);
        let mut rest = Vec::new();
        rest.extend(linear("timestep_embedding.time_embedding.linear_1", d, 4 * d));
        rest.extend(linear("timestep_embedding.time_embedding.linear_2", 4 * d, d));
        for i in 0..self.encoder_layers {
            let layer = format!("transformer.encoder.layers.{i}");
            rest.extend(attention(&format!("{layer}.self_attn")));
            rest.extend(feed_forward(&layer));
            (1..=2).for_each(|n| rest.extend(norm(&format!("{layer}.norm{n}"))));
        }
        for i in 0..self.decoder_layers {
            let layer = format!("transformer.decoder.layers.{i}");
            rest.extend(attention(&format!("{layer}.self_attn")));
            rest.extend(attention(&format!("{layer}.multihead_attn")));
            rest.extend(feed_forward(&layer));
            (1..=3).for_each(|n| rest.extend(norm(&format!("{layer}.norm{n}"))));
        }
        rest.extend(norm("transformer.decoder.norm"));
        rest.extend(linear("map_to_clip.0", d, d));
        rest.extend(linear("map_to_clip.2", d, p));
        rest.extend(linear("class_embed", d, self.classes));
        rest.extend(linear("bbox_embed.layers.0", d, d));
        rest.extend(linear("bbox_embed.layers.1", d, d));
        rest.extend(linear("bbox_embed.layers.2", d, 4));
        rest.extend(linear("semantic_embed", d, p));
        all.extend(rest);
        all
    }

    /// The tensors of an untrained adapter, in f32, by random numbers of two kinds.
    pub fn initial(&self, random: &mut dyn FnMut(Draw) -> f32, device: &Device) -> Result<HashMap<String, Tensor>> {
        let tensor = |(name, shape, start): (String, Vec<usize>, Start)| -> Result<(String, Tensor)> {
            let count: usize = shape.iter().product();
            let values = match start {
                Start::Zeros => vec![0.; count],
                Start::Ones => vec![1.; count],
                Start::LogScale => vec![(1f32 / 0.07).ln()],
                Start::Normal => (0..count).map(|_| random(Draw::Normal)).collect(),
                Start::Xavier => {
                    let bound = (6. / (shape[0] + shape[1]) as f32).sqrt();
                    (0..count).map(|_| (2. * random(Draw::Uniform) - 1.) * bound).collect()
                }
            };
            Ok((name, Tensor::from_vec(values, shape, device)?))
        };
        self.tensors().into_iter().map(tensor).collect()
    }
}

/// A kind of random number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Draw {
    /// In [0, 1).
    Uniform,
    /// Standard normal.
    Normal,
}
