//! What the method brings: how well an adapter discriminates, beside denoising errors that need none; and how well generated
//! pictures fit their captions, by the oracle of the shapes world.

mod baseline;
mod boxes;
mod discriminative;
mod frechet;
mod generative;
mod interval;

pub use baseline::{Baselines, baselines};
pub use boxes::{agreed, box_iou};
pub use discriminative::{Discriminative, Share, discriminative};
pub use frechet::{Moments, frechet_distance};
pub use generative::{Alignment, Sampling, Variant, captions, features, generative};
pub use interval::{paired_difference, wilson};
