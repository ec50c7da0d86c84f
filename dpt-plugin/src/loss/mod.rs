//! The training losses (Eq. 3-8) and what they are made of. All are of operations that candle's autograd follows.

mod boxes;
mod grounding;
mod matching;

pub use boxes::generalized_iou;
pub use grounding::{GroundingLoss, GroundingTerms, GroundingWeights, Presence, PresenceLoss};
pub use matching::{in_batch_loss, pair_scores, scores_of_texts, triplet_loss};
