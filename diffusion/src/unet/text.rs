//! Keys and values of the text, computed once per run: they depend on the prompt and the weights, not on the latents.

use super::UNet;
use super::attention::KeysValues;
use candle_core::Tensor;

use crate::{Error, Result};

/// The place of one cross-attention among all, in the order of computation.
#[derive(Clone, Copy, Default)]
pub(super) struct TextSlot(usize);

impl TextSlot {
    /// The next free place.
    pub(super) fn take(&mut self) -> Self {
        let slot = *self;
        self.0 += 1;
        slot
    }
}

/// A batch of texts as every cross-attention of one U-Net sees them. Computed by [`UNet::text`]; valid until the U-Net's
/// weights change.
#[derive(Clone)]
pub struct TextKeys {
    slots: Vec<KeysValues>,
    /// What they were made from, `[B, tokens, cross_attention_dim]`.
    context: Tensor,
    pub(super) revision: u64,
}

impl TextKeys {
    /// Number of texts.
    pub fn batch(&self) -> usize {
        self.context.dims()[0]
    }

    /// The texts `start .. start + len` alone.
    pub fn rows(&self, start: usize, len: usize) -> Result<Self> {
        let rows = |t: &Tensor| -> Result<Tensor> { Ok(t.narrow(0, start, len)?) };
        let narrow = |kv: &KeysValues| Ok(KeysValues { keys: rows(&kv.keys)?, values: rows(&kv.values)? });
        let slots = self.slots.iter().map(narrow).collect::<Result<_>>()?;
        Ok(Self { slots, context: rows(&self.context)?, revision: self.revision })
    }

    /// Whether they were computed with the weights that `unet` has now.
    pub fn is_of(&self, unet: &UNet) -> bool {
        self.revision == unet.revision
    }

    pub(super) fn context(&self) -> &Tensor {
        &self.context
    }

    pub(super) fn at(&self, slot: TextSlot) -> KeysValues {
        self.slots[slot.0].clone()
    }
}

impl UNet {
    /// Prepares text embeddings `[B, tokens, cross_attention_dim]` for [`UNet::forward`] and [`UNet::forward_to`].
    pub fn text(&self, context: &Tensor) -> Result<TextKeys> {
        let width = self.config.cross_attention_dim;
        match context.dims() {
            [batch, tokens, found] if *found == width && *batch > 0 && *tokens > 0 => {}
            found => {
                let message = format!("text embeddings have shape {found:?}, expected [batch, tokens, {width}]");
                return Err(Error::Input(message));
            }
        }
        let context = context.to_dtype(self.dtype)?.to_device(&self.device)?;
        let cross = self.attentions().skip(1).step_by(2); // attn1, attn2, attn1, ...
        let slots = cross.map(|attn2| attn2.keys_values(&context)).collect::<Result<_>>()?;
        Ok(TextKeys { slots, context, revision: self.revision })
    }
}
