//! Extensions, one per file.

pub mod gradient;
pub mod lora;
pub mod params;
