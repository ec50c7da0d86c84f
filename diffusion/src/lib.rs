//! Stable Diffusion 1.x and 2.x on candle.

mod checkpoint;
mod config;
mod error;
pub mod scheduler;
#[cfg(test)]
mod testing;
pub mod text;

pub use checkpoint::{Checkpoint, Scope};
pub use error::{Error, Result};
