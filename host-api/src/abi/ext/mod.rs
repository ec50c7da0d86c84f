//! Extensions, one per file.

pub mod gradient;
pub mod lora;
pub mod params;
pub mod progress;
pub mod split;
pub mod weights;
