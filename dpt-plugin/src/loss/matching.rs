use candle_core::{D, DType, Tensor};
use candle_nn::loss::cross_entropy;

use crate::Result;
use crate::score::normalize;

/// s of every image with every text: `matching` `[B, M, p]`, `texts` `[C, p]` to `[B, C]` (Eq. 2).
pub fn scores_of_texts(matching: &Tensor, texts: &Tensor) -> Result<Tensor> {
    let (b, m, p) = matching.dims3()?;
    let cosines = normalize(matching)?.reshape((b * m, p))?.matmul(&normalize(texts)?.t()?)?;
    Ok(cosines.reshape((b, m, ()))?.max(1)?)
}

/// s of each image with its own text: `matching` `[B, M, p]`, `texts` `[B, p]` to `[B]` (Eq. 2).
pub fn pair_scores(matching: &Tensor, texts: &Tensor) -> Result<Tensor> {
    let cosines = normalize(matching)?.broadcast_mul(&normalize(texts)?.unsqueeze(1)?)?.sum(D::Minus1)?;
    Ok(cosines.max(1)?)
}

/// The paper's contrast within the batch (Eq. 3-4), of scores `[B, B]` (image, text) times `scale` = 1 / tau:
/// (text to image, image to text), each the mean over the batch.
pub fn in_batch_loss(scores: &Tensor, scale: &Tensor) -> Result<(Tensor, Tensor)> {
    let logits = scores.broadcast_mul(scale)?;
    let target = Tensor::arange(0u32, logits.dim(0)? as u32, logits.device())?;
    Ok((cross_entropy(&logits.t()?.contiguous()?, &target)?, cross_entropy(&logits, &target)?))
}

/// The release's contrast of each pair with its own negatives. `positive` `[B]`, `other_images` and `other_texts` `[B, n]`:
/// the scores of the text with other images, and of the image with other texts. (text to image, image to text).
pub fn triplet_loss(
    positive: &Tensor,
    other_images: &Tensor,
    other_texts: &Tensor,
    scale: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let first = Tensor::zeros(positive.dim(0)?, DType::U32, positive.device())?;
    let contrast = |others: &Tensor| -> Result<Tensor> {
        let logits = Tensor::cat(&[&positive.unsqueeze(1)?, others], 1)?.broadcast_mul(scale)?;
        Ok(cross_entropy(&logits, &first)?)
    };
    Ok((contrast(other_images)?, contrast(other_texts)?))
}
