use candle_core::Tensor;

use super::attention::{Attention, AttentionTape, Inputs};
use super::config::UNetConfig;
use super::lora_gradients::LoraGradients;
use super::text::{TextKeys, TextSlot};
use crate::layers::{GroupNorm, LayerNorm, Linear, geglu, geglu_vjp, to_image, to_image_onto, to_tokens};
use crate::{Result, Scope};

/// Group norm, projection to tokens, transformer blocks, projection back, residual: diffusers' `Transformer2DModel`.
pub(super) struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<TransformerBlock>,
    proj_out: Linear,
}

/// What the backward pass of one [`Transformer`] needs.
pub(super) struct TransformerTape {
    x: Tensor,
    blocks: Vec<BlockTape>,
}

impl Transformer {
    /// The group norm of a transformer has its own epsilon, whatever the configuration's `norm_eps`.
    const EPS: f64 = 1e-6;

    pub(super) fn load(scope: &Scope, config: &UNetConfig, level: usize, slot: &mut TextSlot) -> Result<Self> {
        let channels = config.block_out_channels[level];
        let projection = |name: &str| match config.use_linear_projection {
            true => Linear::load(&scope.enter(name), channels, channels),
            false => Linear::load_conv1x1(&scope.enter(name), channels, channels),
        };
        let blocks = (0..config.transformer_layers)
            .map(|i| TransformerBlock::load(&scope.enter(format_args!("transformer_blocks.{i}")), config, level, slot));
        Ok(Self {
            norm: GroupNorm::load(&scope.enter("norm"), channels, config.norm_num_groups, Self::EPS)?,
            proj_in: projection("proj_in")?,
            blocks: blocks.collect::<Result<_>>()?,
            proj_out: projection("proj_out")?,
        })
    }

    pub(super) fn record(&self, x: &Tensor, text: &TextKeys) -> Result<(Tensor, TransformerTape)> {
        let mut tokens = self.proj_in.forward(&to_tokens(&self.norm.forward(x)?)?)?;
        let mut tapes = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let (y, tape) = block.record(&tokens, text)?;
            tokens = y;
            tapes.push(tape);
        }
        let y = to_image_onto(x, &self.proj_out.forward(&tokens)?)?;
        Ok((y, TransformerTape { x: x.clone(), blocks: tapes }))
    }

    /// `None` where the backward pass ends.
    pub(super) fn vjp(&self, tape: TransformerTape, dy: &Tensor, lora: &mut LoraGradients) -> Result<Option<Tensor>> {
        let mut d = self.proj_out.vjp(&to_tokens(dy)?)?;
        for (block, tape) in self.blocks.iter().zip(tape.blocks).rev() {
            let Some(dx) = block.vjp(tape, &d, lora)? else { return Ok(None) };
            d = dx;
        }
        let d = to_image(&self.proj_in.vjp(&d)?, &tape.x)?;
        self.norm.vjp_onto(dy, &tape.x, &d).map(Some)
    }

    pub(super) fn attentions(&self) -> impl Iterator<Item = &Attention> {
        self.blocks.iter().flat_map(|block| [&block.attn1, &block.attn2])
    }

    pub(super) fn attentions_mut(&mut self) -> impl Iterator<Item = &mut Attention> {
        self.blocks.iter_mut().flat_map(|block| [&mut block.attn1, &mut block.attn2])
    }
}

/// Self-attention, cross-attention and a GEGLU feed-forward, each after a layer norm and with a residual.
struct TransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff_in: Linear,
    ff_out: Linear,
    slot: TextSlot,
}

struct BlockTape {
    x1: Tensor,
    attn1: AttentionTape,
    x2: Tensor,
    attn2: AttentionTape,
    x3: Tensor,
    hidden: Tensor,
    /// What the text's keys and values were made from.
    context: Tensor,
}

