//! The two stages of training (Section 3.3): probing trains adapter and heads on a frozen U-Net, tuning also low-rank
//! changes of its attention, with the denoising loss.

mod adamw;
mod batch;
mod event_file;
mod learning_rate;
mod metrics;
mod model;
mod objective;
mod run;
mod state;

pub use adamw::{AdamW, AdamWSettings, Moments};
pub use batch::{Batch, Batcher, Negatives};
pub use event_file::EventFile;
pub use learning_rate::{Decay, LearningRate};
pub use metrics::Metrics;
pub use model::{LoraLayers, Model, untrained, untrained_lora};
pub use objective::{Contrast, Gradients, LossWeights, Losses, Objective};
pub use run::{Outcome, Plan, Trainer};
