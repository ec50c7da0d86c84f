use candle_core::Tensor;

use super::lora_gradients::LoraGradients;
use crate::layers::{Linear, attend, attend_vjp, merge_heads, split_heads};
use crate::{Result, Scope};

/// Keys and values in heads, `[B * heads, tokens, width]`.
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
    pub(super) heads: usize,
    upcast: bool,
}

/// What the projections were given: made again in the backward pass, and only where LoRA's gradients are wanted.
pub(super) struct Inputs {
    /// `[B, tokens, channels]`, of the queries.
    pub(super) x: Tensor,
    /// Of keys and values; `x` again in self-attention.
    pub(super) context: Tensor,
}

/// Cotangents of the projections' outputs, `[B, tokens, channels]`.
struct Projected {
    queries: Tensor,
    keys_values: Option<(Tensor, Tensor)>,
}

/// What the backward pass of one [`Attention`] needs, in heads.
pub(super) struct AttentionTape {
    queries: Tensor,
    keys_values: KeysValues,
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
        let keys = split_heads(&self.to_k.forward(context)?, self.heads)?;
        Ok(KeysValues { keys, values: split_heads(&self.to_v.forward(context)?, self.heads)? })
    }

    pub(super) fn record(&self, x: &Tensor, keys_values: KeysValues) -> Result<(Tensor, AttentionTape)> {
        let queries = split_heads(&self.to_q.forward(x)?, self.heads)?;
        let y = attend(&queries, &keys_values.keys, &keys_values.values, self.upcast)?;
        let y = self.to_out.forward(&merge_heads(&y, self.heads)?)?;
        Ok((y, AttentionTape { queries, keys_values }))
    }

    /// The gradient for `x` where keys and values are fixed (cross-attention).
    pub(super) fn vjp_queries(
        &self,
        tape: &AttentionTape,
        dy: &Tensor,
        inputs: impl FnOnce() -> Result<Inputs>,
        lora: &mut LoraGradients,
    ) -> Result<Tensor> {
        let wanted = lora.wants(&self.path);
        let gradients = self.vjp_projected(tape, dy, wanted)?;
        if wanted {
            self.add_lora_gradients(tape, dy, &gradients, &inputs()?, lora)?;
        }
        self.to_q.vjp(&gradients.queries)
    }

    /// The gradient for `x` where keys and values came from `x` too (self-attention).
    pub(super) fn vjp_self(
        &self,
        tape: &AttentionTape,
        dy: &Tensor,
        inputs: impl FnOnce() -> Result<Inputs>,
        lora: &mut LoraGradients,
    ) -> Result<Tensor> {
        let gradients = self.vjp_projected(tape, dy, true)?;
        if lora.wants(&self.path) {
            self.add_lora_gradients(tape, dy, &gradients, &inputs()?, lora)?;
        }
        let (dk, dv) = gradients.keys_values.expect("asked for");
        Ok(((self.to_q.vjp(&gradients.queries)? + self.to_k.vjp(&dk)?)? + self.to_v.vjp(&dv)?)?)
    }

    fn vjp_projected(&self, tape: &AttentionTape, dy: &Tensor, keys: bool) -> Result<Projected> {
        let dy = split_heads(&self.to_out.vjp(dy)?, self.heads)?;
        let KeysValues { keys: k, values: v } = &tape.keys_values;
        let (dq, dkv) = attend_vjp((&tape.queries, k, v), &dy, self.upcast, keys)?;
        let merged = |t: Tensor| merge_heads(&t, self.heads);
        let keys_values = dkv.map(|(dk, dv)| Ok::<_, crate::Error>((merged(dk)?, merged(dv)?))).transpose()?;
        Ok(Projected { queries: merged(dq)?, keys_values })
    }

    fn add_lora_gradients(
        &self,
        tape: &AttentionTape,
        dy: &Tensor,
        gradients: &Projected,
        inputs: &Inputs,
        lora: &mut LoraGradients,
    ) -> Result<()> {
        let (dk, dv) = gradients.keys_values.as_ref().expect("asked for where LoRA is");
        let KeysValues { keys, values } = &tape.keys_values;
        let attended = merge_heads(&attend(&tape.queries, keys, values, self.upcast)?, self.heads)?;
        let module = |name: &str| format!("{}.{name}", self.path);
        lora.add(&module("to_q"), &inputs.x, &gradients.queries)?;
        lora.add(&module("to_k"), &inputs.context, dk)?;
        lora.add(&module("to_v"), &inputs.context, dv)?;
        lora.add(&module("to_out.0"), &attended, dy)
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
        let record = |x: &Tensor| attention.record(x, attention.keys_values(x)?);
        let vjp =
            |dy: &Tensor| attention.vjp_self(&record(&x)?.1, dy, || unreachable!(), &mut LoraGradients::default());
        assert_vjp("self-attention", &x, |x| Ok(record(x)?.0), vjp);
    }

    #[test]
    fn cross_attention_gradient_passes_queries_alone() {
        let (attention, x) = (attention(5), values(0, (2, 6, 8)));
        let text = attention.keys_values(&values(9, (2, 3, 5))).unwrap();
        let record = |x: &Tensor| attention.record(x, text.clone());
        let vjp =
            |dy: &Tensor| attention.vjp_queries(&record(&x)?.1, dy, || unreachable!(), &mut LoraGradients::default());
        assert_vjp("cross-attention", &x, |x| Ok(record(x)?.0), vjp);
    }
}