impl TransformerBlock {
    fn load(scope: &Scope, config: &UNetConfig, level: usize, slot: &mut TextSlot) -> Result<Self> {
        let channels = config.block_out_channels[level];
        let (heads, upcast, eps) = (config.heads[level], config.upcast_attention, 1e-5);
        let attention = |name, context| Attention::load(&scope.enter(name), channels, context, heads, upcast);
        let norm = |name| LayerNorm::load(&scope.enter(name), channels, eps);
        Ok(Self {
            norm1: norm("norm1")?,
            attn1: attention("attn1", channels)?,
            norm2: norm("norm2")?,
            attn2: attention("attn2", config.cross_attention_dim)?,
            norm3: norm("norm3")?,
            ff_in: Linear::load(&scope.enter("ff.net.0.proj"), channels, 8 * channels)?,
            ff_out: Linear::load(&scope.enter("ff.net.2"), 4 * channels, channels)?,
            slot: slot.take(),
        })
    }

    fn record(&self, x: &Tensor, text: &TextKeys) -> Result<(Tensor, BlockTape)> {
        let x1 = x.clone();
        let normal = self.norm1.forward(&x1)?;
        let (x2, attn1) = self.attn1.record(&x1, &normal, self.attn1.keys_values(&normal)?)?;
        let (x3, attn2) = self.attn2.record(&x2, &self.norm2.forward(&x2)?, text.at(self.slot))?;
        let hidden = self.ff_in.forward(&self.norm3.forward(&x3)?)?;
        let y = self.ff_out.forward_onto(&x3, &geglu(&hidden)?)?;
        Ok((y, BlockTape { x1, attn1, x2, attn2, x3, hidden, context: text.context().clone() }))
    }

    fn vjp(&self, tape: BlockTape, dy: &Tensor, lora: &mut LoraGradients) -> Result<Option<Tensor>> {
        let d = self.ff_in.vjp(&geglu_vjp(&tape.hidden, &self.ff_out.vjp(dy)?)?)?;
        let d3 = self.norm3.vjp_onto(dy, &tape.x3, &d)?;
        let cross = || Ok(Inputs { x: self.norm2.forward(&tape.x2)?, context: tape.context.clone() });
        let Some(d) = self.attn2.vjp_queries(&tape.attn2, &d3, cross, lora)? else { return Ok(None) };
        let d2 = self.norm2.vjp_onto(&d3, &tape.x2, &d)?;
        let own = || {
            let x = self.norm1.forward(&tape.x1)?;
            Ok(Inputs { context: x.clone(), x })
        };
        let Some(d) = self.attn1.vjp_self(&tape.attn1, &d2, own, lora)? else { return Ok(None) };
        self.norm1.vjp_onto(&d2, &tape.x1, &d).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::finite_difference::{assert_vjp, values};
    use crate::unet::tests::{text, tiny};

    #[test]
    fn block_gradient() {
        let unet = tiny("sd1");
        let (text, x) = (text(&unet, 2), values(0, (2, 6, 16)));
        let block = &unet.down[0].layers[0].attention.as_ref().unwrap().blocks[0];
        let vjp = |dy: &Tensor| {
            let dx = block.vjp(block.record(&x, &text)?.1, dy, &mut LoraGradients::default())?;
            Ok(dx.expect("the pass goes on"))
        };
        assert_vjp("transformer block", &x, |x| Ok(block.record(x, &text)?.0), vjp);
    }

    /// SD 1 projects with 1x1 convolutions, SD 2 with linear layers; heads differ too.
    #[test]
    fn gradient_of_both_families() {
        for family in ["sd1", "sd2"] {
            let unet = tiny(family);
            let (text, x) = (text(&unet, 2), values(0, (2, 32, 3, 2)));
            let transformer = unet.mid.as_ref().unwrap().layers[0].attention.as_ref().unwrap();
            let vjp = |dy: &Tensor| {
                let dx = transformer.vjp(transformer.record(&x, &text)?.1, dy, &mut LoraGradients::default())?;
                Ok(dx.expect("the pass goes on"))
            };
            assert_vjp(&format!("{family} transformer"), &x, |x| Ok(transformer.record(x, &text)?.0), vjp);
        }
    }
}
