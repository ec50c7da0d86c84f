//! Gradients of low-rank factors, for training them. With `y = x (W + s up down)^T`:
//! `d up = s dy^T (x down^T)` and `d down = s (dy up)^T x`, so the gradient of the whole weight is never formed.

use std::collections::{BTreeMap, HashMap};

use candle_core::Tensor;

use crate::layers::lora_vjp;
use crate::lora::LoraEntry;
use crate::{Error, Result};

/// The gradients of one [`LoraEntry`]'s factors, in their shapes.
#[derive(Debug, Clone)]
pub struct LoraGradient {
    /// `[rank, in]`.
    pub down: Tensor,
    /// `[out, rank]`.
    pub up: Tensor,
}

/// Which factors' gradients are wanted, and those found so far as the backward pass comes by their projections.
#[derive(Default)]
pub(super) struct LoraGradients<'a> {
    wanted: HashMap<&'a str, &'a LoraEntry>,
    found: BTreeMap<String, LoraGradient>,
    end: End,
}

/// Where the backward pass may end.
#[derive(Default)]
enum End {
    /// At the latents.
    #[default]
    Latents,
    /// At the attention at this path, before which no layer has a factor.
    Attention(String),
    /// Before it begins: no layer has a factor.
    Nowhere,
}

impl<'a> LoraGradients<'a> {
    /// Of these entries, and nothing else: the backward pass may end at the first attention, of those given in the order of the
    /// forward pass, that has one. Fails on two for one projection, whose gradients could not be told apart.
    pub(super) fn of(entries: &'a [LoraEntry], mut attentions: impl Iterator<Item = &'a str>) -> Result<Self> {
        let mut wanted = HashMap::new();
        for entry in entries {
            if wanted.insert(entry.module.as_str(), entry).is_some() {
                return Err(Error::Input(format!("LoRA: two entries for `{}`; stack them first", entry.module)));
            }
        }
        let mut gradients = Self { wanted, ..Self::default() };
        let first = attentions.find(|path| gradients.wants(path));
        gradients.end = first.map_or(End::Nowhere, |path| End::Attention(path.to_owned()));
        Ok(gradients)
    }

    /// Whether the backward pass may end at the attention at this path.
    pub(super) fn ends_at(&self, attention: &str) -> bool {
        matches!(&self.end, End::Attention(path) if path == attention)
    }

    /// Whether any projection of the attention at this path is among them.
    pub(super) fn wants(&self, attention: &str) -> bool {
        // The gradient of a self-attention without LoRA must not pay for the question.
        !self.wanted.is_empty()
            && self.wanted.keys().any(|m| m.strip_prefix(attention).is_some_and(|rest| rest.starts_with('.')))
    }

    /// Adds what a projection's input `[.., in]` and its output's cotangent `[.., out]` say, where it is wanted.
    pub(super) fn add(&mut self, module: &str, x: &Tensor, dy: &Tensor) -> Result<()> {
        let Some(entry) = self.wanted.get(module) else { return Ok(()) };
        let rows = |t: &Tensor| t.flatten_to(t.rank() - 2)?.contiguous();
        let (x, dy) = (rows(x)?, rows(dy)?);
        let like = |factor: &Tensor| factor.detach().to_device(x.device())?.to_dtype(x.dtype());
        let (down, up) = (like(&entry.down)?, like(&entry.up)?);
        let (down_gradient, up_gradient) = match lora_vjp(&x, &dy, &down.contiguous()?, &up.contiguous()?)? {
            Some(gradients) => gradients,
            None => (dy.matmul(&up)?.t()?.matmul(&x)?, dy.t()?.matmul(&x.matmul(&down.t()?)?)?),
        };
        let scaled = |t: Tensor, like: &Tensor| (t * entry.scale)?.to_dtype(like.dtype());
        let (down, up) = (scaled(down_gradient, &entry.down)?, scaled(up_gradient, &entry.up)?);
        let sum = match self.found.remove(module) {
            None => LoraGradient { down, up },
            Some(before) => LoraGradient { down: (before.down + down)?, up: (before.up + up)? },
        };
        self.found.insert(module.to_owned(), sum);
        Ok(())
    }

    /// Whether there is nothing to go back for.
    pub(super) fn are_all_found(&self) -> bool {
        matches!(self.end, End::Nowhere)
    }

    /// What was found, by module, divided by the factor that the cotangent was multiplied by.
    pub(super) fn finish(self, scale: f64) -> Result<BTreeMap<String, LoraGradient>> {
        if scale == 1. {
            return Ok(self.found);
        }
        let unscale = |(module, gradient): (String, LoraGradient)| {
            Ok((module, LoraGradient { down: (gradient.down / scale)?, up: (gradient.up / scale)? }))
        };
        self.found.into_iter().map(unscale).collect()
    }
}
