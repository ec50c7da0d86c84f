//! From noise to latents: noise schedules and the samplers that walk them.
//!
//! A sampler is made from a [`SchedulerConfig`] and a number of steps. It lists its `timesteps()` in the order they are
//! taken, gives `alpha_bar(i)` at each, and `step(i, model_output, sample)` takes the latents from timestep `i` to the
//! next. Latents are variance preserving throughout, `z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) noise`: a sampler
//! whose formula lives in another space converts inside its `step`.

mod config;
mod ddim;
mod noise_schedule;
mod spacing;

pub use config::{Betas, SchedulerConfig};
pub use ddim::Ddim;
pub use noise_schedule::{NoiseSchedule, Prediction};
pub use spacing::Spacing;
