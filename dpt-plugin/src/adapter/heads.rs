use candle_core::Tensor;
use diffusion::Scope;

use super::AdapterSizes;
use super::layers::Linear;
use crate::Result;

/// What the K grounding queries say.
pub struct Grounding {
    /// `[B, K, classes]`: one logit of the object's presence, or the release's 256 token classes, the last of which means
    /// no object.
    pub class_logits: Tensor,
    /// `[B, K, 4]` (cx, cy, w, h) in [0, 1].
    pub boxes: Tensor,
    /// `[B, K, p]` in CLIP's space, where the checkpoint has the paper's semantic head; the release has another.
    pub semantic: Option<Tensor>,
}

pub(super) struct Heads {
    matching: (Linear, Linear),
    class: Linear,
    boxes: [Linear; 3],
    semantic: Option<Linear>,
    /// ln(1 / tau), the temperature of the contrastive loss.
    pub(super) logit_scale: Tensor,
}

impl Heads {
    pub(super) fn load(scope: &Scope, sizes: &AdapterSizes) -> Result<Self> {
        let (d, p) = (sizes.d_model, sizes.clip_dim);
        let layer = |name: &str, inputs, outputs| Linear::load(&scope.enter(name), inputs, outputs);
        let semantic = scope.contains("semantic_embed.weight").then(|| layer("semantic_embed", d, p));
        Ok(Self {
            matching: (layer("map_to_clip.0", d, d)?, layer("map_to_clip.2", d, p)?),
            class: layer("class_embed", d, sizes.classes)?,
            boxes: [
                layer("bbox_embed.layers.0", d, d)?,
                layer("bbox_embed.layers.1", d, d)?,
                layer("bbox_embed.layers.2", d, 4)?,
            ],
            semantic: semantic.transpose()?,
            logit_scale: scope.tensor("logit_scale", &[])?,
        })
    }

    pub(super) fn matching(&self, queries: &Tensor) -> Result<Tensor> {
        self.matching.1.forward(&self.matching.0.forward(queries)?.relu()?)
    }

    pub(super) fn grounding(&self, queries: &Tensor) -> Result<Grounding> {
        let [first, second, third] = &self.boxes;
        let hidden = second.forward(&first.forward(queries)?.relu()?)?.relu()?;
        Ok(Grounding {
            class_logits: self.class.forward(queries)?,
            boxes: candle_nn::ops::sigmoid(&third.forward(&hidden)?)?,
            semantic: self.semantic.as_ref().map(|head| head.forward(queries)).transpose()?,
        })
    }
}
