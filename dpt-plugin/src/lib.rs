//! Discriminative Probing and Tuning (CVPR 2024) as a sampler-hook plugin: an adapter on U-Net features scores how well
//! noisy latents match the prompt, and the score's gradient corrects the latents at every step.
//!
//! [`DptPlugin`] is the plugin; the crate `dpt-plugin-cdylib` exports it from the shared library that hosts load.

mod adapter;
mod batch;
mod borrowed;
mod checkpoint;
mod config;
mod correct;
mod error;
mod fit;
mod lora;
pub mod loss;
mod params;
mod plugin;
mod pool;
mod score;
mod source;
mod text;

pub use adapter::{Adapter, AdapterSizes, Cotangents, Draw, Dropout, Graph, Grounding, SizeHints, Value};
pub use config::{Config, GradientSource, LoraChoice, LoraChoices, SCHEMA};
pub use correct::{correction, norms};
pub use diffusion::TensorAllocator;
pub use error::{Error, Result};
pub use plugin::DptPlugin;
pub use score::{score, score_and_gradient};
