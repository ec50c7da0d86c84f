//! From noise to latents: noise schedules and the samplers that walk them.
//!
//! A [`Scheduler`] names an algorithm; with a [`SchedulerConfig`] and a number of steps it plans a [`Sampler`]: the list of the
//! run's [`Evaluation`]s, and a `step` that takes the latents from one to the next.

mod config;
mod ddim;
mod dpm_solver;
mod euler;
mod noise_schedule;
mod pndm;
mod sampler;
mod sigmas;
mod spacing;

pub use config::{Betas, SchedulerConfig};
pub use ddim::Ddim;
pub use dpm_solver::{DpmSolver, DpmSolverOptions, SolverType};
pub use euler::Euler;
pub use noise_schedule::{NoiseSchedule, Prediction};
pub use pndm::Pndm;
pub use sampler::{Evaluation, Sampler, Scheduler, Space};
pub use sigmas::{FinalSigma, SigmaOptions};
pub use spacing::Spacing;
