//! The discriminative adapter (Eq. 1-2): a small DETR-style Transformer that reads the tapped U-Net features and answers
//! with queries, the first M of which speak of the whole image (matching) and the other K of its objects (grounding).
//!
//! Names and shapes of the weights are those of the released checkpoint. The adapter computes in its weights' dtype, f32 as the
//! plugin loads them. A [`Graph`] differentiates it: for its input at inference, for its weights in training, where it is loaded
//! from variables.

mod attention;
mod decoder;
mod dropout;
mod encoder;
mod graph;
mod heads;
mod init;
mod layers;
mod positions;
mod sizes;
#[cfg(test)]
mod tests;

use candle_core::{DType, Device, Tensor};
use diffusion::{Scope, timestep_sinusoid};

pub use dropout::Dropout;
pub use graph::{Cotangents, Graph, Value};
pub use heads::Grounding;
pub use init::Draw;
pub use sizes::{AdapterSizes, SizeHints};

use crate::Result;
use decoder::DecoderLayer;
use encoder::EncoderLayer;
use graph::Parameter;
use heads::Heads;
use layers::{LayerNorm, Linear};
use positions::SinePositions;

/// A loaded adapter. Shapes: B items, N = M + K queries, d model width, p width of CLIP's pooled text embedding.
pub struct Adapter {
    sizes: AdapterSizes,
    input_proj: Linear,
    query_embed: Parameter,
    time: (Linear, Linear),
    positions: SinePositions,
    encoder: Vec<EncoderLayer>,
    decoder: Vec<DecoderLayer>,
    decoder_norm: LayerNorm,
    heads: Heads,
    weight_bytes: u64,
}

impl Adapter {
    /// Takes the adapter's tensors from a checkpoint in the released names.
    pub fn load(scope: &Scope, sizes: AdapterSizes) -> Result<Self> {
        let (d, before) = (sizes.d_model, scope.taken_bytes());
        let projection = Parameter::load(scope, "input_proj.weight", &[d, sizes.channels, 1, 1])?;
        let projection = projection.reshape((d, sizes.channels))?;
        let time = scope.enter("timestep_embedding.time_embedding");
        let encoder = scope.enter("transformer.encoder.layers");
        let decoder = scope.enter("transformer.decoder");
        let encoder_layers = (0..sizes.encoder_layers).map(|i| EncoderLayer::load(&encoder.enter(i), &sizes));
        let decoder_layers =
            (0..sizes.decoder_layers).map(|i| DecoderLayer::load(&decoder.enter(format_args!("layers.{i}")), &sizes));
        Ok(Self {
            input_proj: Linear::new(projection, Parameter::load(scope, "input_proj.bias", &[d])?),
            query_embed: Parameter::load(scope, "query_embed.weight", &[sizes.queries(), d])?,
            time: (Linear::load(&time.enter("linear_1"), d, 4 * d)?, Linear::load(&time.enter("linear_2"), 4 * d, d)?),
            positions: SinePositions::default(),
            encoder: encoder_layers.collect::<Result<_>>()?,
            decoder: decoder_layers.collect::<Result<_>>()?,
            decoder_norm: LayerNorm::load(&decoder.enter("norm"), d)?,
            heads: Heads::load(scope, &sizes)?,
            weight_bytes: scope.taken_bytes() - before,
            sizes,
        })
    }

    /// Sizes of the adapter.
    pub fn sizes(&self) -> &AdapterSizes {
        &self.sizes
    }

    /// Bytes of the weights.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// The device that the weights are on.
    pub fn device(&self) -> &Device {
        self.query_embed.tensor().device()
    }

    /// The dtype of the weights, which the adapter computes in.
    pub fn dtype(&self) -> DType {
        self.query_embed.tensor().dtype()
    }

    /// What the adapter is told of timesteps, one per item: `[B, d]`.
    pub fn sinusoids(&self, timesteps: &[f64]) -> Result<Tensor> {
        Ok(timestep_sinusoid(timesteps, self.sizes.d_model, true, 0., self.device())?.to_dtype(self.dtype())?)
    }

