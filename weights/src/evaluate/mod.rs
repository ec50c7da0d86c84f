//! What the method brings: how well an adapter discriminates, beside denoising errors that need none.

mod baseline;
mod boxes;
mod discriminative;
mod interval;

pub use baseline::{Baselines, baselines};
pub use boxes::{agreed, box_iou};
pub use discriminative::{Discriminative, Share, discriminative};
pub use interval::wilson;
