//! Down, mid and up blocks: ResNet blocks, each followed by a transformer where the level has attention.

use candle_core::Tensor;

use super::config::UNetConfig;
use super::lora_gradients::LoraGradients;
use super::text::{TextKeys, TextSlot};
use super::transformer::{Transformer, TransformerTape};
use crate::layers::{
    Conv2d, ResnetBlock, ResnetSizes, ResnetTape, add_images, cat_channels, narrow_channels, upsample_nearest,
    upsample_nearest_vjp,
};
use crate::{Result, Scope};

/// What every block of one evaluation is conditioned on.
#[derive(Clone, Copy)]
pub(super) struct Condition<'a> {
    /// SiLU of the timestep embedding, `[B, width]`.
    pub(super) time: &'a Tensor,
    pub(super) text: &'a TextKeys,
    /// Whether a gradient will be asked for; without, each layer's tape is dropped at once.
    pub(super) recording: bool,
}

/// A ResNet block and the transformer after it.
pub(super) struct Layer {
    resnet: ResnetBlock,
    pub(super) attention: Option<Transformer>,
}

pub(super) struct LayerTape {
    resnet: ResnetTape,
    attention: Option<TransformerTape>,
}

impl Layer {
    fn record(&self, x: &Tensor, condition: Condition) -> Result<(Tensor, LayerTape)> {
        let (mut x, resnet) = self.resnet.record(x, Some(condition.time))?;
        let mut tape = LayerTape { resnet, attention: None };
        if let Some(attention) = &self.attention {
            let (y, kept) = attention.record(&x, condition.text)?;
            (x, tape.attention) = (y, Some(kept));
        }
        Ok((x, tape))
    }

    /// `None` where the backward pass ends.
    fn vjp(&self, tape: LayerTape, dy: &Tensor, lora: &mut LoraGradients) -> Result<Option<Tensor>> {
        let (Some(attention), Some(kept)) = (&self.attention, tape.attention) else {
            return self.resnet.vjp(tape.resnet, dy).map(Some);
        };
        attention.vjp(kept, dy, lora)?.map(|d| self.resnet.vjp(tape.resnet, &d)).transpose()
    }
}

fn resnet_sizes(config: &UNetConfig, inputs: usize, outputs: usize) -> ResnetSizes {
    let (groups, eps) = (config.norm_num_groups, config.norm_eps);
    ResnetSizes { inputs, outputs, groups, eps, time: Some(config.time_width()) }
}

/// One level on the way down; each layer's output, and the downsampler's, is kept for the skip connections.
pub(super) struct DownBlock {
    pub(super) layers: Vec<Layer>,
    downsampler: Option<Conv2d>,
}

pub(super) struct DownTape {
    layers: Vec<LayerTape>,
    /// Size before the downsampler.
    size: (usize, usize),
}

impl DownBlock {
    pub(super) fn load(scope: &Scope, config: &UNetConfig, level: usize, slot: &mut TextSlot) -> Result<Self> {
        let outputs = config.block_out_channels[level];
        let mut inputs = config.block_out_channels[level.saturating_sub(1)];
        let mut layers = Vec::new();
        for i in 0..config.layers_per_block {
            let sizes = resnet_sizes(config, inputs, outputs);
            let resnet = ResnetBlock::load(&scope.enter(format_args!("resnets.{i}")), sizes)?;
            let attention = config.down_attention[level]
                .then(|| Transformer::load(&scope.enter(format_args!("attentions.{i}")), config, level, slot));
            layers.push(Layer { resnet, attention: attention.transpose()? });
            inputs = outputs;
        }
        let last = level + 1 == config.levels();
        let downsampler =
            (!last).then(|| Conv2d::load(&scope.enter("downsamplers.0.conv"), outputs, outputs, 2)).transpose()?;
        Ok(Self { layers, downsampler })
    }

    pub(super) fn record(
        &self,
        x: &Tensor,
        condition: Condition,
        skips: &mut Vec<Tensor>,
    ) -> Result<(Tensor, DownTape)> {
        let mut x = x.clone();
        let mut layers = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let (y, tape) = layer.record(&x, condition)?;
            x = y;
            skips.push(x.clone());
            layers.extend(condition.recording.then_some(tape));
        }
        let size = (x.dim(2)?, x.dim(3)?);
        if let Some(downsampler) = &self.downsampler {
            x = downsampler.forward(&x)?;
            skips.push(x.clone());
        }
        Ok((x, DownTape { layers, size }))
    }

    /// `skips` holds the gradients of the skip connections that were used, the coarsest on top. `None` where the backward pass
    /// ends.
    pub(super) fn vjp(
        &self,
        tape: DownTape,
        mut d: Tensor,
        skips: &mut Vec<Tensor>,
        lora: &mut LoraGradients,
    ) -> Result<Option<Tensor>> {
        if let Some(downsampler) = &self.downsampler {
            d = downsampler.vjp(&add_skip(d, skips)?, tape.size)?;
        }
        for (layer, tape) in self.layers.iter().zip(tape.layers).rev() {
            let Some(dx) = layer.vjp(tape, &add_skip(d, skips)?, lora)? else { return Ok(None) };
            d = dx;
        }
        Ok(Some(d))
    }
}