    /// Q*: every decoder layer's normalised output, `[layers, B, N, d]`, for the tapped features `[B, C, h, w]` at one
    /// timestep per item (Eq. 1).
    pub fn queries(&self, features: &Tensor, timesteps: &[f64]) -> Result<Tensor> {
        let features = Value::constant(features.to_dtype(self.dtype())?);
        let sinusoids = self.sinusoids(timesteps)?;
        let layers = self.decoded(&mut Graph::default(), &features, &sinusoids, &mut Dropout::none())?;
        Ok(Tensor::stack(&layers.iter().map(Value::tensor).collect::<Vec<_>>(), 0)?)
    }

    /// The last layer's, `[B, N, d]`, at timesteps as [`Self::sinusoids`], to be differentiated; with dropout, as in training, or
    /// [`Dropout::none`].
    pub fn last_queries<'a>(
        &'a self,
        graph: &mut Graph<'a>,
        features: &Value,
        sinusoids: &Tensor,
        dropout: &mut Dropout,
    ) -> Result<Value> {
        Ok(self.decoded(graph, features, sinusoids, dropout)?.pop().expect("an adapter has a decoder layer"))
    }

    fn decoded<'a>(
        &'a self,
        graph: &mut Graph<'a>,
        features: &Value,
        sinusoids: &Tensor,
        dropout: &mut Dropout,
    ) -> Result<Vec<Value>> {
        let (b, _, h, w) = features.tensor().dims4()?;
        let (d, dtype, device) = (self.sizes.d_model, self.dtype(), self.device());
        let hidden = self.time.0.forward(graph, &Value::constant(sinusoids.clone()))?;
        let hidden = layers::silu(graph, &hidden)?;
        let time = self.time.1.forward(graph, &hidden)?;
        let positions = self.positions.of(h, w, d, dtype, device)?;
        let positions = layers::add_to_tokens(graph, &positions, &time)?;

        let tokens = layers::tokens(graph, features)?;
        let mut memory = self.input_proj.forward(graph, &tokens)?;
        for layer in &self.encoder {
            memory = layer.forward(graph, &memory, &positions, dropout)?;
        }
        let query = layers::repeat(graph, &self.query_embed, b)?;
        let mut target = Value::constant(query.tensor().zeros_like()?);
        let mut layers = Vec::with_capacity(self.decoder.len());
        for layer in &self.decoder {
            target = layer.forward(graph, [&target, &query], [&memory, &positions], dropout)?;
            layers.push(self.decoder_norm.forward(graph, &target)?);
        }
        Ok(layers)
    }

    /// The matching queries of `[B, N, d]` in CLIP's space, h: `[B, M, p]`.
    pub fn matching(&self, queries: &Tensor) -> Result<Tensor> {
        Ok(self.matching_of(&mut Graph::default(), &Value::constant(queries.clone()))?.tensor().clone())
    }

    /// The same, to be differentiated.
    pub fn matching_of<'a>(&'a self, graph: &mut Graph<'a>, queries: &Value) -> Result<Value> {
        let matching = graph.narrow(queries, 1, 0, self.sizes.matching_queries)?;
        self.heads.matching(graph, &matching)
    }

    /// ln(1 / tau), the learned temperature of the contrastive loss: a scalar. The score itself has none.
    pub fn logit_scale(&self) -> &Tensor {
        &self.heads.logit_scale
    }

    /// What the grounding queries of `[B, N, d]` say.
    pub fn grounding(&self, queries: &Tensor) -> Result<Grounding> {
        let found = self.grounding_of(&mut Graph::default(), &Value::constant(queries.clone()))?;
        found.try_map(|value| Ok(value.tensor().clone()))
    }

    /// The same, to be differentiated.
    pub fn grounding_of<'a>(&'a self, graph: &mut Graph<'a>, queries: &Value) -> Result<Grounding<Value>> {
        let AdapterSizes { matching_queries, grounding_queries, .. } = self.sizes;
        let grounding = graph.narrow(queries, 1, matching_queries, grounding_queries)?;
        self.heads.grounding(graph, &grounding)
    }
}
