use candle_core::{D, Tensor, Var};

use crate::{Adapter, Result};

/// The matching score `s(y, z) = max_i cos(CLIP(y), h_i)` (Eq. 2), `[B]`, of the last decoder layer's matching queries.
/// `features` `[B, C, h, w]`, one timestep per item, `pooled` `[B, p]`, on the adapter's device; computed in the adapter's dtype.
pub fn score(adapter: &Adapter, features: &Tensor, timesteps: &[f64], pooled: &Tensor) -> Result<Tensor> {
    let queries = adapter.queries(features, timesteps)?;
    let matching = normalize(&adapter.matching(&queries.get(queries.dim(0)? - 1)?)?)?;
    let cosines = matching.matmul(&normalize(&pooled.to_dtype(adapter.dtype())?)?.unsqueeze(2)?)?.squeeze(2)?;
    Ok(cosines.max(1)?)
}

/// The scores `[B]` and the gradient of each item's score for its features, `[B, C, h, w]`. Items do not mix in the
/// adapter, so the gradient of the sum is the gradient of each.
pub fn score_and_gradient(
    adapter: &Adapter,
    features: &Tensor,
    timesteps: &[f64],
    pooled: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let features = Var::from_tensor(features)?;
    let scores = score(adapter, &features, timesteps, pooled)?;
    let mut gradients = scores.sum_all()?.backward()?;
    let gradient = gradients.remove(&features).expect("the score depends on every feature");
    Ok((scores.detach(), gradient))
}

/// To unit length over the last dimension; the zero vector stays zero and has a finite gradient.
pub(crate) fn normalize(x: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_div(&(x.sqr()?.sum_keepdim(D::Minus1)? + 1e-24)?.sqrt()?)?)
}