/// The gradient of a down-path activation: from the next layer and, when it was used, from its skip connection.
pub(super) fn add_skip(d: Tensor, skips: &mut Vec<Tensor>) -> Result<Tensor> {
    Ok(match skips.pop() {
        Some(skip) => add_images(&d, &skip)?,
        None => d,
    })
}

/// ResNet block, then transformer and ResNet block.
pub(super) struct MidBlock {
    pub(super) layers: [Layer; 2],
}

pub(super) struct MidTape([LayerTape; 2]);

impl MidBlock {
    pub(super) fn load(scope: &Scope, config: &UNetConfig, slot: &mut TextSlot) -> Result<Self> {
        let level = config.levels() - 1;
        let channels = config.block_out_channels[level];
        let resnet = |i| {
            let sizes = resnet_sizes(config, channels, channels);
            ResnetBlock::load(&scope.enter(format_args!("resnets.{i}")), sizes)
        };
        let attention = Some(Transformer::load(&scope.enter("attentions.0"), config, level, slot)?);
        Ok(Self { layers: [Layer { resnet: resnet(0)?, attention }, Layer { resnet: resnet(1)?, attention: None }] })
    }

    pub(super) fn record(&self, x: &Tensor, condition: Condition) -> Result<(Tensor, MidTape)> {
        let (x, first) = self.layers[0].record(x, condition)?;
        let (x, second) = self.layers[1].record(&x, condition)?;
        Ok((x, MidTape([first, second])))
    }

    /// `None` where the backward pass ends.
    pub(super) fn vjp(&self, tape: MidTape, d: &Tensor, lora: &mut LoraGradients) -> Result<Option<Tensor>> {
        let MidTape([first, second]) = tape;
        match self.layers[1].vjp(second, d, lora)? {
            Some(d) => self.layers[0].vjp(first, &d, lora),
            None => Ok(None),
        }
    }
}

/// One level on the way up; each layer also takes the next skip connection.
pub(super) struct UpBlock {
    pub(super) layers: Vec<Layer>,
    upsampler: Option<Conv2d>,
}

pub(super) struct UpTape {
    layers: Vec<LayerTape>,
    /// Channels of each layer's input that come from the block, before those of the skip connection.
    channels: Vec<usize>,
    /// Size after the upsampler.
    size: (usize, usize),
}

impl UpBlock {
    /// `index` counts from the coarsest level.
    pub(super) fn load(scope: &Scope, config: &UNetConfig, index: usize, slot: &mut TextSlot) -> Result<Self> {
        let level = config.levels() - 1 - index;
        let widths = &config.block_out_channels;
        let outputs = widths[level];
        // The block comes in at the width of the level below; the last skip is that of the level above.
        let mut inputs = widths[(level + 1).min(config.levels() - 1)];
        let mut layers = Vec::new();
        for i in 0..=config.layers_per_block {
            let skip = if i == config.layers_per_block { widths[level.saturating_sub(1)] } else { outputs };
            let sizes = resnet_sizes(config, inputs + skip, outputs);
            let resnet = ResnetBlock::load(&scope.enter(format_args!("resnets.{i}")), sizes)?;
            let attention = config.up_attention[index]
                .then(|| Transformer::load(&scope.enter(format_args!("attentions.{i}")), config, level, slot));
            layers.push(Layer { resnet, attention: attention.transpose()? });
            inputs = outputs;
        }
        let upsampler =
            (level > 0).then(|| Conv2d::load(&scope.enter("upsamplers.0.conv"), outputs, outputs, 1)).transpose()?;
        Ok(Self { layers, upsampler })
    }

    pub(super) fn record(&self, x: &Tensor, condition: Condition, skips: &mut Vec<Tensor>) -> Result<(Tensor, UpTape)> {
        let mut x = x.clone();
        let (mut layers, mut channels) = (Vec::new(), Vec::new());
        for layer in &self.layers {
            let skip = skips.pop().expect("as many skips as layers take");
            channels.push(x.dim(1)?);
            let (y, tape) = layer.record(&cat_channels(&x, &skip)?, condition)?;
            x = y;
            layers.extend(condition.recording.then_some(tape));
        }
        let mut size = (x.dim(2)?, x.dim(3)?);
        if let Some(upsampler) = &self.upsampler {
            let next = skips.last().expect("a finer level has skips");
            size = (next.dim(2)?, next.dim(3)?);
            x = upsampler.forward(&upsample_nearest(&x, size)?)?;
        }
        Ok((x, UpTape { layers, channels, size }))
    }

