//! The discriminative adapter (Eq. 1-2): a small DETR-style Transformer that reads the tapped U-Net features and answers
//! with queries, the first M of which speak of the whole image (matching) and the other K of its objects (grounding).
//!
//! Names and shapes of the weights are those of the released checkpoint. The adapter computes in its weights' dtype, f32 as the
//! plugin loads them, through operations that candle's autograd can differentiate: its input gradient at inference, its
//! weights in training, where it is loaded from variables.

mod attention;
mod decoder;
mod dropout;
mod encoder;
mod fused;
mod heads;
mod init;
mod layers;
mod positions;
mod sizes;

use candle_core::{DType, Device, Tensor};
use diffusion::{Scope, timestep_sinusoid};

pub use dropout::Dropout;
pub use heads::Grounding;
pub use init::Draw;
pub use sizes::{AdapterSizes, SizeHints};

use crate::Result;
use decoder::DecoderLayer;
use encoder::EncoderLayer;
use heads::Heads;
use layers::{LayerNorm, Linear};

/// A loaded adapter. Shapes: B items, N = M + K queries, d model width, p width of CLIP's pooled text embedding.
pub struct Adapter {
    sizes: AdapterSizes,
    input_proj: Linear,
    query_embed: Tensor,
    time: (Linear, Linear),
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
        let projection = scope.tensor("input_proj.weight", &[d, sizes.channels, 1, 1])?.flatten_from(1)?;
        let time = scope.enter("timestep_embedding.time_embedding");
        let encoder = scope.enter("transformer.encoder.layers");
        let decoder = scope.enter("transformer.decoder");
        let encoder_layers = (0..sizes.encoder_layers).map(|i| EncoderLayer::load(&encoder.enter(i), &sizes));
        let decoder_layers =
            (0..sizes.decoder_layers).map(|i| DecoderLayer::load(&decoder.enter(format_args!("layers.{i}")), &sizes));
        Ok(Self {
            input_proj: Linear::new(projection, scope.tensor("input_proj.bias", &[d])?),
            query_embed: scope.tensor("query_embed.weight", &[sizes.queries(), d])?,
            time: (Linear::load(&time.enter("linear_1"), d, 4 * d)?, Linear::load(&time.enter("linear_2"), 4 * d, d)?),
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
        self.query_embed.device()
    }

    /// The dtype of the weights, which the adapter computes in.
    pub fn dtype(&self) -> DType {
        self.query_embed.dtype()
    }

    /// Q*: every decoder layer's normalised output, `[layers, B, N, d]`, for the tapped features `[B, C, h, w]` at one
    /// timestep per item (Eq. 1).
    pub fn queries(&self, features: &Tensor, timesteps: &[f64]) -> Result<Tensor> {
        self.queries_dropped(features, timesteps, &mut Dropout::none())
    }

    /// The same with dropout, as in training.
    pub fn queries_dropped(&self, features: &Tensor, timesteps: &[f64], dropout: &mut Dropout) -> Result<Tensor> {
        let (b, _, h, w) = features.dims4()?;
        let (d, dtype) = (self.sizes.d_model, self.dtype());
        let features = features.to_dtype(dtype)?;
        let wave = timestep_sinusoid(timesteps, d, true, 0., features.device())?.to_dtype(dtype)?;
        let time = self.time.1.forward(&self.time.0.forward(&wave)?.silu()?)?;
        let positions = positions::sine(h, w, d, features.device())?.to_dtype(dtype)?;
        let positions = positions.broadcast_add(&time.unsqueeze(1)?)?;

        let mut memory = self.input_proj.forward(&features.flatten_from(2)?.transpose(1, 2)?.contiguous()?)?;
        for layer in &self.encoder {
            memory = layer.forward(&memory, &positions, dropout)?;
        }
        let query = self.query_embed.unsqueeze(0)?.broadcast_as((b, self.sizes.queries(), d))?.contiguous()?;
        let mut target = query.zeros_like()?;
        let mut layers = Vec::with_capacity(self.decoder.len());
        for layer in &self.decoder {
            target = layer.forward(&target, &memory, &positions, &query, dropout)?;
            layers.push(self.decoder_norm.forward(&target)?);
        }
        Ok(Tensor::stack(&layers, 0)?)
    }

    /// The matching queries of `[B, N, d]` in CLIP's space, h: `[B, M, p]`.
    pub fn matching(&self, queries: &Tensor) -> Result<Tensor> {
        self.heads.matching(&queries.narrow(1, 0, self.sizes.matching_queries)?.contiguous()?)
    }

    /// ln(1 / tau), the learned temperature of the contrastive loss: a scalar. The score itself has none.
    pub fn logit_scale(&self) -> &Tensor {
        &self.heads.logit_scale
    }

    /// What the grounding queries of `[B, N, d]` say.
    pub fn grounding(&self, queries: &Tensor) -> Result<Grounding> {
        let AdapterSizes { matching_queries, grounding_queries, .. } = self.sizes;
        self.heads.grounding(&queries.narrow(1, matching_queries, grounding_queries)?.contiguous()?)
    }
}
