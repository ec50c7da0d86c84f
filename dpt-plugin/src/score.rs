use candle_core::{D, Tensor};

use crate::{Adapter, Dropout, Graph, Result, Value};

/// The matching score `s(y, z) = max_i cos(CLIP(y), h_i)` (Eq. 2), `[B]`, of the last decoder layer's matching queries.
/// `features` `[B, C, h, w]`, timesteps as [`Adapter::sinusoids`], `pooled` `[B, p]`, on the adapter's device; computed in the
/// adapter's dtype.
pub fn score(adapter: &Adapter, features: &Tensor, sinusoids: &Tensor, pooled: &Tensor) -> Result<Tensor> {
    let (mut graph, features) = (Graph::default(), Value::constant(features.to_dtype(adapter.dtype())?));
    let matching = matching(adapter, &mut graph, &features, sinusoids)?;
    Ok(Cosines::new(matching.tensor(), pooled)?.scores)
}

/// The scores `[B]` and the gradient of each item's score for its features, `[B, C, h, w]`, in the adapter's dtype. Items do not
/// mix in the adapter, so the gradient of the sum is the gradient of each.
pub fn score_and_gradient(
    adapter: &Adapter,
    features: &Tensor,
    sinusoids: &Tensor,
    pooled: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let mut graph = Graph::default();
    let features = graph.input(features.to_dtype(adapter.dtype())?);
    let matching = matching(adapter, &mut graph, &features, sinusoids)?;
    let cosines = Cosines::new(matching.tensor(), pooled)?;
    let gradient = graph.backward([(matching, cosines.gradient()?)])?.take(&features);
    Ok((cosines.scores, gradient.expect("the score depends on every feature")))
}

/// h of the features, `[B, M, p]`.
fn matching<'a>(adapter: &'a Adapter, graph: &mut Graph<'a>, features: &Value, sinusoids: &Tensor) -> Result<Value> {
    let queries = adapter.last_queries(graph, features, sinusoids, &mut Dropout::none())?;
    adapter.matching_of(graph, &queries)
}

/// The cosines of matching queries with a text, the largest of which is the score.
struct Cosines {
    /// h to unit length, `[B, M, p]`, and the lengths, `[B, M, 1]`.
    units: Tensor,
    lengths: Tensor,
    /// The text to unit length, `[B, p, 1]`.
    text: Tensor,
    /// `[B, M, 1]`.
    cosines: Tensor,
    /// `[B]`.
    scores: Tensor,
}

impl Cosines {
    /// Of h `[B, M, p]` and pooled texts `[B, p]`.
    fn new(matching: &Tensor, pooled: &Tensor) -> Result<Self> {
        let lengths = lengths(matching)?;
        let units = matching.broadcast_div(&lengths)?;
        let text = normalize(&pooled.to_dtype(matching.dtype())?)?.unsqueeze(2)?;
        let cosines = units.matmul(&text)?;
        let scores = cosines.max(1)?.squeeze(1)?;
        Ok(Self { units, lengths, text, cosines, scores })
    }

    /// Of the scores for h: `(text - cosine unit) / length` at the largest cosine, zero at the others.
    fn gradient(&self) -> Result<Tensor> {
        let Self { units, lengths, text, cosines, scores } = self;
        let largest = cosines.broadcast_eq(&scores.reshape(((), 1, 1))?)?.to_dtype(cosines.dtype())?;
        let across = text.transpose(1, 2)?.broadcast_sub(&units.broadcast_mul(cosines)?)?;
        Ok(across.broadcast_mul(&(largest / lengths)?)?)
    }
}

/// Over the last dimension; that of the zero vector is not zero, so that its gradient is finite.
fn lengths(x: &Tensor) -> Result<Tensor> {
    Ok((x.sqr()?.sum_keepdim(D::Minus1)? + 1e-24)?.sqrt()?)
}

/// To unit length over the last dimension; the zero vector stays zero and has a finite gradient.
pub(crate) fn normalize(x: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_div(&lengths(x)?)?)
}
