use candle_core::Tensor;

use super::lora_gradients::LoraGradients;
use crate::layers::{self, Attended, Cotangents, Linear};
use crate::{Result, Scope};

/// Keys and values, `[B, tokens, channels]`.
#[derive(Clone)]
pub(super) struct KeysValues {
    pub(super) keys: Tensor,
    pub(super) values: Tensor,
}

/// Multi-head attention with the four projections that LoRA may change.
pub(super) struct Attention {
    /// Dotted path in the U-Net, such as `mid_block.attentions.0.transformer_blocks.0.attn1`.
    pub(super) path: String,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
    upcast: bool,
}

/// What the projections were given: made again in the backward pass, and only where LoRA's gradients are wanted.
pub(super) struct Inputs {
    /// `[B, tokens, channels]`, of the queries.
    pub(super) x: Tensor,
    /// Of keys and values; `x` again in self-attention.
    pub(super) context: Tensor,
}

/// What the backward pass of one [`Attention`] needs, `[B, tokens, channels]`.
pub(super) struct AttentionTape {
    queries: Tensor,
    keys_values: KeysValues,
    attention: layers::Attention,
}

impl Attention {
    /// `context` is the width of what keys and values are made from.
    pub(super) fn load(scope: &Scope, channels: usize, context: usize, heads: usize, upcast: bool) -> Result<Self> {
        Ok(Self {
            path: scope.path().to_owned(),
            to_q: Linear::load_no_bias(&scope.enter("to_q"), channels, channels)?,
            to_k: Linear::load_no_bias(&scope.enter("to_k"), context, channels)?,
            to_v: Linear::load_no_bias(&scope.enter("to_v"), context, channels)?,
            to_out: Linear::load(&scope.enter("to_out.0"), channels, channels)?,
            heads,
            upcast,
        })
    }

    /// Path and weight of each projection.
    pub(super) fn projections(&self) -> [(String, &Tensor); 4] {
        [("to_q", &self.to_q), ("to_k", &self.to_k), ("to_v", &self.to_v), ("to_out.0", &self.to_out)]
            .map(|(name, linear)| (format!("{}.{name}", self.path), &linear.weight))
    }

    pub(super) fn projection_mut(&mut self, name: &str) -> Option<&mut Tensor> {
        let linear = match name {
            "to_q" => &mut self.to_q,
            "to_k" => &mut self.to_k,
            "to_v" => &mut self.to_v,
            "to_out.0" => &mut self.to_out,
            _ => return None,
        };
        Some(&mut linear.weight)
    }

    /// `[B, tokens, context]` to keys and values.
    pub(super) fn keys_values(&self, context: &Tensor) -> Result<KeysValues> {
        Ok(KeysValues { keys: self.to_k.forward(context)?, values: self.to_v.forward(context)? })
    }

    /// What attention adds to `residual`, `[B, tokens, channels]` as `x`, together with that.
    pub(super) fn record(
        &self,
        residual: &Tensor,
        x: &Tensor,
        keys_values: KeysValues,
    ) -> Result<(Tensor, AttentionTape)> {
        let queries = self.to_q.forward(x)?;
        let attention = self.attended(&queries, &keys_values).attend()?;
        let y = self.to_out.forward_onto(residual, &attention.y)?;
        Ok((y, AttentionTape { queries, keys_values, attention }))
    }

    fn attended<'a>(&self, queries: &'a Tensor, KeysValues { keys, values }: &'a KeysValues) -> Attended<'a> {
        Attended { q: queries, k: keys, v: values, heads: self.heads, upcast: self.upcast }
    }

    /// The gradient for `x` where keys and values are fixed (cross-attention); `None` where the backward pass ends.
    pub(super) fn vjp_queries(
        &self,
        tape: &AttentionTape,
        dy: &Tensor,
        inputs: impl FnOnce() -> Result<Inputs>,
        lora: &mut LoraGradients,
    ) -> Result<Option<Tensor>> {
        let cotangents = self.vjp_attended(tape, dy, false, inputs, lora)?;
        if lora.ends_at(&self.path) {
            return Ok(None);
        }
        self.to_q.vjp(&cotangents.q).map(Some)
    }

