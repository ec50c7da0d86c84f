//! Stable Diffusion 1.x and 2.x on candle: text encoders, U-Net with taps, LoRA and hand-written input gradients, VAE,
//! schedulers, and loading from folders in the diffusers layout and from single files under LDM's names.
//!
//! Everything runs on the device and in the dtype that a model was loaded with. Weights are memory-mapped while they are
//! read: a checkpoint must not be rewritten while it is being loaded.

mod allocator;
mod checkpoint;
mod config;
mod device;
mod error;
mod finite;
pub mod layers;
pub mod lora;
mod pickle;
mod pipeline;
mod replay;
mod save;
pub mod scheduler;
mod single_file;
#[cfg(test)]
mod testing;
pub mod text;
mod unet;
mod vae;

/// Kernels in f32 on the CPU, over slices, to be measured one by one.
pub mod kernels {
    pub use crate::layers::kernels::*;
}

pub use allocator::{TensorAllocator, release_memory};
pub use checkpoint::{Checkpoint, RawTensor, Scope};
pub use config::weights_file;
pub use device::{device, dtype};
pub use error::{Error, Result, is_out_of_memory};
pub use layers::timestep_sinusoid;
pub use lora::LoraEntry;
pub use pipeline::{LoadOptions, Pipeline, TextModel, load_unet_to};
pub use replay::{Asking, Pass, Replay, asking};
pub use save::save_safetensors;
pub use single_file::{SingleFileOptions, SingleFileSummary, describe_single_file, write_single_file};
pub use unet::{LoraGradient, Tap, Tape, TextKeys, UNet, UNetConfig, Weight};
pub use vae::{LatentDistribution, Vae, VaeConfig};
