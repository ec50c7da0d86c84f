//! Stable Diffusion 1.x and 2.x on candle.

mod checkpoint;
mod error;

pub use checkpoint::{Checkpoint, Scope};
pub use error::{Error, Result};
