use serde::Deserialize;

use diffusion::Scope;

use crate::{Error, Result};

/// The sizes of an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterSizes {
    /// Name of the U-Net block whose output it reads.
    pub tap: String,
    /// Channels of that output.
    pub channels: usize,
    /// d: width of the Transformer.
    pub d_model: usize,
    /// Attention heads.
    pub heads: usize,
    /// Hidden width of the feed-forward layers.
    pub feedforward: usize,
    /// Encoder layers.
    pub encoder_layers: usize,
    /// Decoder layers.
    pub decoder_layers: usize,
    /// M: queries that speak of the whole image.
    pub matching_queries: usize,
    /// K: queries that speak of its objects.
    pub grounding_queries: usize,
    /// p: width of CLIP's pooled text embedding.
    pub clip_dim: usize,
    /// Outputs of the class head: 1, or the release's 256.
    pub classes: usize,
}

/// What the tensors' shapes do not tell: given by the configuration, by the file's header, or known of the release.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct SizeHints {
    /// Name of the U-Net block that the adapter reads.
    pub tap: Option<String>,
    /// Attention heads.
    pub heads: Option<usize>,
    /// M: how many of the queries are for matching.
    pub matching_queries: Option<usize>,
}

impl SizeHints {
    /// The paper's and the release's sizes: d 256, N 110.
    const RELEASE: (usize, usize, usize, usize) = (256, 110, 8, 10);

    /// These hints, and those of `other` where these have none.
    pub fn or(self, other: SizeHints) -> Self {
        Self {
            tap: self.tap.or(other.tap),
            heads: self.heads.or(other.heads),
            matching_queries: self.matching_queries.or(other.matching_queries),
        }
    }
}

impl AdapterSizes {
    /// N = M + K.
    pub fn queries(&self) -> usize {
        self.matching_queries + self.grounding_queries
    }

    /// Reads the sizes off the tensors' shapes. Number of heads, M and tap are not in them: without a hint, an adapter of
    /// the release's sizes (d 256, 110 queries) has 8 heads and M 10; a tap must always be given.
    pub fn infer(scope: &Scope, hints: SizeHints) -> Result<Self> {
        let dims = |name: &str, rank: usize| match scope.shape(name) {
            Some(shape) if shape.len() == rank => Ok(shape),
            found => Err(Error::Adapter(format!("tensor `{name}` has shape {found:?}, expected {rank} dimensions"))),
        };
        let layers = |part: &str| {
            (0..).take_while(|i| scope.contains(&format!("transformer.{part}.layers.{i}.linear1.weight"))).count()
        };
        let query = dims("query_embed.weight", 2)?;
        let (queries, d_model) = (query[0], query[1]);
        let (release_d, release_n, release_heads, release_m) = SizeHints::RELEASE;
        let of_release = d_model == release_d && queries == release_n;
        let need = |value: Option<usize>, release: usize, key: &str| {
            value.or(of_release.then_some(release)).ok_or_else(|| {
                Error::Adapter(format!(
                    "an adapter of width {d_model} with {queries} queries is not of the released sizes, and neither the \
                     file's header nor the configuration says `{key}`"
                ))
            })
        };
        let tap = hints.tap.ok_or_else(|| {
            Error::Adapter(
                "neither the file's header nor the configuration says which U-Net block it reads: `tap`".into(),
            )
        })?;
        let sizes = Self {
            tap,
            channels: dims("input_proj.weight", 4)?[1],
            d_model,
            heads: need(hints.heads, release_heads, "heads")?,
            feedforward: dims("transformer.encoder.layers.0.linear1.weight", 2)?[0],
            encoder_layers: layers("encoder"),
            decoder_layers: layers("decoder"),
            matching_queries: need(hints.matching_queries, release_m, "matching_queries")?,
            grounding_queries: 0,
            clip_dim: dims("map_to_clip.2.weight", 2)?[0],
            classes: dims("class_embed.weight", 2)?[0],
        };
        if sizes.matching_queries > queries {
            return Err(Error::Adapter(format!(
                "{} matching queries of {queries}; expected 1 to {queries}",
                sizes.matching_queries
            )));
        }
        let sizes = Self { grounding_queries: queries - sizes.matching_queries, ..sizes };
        sizes.check()?;
        Ok(sizes)
    }

    /// Fails when no adapter can have these sizes.
    pub fn check(&self) -> Result<()> {
        let AdapterSizes { d_model, heads, matching_queries, .. } = *self;
        if heads == 0 || d_model == 0 || d_model % heads != 0 || d_model % 4 != 0 {
            return Err(Error::Adapter(format!("width {d_model} must be divisible by 4 and by its {heads} heads")));
        }
        if matching_queries == 0 {
            let queries = self.queries();
            return Err(Error::Adapter(format!("0 matching queries of {queries}; expected 1 to {queries}")));
        }
        let parts = [
            ("the encoder has no layers", self.encoder_layers),
            ("the decoder has no layers", self.decoder_layers),
            ("the feed-forward layers have no hidden values", self.feedforward),
        ];
        match parts.iter().find(|(_, size)| *size == 0) {
            Some((message, _)) => Err(Error::Adapter((*message).into())),
            None => Ok(()),
        }
    }
}
