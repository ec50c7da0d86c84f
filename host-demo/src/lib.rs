//! The reference host: generates images with Stable Diffusion through a sampler-hook plugin.
//!
//! [`Session`] holds a model and, when asked for, a plugin; [`Session::run`] samples one batch: the plugin's LoRA is merged
//! when the run begins and taken out at its end, and before every noise prediction the plugin corrects the latents.

mod conditioning;
mod defaults;
mod error;
mod figure;
mod host;
mod image;
mod memory;
mod noise;
mod output;
mod report;
mod request;
mod run;
mod session;
mod split;
mod threads;

pub use defaults::{SHIPPED_ETA, default_adapter, default_model, default_plugin};
pub use error::{Error, Result};
pub use figure::{Curve, Figure, Row};
pub use host::ShowProgress;
pub use image::Rgb;
pub use memory::peak_bytes;
pub use noise::{latents_from_file, seeded_noise};
pub use output::{check_output, write_whole};
pub use report::{ItemRecord, LoraRecord, Report, Seconds, Settings, StepRecord};
pub use request::{Mode, PromptSwitch, Request, StartImage};
pub use run::RunOutcome;
pub use session::{Loading, PluginChoice, Session};
pub use threads::settle_threads;
