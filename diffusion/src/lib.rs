//! Stable Diffusion 1.x and 2.x on candle: text encoders, U-Net with taps, LoRA and hand-written input gradients, VAE,
//! schedulers, and loading from folders in the diffusers layout.
//!
//! Everything runs on the device and in the dtype that a model was loaded with. Weights are memory-mapped while they are
//! read: a checkpoint must not be rewritten while it is being loaded.

mod checkpoint;
mod error;
mod layers;
mod unet;

pub use checkpoint::{Checkpoint, Scope};
pub use error::{Error, Result};
pub use unet::{LoraEntry, Tap, Tape, TextKeys, UNet, UNetConfig};