    /// The gradient for `x` where keys and values came from `x` too (self-attention); `None` where the backward pass ends.
    pub(super) fn vjp_self(
        &self,
        tape: &AttentionTape,
        dy: &Tensor,
        inputs: impl FnOnce() -> Result<Inputs>,
        lora: &mut LoraGradients,
    ) -> Result<Option<Tensor>> {
        let cotangents = self.vjp_attended(tape, dy, true, inputs, lora)?;
        if lora.ends_at(&self.path) {
            return Ok(None);
        }
        let (dk, dv) = cotangents.kv.expect("asked for");
        let dx = self.to_k.vjp_onto(&self.to_q.vjp(&cotangents.q)?, &dk)?;
        self.to_v.vjp_onto(&dx, &dv).map(Some)
    }

    /// The cotangents of the projections' outputs, at least those that are asked for. Where the projections have LoRA, its
    /// gradients are found too.
    fn vjp_attended(
        &self,
        tape: &AttentionTape,
        dy: &Tensor,
        of_keys: bool,
        inputs: impl FnOnce() -> Result<Inputs>,
        lora: &mut LoraGradients,
    ) -> Result<Cotangents<Tensor>> {
        let with_lora = lora.wants(&self.path);
        let AttentionTape { queries, keys_values, attention } = tape;
        let attended = self.attended(queries, keys_values);
        let cotangents = attended.vjp(attention, &self.to_out.vjp(dy)?, of_keys || with_lora)?;
        if with_lora {
            let Cotangents { q, kv: Some((k, v)) } = &cotangents else {
                unreachable!("they are asked for");
            };
            let Inputs { x, context } = inputs()?;
            let module = |name: &str| format!("{}.{name}", self.path);
            lora.add(&module("to_q"), &x, q)?;
            lora.add(&module("to_k"), &context, k)?;
            lora.add(&module("to_v"), &context, v)?;
            lora.add(&module("to_out.0"), &attention.y, dy)?;
        }
        Ok(cotangents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::finite_difference::{assert_vjp, values, weights};

    fn attention(context: usize) -> Attention {
        let file = weights(&[
            ("to_q.weight", &[8, 8]),
            ("to_k.weight", &[8, context]),
            ("to_v.weight", &[8, context]),
            ("to_out.0.weight", &[8, 8]),
            ("to_out.0.bias", &[8]),
        ]);
        Attention::load(&file.root(), 8, context, 4, false).unwrap()
    }

    #[test]
    fn self_attention_gradient_passes_queries_keys_and_values() {
        let (attention, x) = (attention(8), values(0, (2, 6, 8)));
        let record = |x: &Tensor| attention.record(&x.zeros_like()?, x, attention.keys_values(x)?);
        let vjp = |dy: &Tensor| {
            let dx = attention.vjp_self(&record(&x)?.1, dy, || unreachable!(), &mut LoraGradients::default())?;
            Ok(dx.expect("the pass goes on"))
        };
        assert_vjp("self-attention", &x, |x| Ok(record(x)?.0), vjp);
    }

    #[test]
    fn cross_attention_gradient_passes_queries_alone() {
        let (attention, x) = (attention(5), values(0, (2, 6, 8)));
        let text = attention.keys_values(&values(9, (2, 3, 5))).unwrap();
        let record = |x: &Tensor| attention.record(&x.zeros_like()?, x, text.clone());
        let vjp = |dy: &Tensor| {
            let dx = attention.vjp_queries(&record(&x)?.1, dy, || unreachable!(), &mut LoraGradients::default())?;
            Ok(dx.expect("the pass goes on"))
        };
        assert_vjp("cross-attention", &x, |x| Ok(record(x)?.0), vjp);
    }
}