    /// Pushes the gradients of the skip connections, the finest first. `None` where the backward pass ends.
    pub(super) fn vjp(
        &self,
        tape: UpTape,
        mut d: Tensor,
        skips: &mut Vec<Tensor>,
        lora: &mut LoraGradients,
    ) -> Result<Option<Tensor>> {
        if let Some(upsampler) = &self.upsampler {
            d = upsample_nearest_vjp(&upsampler.vjp(&d, tape.size)?)?;
        }
        for ((layer, kept), channels) in self.layers.iter().zip(tape.layers).zip(tape.channels).rev() {
            let Some(both) = layer.vjp(kept, &d, lora)? else { return Ok(None) };
            skips.push(narrow_channels(&both, channels, both.dim(1)? - channels)?);
            d = narrow_channels(&both, 0, channels)?;
        }
        Ok(Some(d))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::finite_difference::{assert_vjp, values};
    use crate::unet::tests::{text, tiny};

    /// All tensors in one row, and back into the shapes of `like`.
    fn join(tensors: &[Tensor]) -> Result<Tensor> {
        let flat: Vec<_> = tensors.iter().map(|t| t.flatten_all()).collect::<candle_core::Result<_>>()?;
        Ok(Tensor::cat(&flat, 0)?)
    }

    fn split(row: &Tensor, like: &[Tensor]) -> Result<Vec<Tensor>> {
        let mut start = 0;
        let part = |t: &Tensor| {
            let part = row.narrow(0, start, t.elem_count())?.reshape(t.shape())?;
            start += t.elem_count();
            Ok(part)
        };
        like.iter().map(part).collect()
    }

    /// With the downsampler and without, from the block's output alone and from its skip connections too.
    #[test]
    fn down_gradient() {
        let unet = tiny("sd1");
        let (text, time) = (text(&unet, 2), values(8, (2, unet.config.time_width())));
        let condition = Condition { time: &time, text: &text, recording: true };
        for (level, channels) in [(0, 16), (2, 16), (3, 32)] {
            let (block, x) = (&unet.down[level], values(0, (2, channels, 5, 6)));
            let alone = |x: &Tensor| block.record(x, condition, &mut Vec::new());
            let vjp = |dy: &Tensor| {
                let dx = block.vjp(alone(&x)?.1, dy.clone(), &mut Vec::new(), &mut LoraGradients::default())?;
                Ok(dx.expect("the pass goes on"))
            };
            assert_vjp(&format!("down{level}"), &x, |x| Ok(alone(x)?.0), vjp);

            let outputs = |x: &Tensor| -> Result<_> {
                let mut skips = Vec::new();
                let (y, tape) = block.record(x, condition, &mut skips)?;
                skips.push(y);
                Ok((skips, tape))
            };
            let vjp = |cotangent: &Tensor| {
                let (all, tape) = outputs(&x)?;
                let mut cotangents = split(cotangent, &all)?;
                let dy = cotangents.pop().expect("the output's");
                let dx = block.vjp(tape, dy, &mut cotangents, &mut LoraGradients::default())?;
                assert!(cotangents.is_empty(), "every skip connection's gradient is used");
                Ok(dx.expect("the pass goes on"))
            };
            assert_vjp(&format!("down{level} with skips"), &x, |x| join(&outputs(x)?.0), vjp);
        }
    }

    #[test]
    fn mid_gradient() {
        let unet = tiny("sd2");
        let (text, time) = (text(&unet, 2), values(8, (2, unet.config.time_width())));
        let condition = Condition { time: &time, text: &text, recording: true };
        let (block, x) = (unet.mid.as_ref().unwrap(), values(0, (2, 32, 3, 2)));
        let vjp = |dy: &Tensor| {
            let dx = block.vjp(block.record(&x, condition)?.1, dy, &mut LoraGradients::default())?;
            Ok(dx.expect("the pass goes on"))
        };
        assert_vjp("mid", &x, |x| Ok(block.record(x, condition)?.0), vjp);
    }

    /// The gradient for the input and for every skip connection, with an upsampler to an odd size and without one.
    #[test]
    fn up_gradient() {
        let unet = tiny("sd2");
        let (text, time) = (text(&unet, 2), values(8, (2, unet.config.time_width())));
        let condition = Condition { time: &time, text: &text, recording: true };
        for (index, channels, skips) in [(1, 32, [16, 32, 32]), (3, 16, [16, 16, 16])] {
            let block = &unet.up[index];
            // Only the size of the next finer skip connection matters to the block.
            let finer = values(1, (2, 16, 5, 4));
            let mut inputs = vec![values(0, (2, channels, 3, 2))];
            inputs.extend(skips.map(|c| values(c as u64, (2, c, 3, 2))));
            let record = |row: &Tensor| -> Result<(Tensor, UpTape)> {
                let mut parts = split(row, &inputs)?;
                let x = parts.remove(0);
                let mut skips = vec![finer.clone()];
                skips.append(&mut parts);
                let recorded = block.record(&x, condition, &mut skips)?;
                assert_eq!(skips.len(), 1, "one skip connection per layer");
                Ok(recorded)
            };
            let x = join(&inputs).unwrap();
            let vjp = |dy: &Tensor| {
                let mut skips = Vec::new();
                let dx = block.vjp(record(&x)?.1, dy.clone(), &mut skips, &mut LoraGradients::default())?;
                // Pushed finest first, which is the order in which they were given.
                skips.insert(0, dx.expect("the pass goes on"));
                join(&skips)
            };
            assert_vjp(&format!("up{index}"), &x, |row| Ok(record(row)?.0), vjp);
        }
    }
}
