use candle_core::Tensor;
use diffusion::Scope;

use super::AdapterSizes;
use super::graph::{Graph, Value};
use super::layers::{Linear, relu, sigmoid};
use crate::Result;

/// What the K grounding queries say.
pub struct Grounding<T = Tensor> {
    /// `[B, K, classes]`: one logit of the object's presence, or the release's 256 token classes, the last of which means
    /// no object.
    pub class_logits: T,
    /// `[B, K, 4]` (cx, cy, w, h) in [0, 1].
    pub boxes: T,
    /// `[B, K, p]` in CLIP's space, where the checkpoint has the paper's semantic head; the release has another.
    pub semantic: Option<T>,
}

impl<T> Grounding<T> {
    /// What `f` makes of each.
    pub fn try_map<U, E>(
        self,
        mut f: impl FnMut(T) -> std::result::Result<U, E>,
    ) -> std::result::Result<Grounding<U>, E> {
        Ok(Grounding {
            class_logits: f(self.class_logits)?,
            boxes: f(self.boxes)?,
            semantic: self.semantic.map(f).transpose()?,
        })
    }
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

    pub(super) fn matching<'a>(&'a self, graph: &mut Graph<'a>, queries: &Value) -> Result<Value> {
        let hidden = self.matching.0.forward(graph, queries)?;
        let hidden = relu(graph, &hidden)?;
        self.matching.1.forward(graph, &hidden)
    }

    pub(super) fn grounding<'a>(&'a self, graph: &mut Graph<'a>, queries: &Value) -> Result<Grounding<Value>> {
        let [first, second, third] = &self.boxes;
        let mut hidden = queries.clone();
        for layer in [first, second] {
            hidden = layer.forward(graph, &hidden)?;
            hidden = relu(graph, &hidden)?;
        }
        let boxes = third.forward(graph, &hidden)?;
        Ok(Grounding {
            class_logits: self.class.forward(graph, queries)?,
            boxes: sigmoid(graph, &boxes)?,
            semantic: self.semantic.as_ref().map(|head| head.forward(graph, queries)).transpose()?,
        })
    }
}
