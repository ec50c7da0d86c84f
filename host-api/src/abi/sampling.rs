//! What is sampled: model, text, run and step.

use super::layout::{c_constants, c_structs};
use super::view::{sh_string, sh_view};

c_constants! {
    /// The U-Net predicts the noise.
    pub const SH_PREDICTION_EPSILON: i32 = 1;
    /// The U-Net predicts the velocity.
    pub const SH_PREDICTION_V: i32 = 2;
    /// Rectified flow.
    pub const SH_PREDICTION_FLOW: i32 = 3;

    /// Latents are variance-preserving.
    pub const SH_SPACE_VP: i32 = 1;
    /// Latents are `z / sqrt(alpha_bar)`.
    pub const SH_SPACE_VE: i32 = 2;

    /// The U-Net gets inputs that the plugin cannot see.
    pub const SH_STEP_EXTRA_INPUTS: u32 = 1;
}

c_structs! {
    /// The diffusion model in use.
    pub struct sh_model {
        /// The host's `sizeof`.
        pub struct_size: u32,
        /// `SH_PREDICTION_*`.
        pub prediction: i32,
        /// `"sd1"`, `"sd2"`, ...
        pub family: sh_string,
        /// 4; 9 for inpainting models.
        pub unet_in_channels: u32,
        /// 4.
        pub latent_channels: u32,
        /// By training timestep.
        pub alphas_cumprod: *const f64,
        /// Length of `alphas_cumprod`.
        pub alphas_cumprod_count: u64,
        /// The U-Net's `config.json`, or empty.
        pub unet_config: sh_string,
    }

    /// The conditional text of each item.
    pub struct sh_text {
        /// The host's `sizeof`.
        pub struct_size: u32,
        /// 0.
        pub reserved: u32,
        /// `[B, S, D]`, or null.
        pub context: *const sh_view,
        /// `[B, D]`, or null.
        pub pooled: *const sh_view,
        /// B positions, or null.
        pub end_of_text: *const i64,
        /// B prompts, or null.
        pub prompts: *const sh_string,
    }

    /// One sampling run.
    pub struct sh_run {
        /// The host's `sizeof`.
        pub struct_size: u32,
        /// B.
        pub batch: u32,
        /// Of the schedule; at least 1.
        pub steps: u32,
        /// 0.
        pub reserved: u32,
        /// Of the classifier-free guidance.
        pub guidance_scale: f64,
        /// The text of the run.
        pub text: *const sh_text,
    }

    /// One step of a run.
    pub struct sh_step {
        /// The host's `sizeof`.
        pub struct_size: u32,
        /// `0 .. count - 1`.
        pub index: u32,
        /// Steps of the schedule.
        pub count: u32,
        /// 0 for the step's first noise prediction.
        pub sub_evaluation: u32,
        /// Training timestep, may be fractional.
        pub timestep: f64,
        /// In `(0, 1]`.
        pub alpha_bar: f64,
        /// `SH_SPACE_*`.
        pub space: i32,
        /// `SH_STEP_*`.
        pub flags: u32,
        /// Replaces the run's text for this step; null: the run's.
        pub text: *const sh_text,
    }
}
