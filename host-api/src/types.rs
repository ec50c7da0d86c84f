//! What is sampled and what came of it, without pointers.

use std::fmt;

use crate::abi;
use crate::error::{Error, Result, Status};
use crate::view::View;

/// What the U-Net predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity.
    V,
    /// Rectified flow; has no alpha_bar.
    Flow,
}

impl Prediction {
    /// The code of the interface.
    pub fn code(self) -> i32 {
        match self {
            Self::Epsilon => abi::SH_PREDICTION_EPSILON,
            Self::V => abi::SH_PREDICTION_V,
            Self::Flow => abi::SH_PREDICTION_FLOW,
        }
    }

    /// The prediction of a code.
    pub fn from_code(code: i32) -> Result<Self> {
        match code {
            abi::SH_PREDICTION_EPSILON => Ok(Self::Epsilon),
            abi::SH_PREDICTION_V => Ok(Self::V),
            abi::SH_PREDICTION_FLOW => Ok(Self::Flow),
            other => Err(Error::invalid_argument(format!("unknown prediction {other}"))),
        }
    }
}

/// How latents are scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// `z = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise`.
    Vp,
    /// `x = z / sqrt(alpha_bar)`: k-diffusion's sigma space.
    Ve,
}

impl Space {
    /// The code of the interface.
    pub fn code(self) -> i32 {
        match self {
            Self::Vp => abi::SH_SPACE_VP,
            Self::Ve => abi::SH_SPACE_VE,
        }
    }

    /// The space of a code.
    pub fn from_code(code: i32) -> Result<Self> {
        match code {
            abi::SH_SPACE_VP => Ok(Self::Vp),
            abi::SH_SPACE_VE => Ok(Self::Ve),
            other => Err(Error::invalid_argument(format!("unknown space {other}"))),
        }
    }
}

/// Where latents are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// Main memory.
    Cpu,
    /// A CUDA device by ordinal.
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// The diffusion model in use.
#[derive(Clone, Copy, Debug)]
pub struct Model<'a> {
    /// `"sd1"`, `"sd2"`, or another name.
    pub family: &'a str,
    /// What the U-Net predicts.
    pub prediction: Prediction,
    /// 4; 9 for inpainting models.
    pub unet_in_channels: usize,
    /// 4.
    pub latent_channels: usize,
    /// By training timestep; empty for flow models.
    pub alphas_cumprod: &'a [f64],
    /// The U-Net's `config.json` in diffusers' terms, when the host knows it.
    pub unet_config: Option<&'a str>,
}

/// The conditional text of each item of a batch of B. The default has none of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Text<'a> {
    /// `[B, S, D]`: the text encoder's last hidden state, after the final layer norm.
    pub context: Option<View<'a>>,
    /// `[B, D]`: that state at the end-of-text token, no projection.
    pub pooled: Option<View<'a>>,
    /// B positions in the first chunk of S; instead of `pooled`.
    pub end_of_text: Option<&'a [i64]>,
    /// B prompts.
    pub prompts: Option<&'a [String]>,
}

/// One sampling run.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// B.
    pub batch: usize,
    /// Steps of the whole schedule; at least 1.
    pub steps: usize,
    /// Of the classifier-free guidance.
    pub guidance_scale: f64,
    /// The text of the run.
    pub text: Text<'a>,
}

/// One step of a run.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// `0 .. count - 1`; a run that starts within the schedule, from a noised image, begins above 0.
    pub index: usize,
    /// Steps of the whole schedule.
    pub count: usize,
    /// 0 for the first noise prediction of the step; 1, 2, ... for those that samplers add.
    pub sub_evaluation: usize,
    /// Training timestep, may be fractional.
    pub timestep: f64,
    /// Cumulative alpha at that timestep, in `[0, 1]`; in [`Space::Ve`] above 0.
    pub alpha_bar: f64,
    /// How the latents are scaled.
    pub space: Space,
    /// The host adds inputs to the U-Net that a plugin's own U-Net cannot see.
    pub extra_inputs: bool,
    /// Replaces the run's text for this step.
    pub text: Option<Text<'a>>,
}

/// What a plugin asks of the host in begin and step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The host extension `sampler-hook.gradient/1`.
    pub gradient: bool,
    /// [`Text::context`].
    pub context: bool,
    /// [`Text::pooled`], or context and end of text.
    pub pooled: bool,
    /// The host extension `sampler-hook.weights/1`.
    pub weights: bool,
    /// The U-Net block whose output is used: `"mid"`, `"up1"`, ...; empty when none is.
    pub tap: String,
}

/// Describes one plugin of a library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Stable: `"dpt"`.
    pub id: &'static str,
    /// For people.
    pub name: &'static str,
    /// Of the plugin.
    pub version: &'static str,
    /// Who made it.
    pub vendor: &'static str,
    /// What it does.
    pub description: &'static str,
}

/// What a step did as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// At least one item was corrected.
    Corrected,
    /// The strength is zero.
    SkippedStrength,
    /// Outside the share of steps that is corrected.
    SkippedRange,
    /// Between two corrected steps.
    SkippedInterval,
    /// Only the first evaluation of a step is corrected.
    SkippedSubEvaluation,
    /// Batch 0.
    SkippedEmpty,
}

impl Outcome {
    /// The code of the interface.
    pub fn code(self) -> i32 {
        match self {
            Self::Corrected => abi::SH_CORRECTED,
            Self::SkippedStrength => abi::SH_SKIPPED_STRENGTH,
            Self::SkippedRange => abi::SH_SKIPPED_RANGE,
            Self::SkippedInterval => abi::SH_SKIPPED_INTERVAL,
            Self::SkippedSubEvaluation => abi::SH_SKIPPED_SUB_EVALUATION,
            Self::SkippedEmpty => abi::SH_SKIPPED_EMPTY,
        }
    }

    /// The outcome of a code.
    pub fn from_code(code: i32) -> Result<Self> {
        match code {
            abi::SH_CORRECTED => Ok(Self::Corrected),
            abi::SH_SKIPPED_STRENGTH => Ok(Self::SkippedStrength),
            abi::SH_SKIPPED_RANGE => Ok(Self::SkippedRange),
            abi::SH_SKIPPED_INTERVAL => Ok(Self::SkippedInterval),
            abi::SH_SKIPPED_SUB_EVALUATION => Ok(Self::SkippedSubEvaluation),
            abi::SH_SKIPPED_EMPTY => Ok(Self::SkippedEmpty),
            other => Err(Error::new(Status::Internal, format!("unknown outcome {other}"))),
        }
    }
}

/// What happened to one item of the batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ItemReport {
    /// [`Status::Ok`], or why this item was left as it was.
    pub status: Status,
    /// Before the correction; NaN when it was not computed.
    pub score: f32,
    /// L2 norm of the score's gradient over the item's latents (VP); NaN when not computed.
    pub gradient_norm: f32,
    /// L2 norm of what was added to the item's latents (VP); 0 when nothing was.
    pub correction_norm: f32,
}

impl Default for ItemReport {
    fn default() -> Self {
        Self { status: Status::Ok, score: f32::NAN, gradient_norm: f32::NAN, correction_norm: 0.0 }
    }
}

/// What a step did.
#[derive(Clone, Debug)]
pub struct Report {
    /// As a whole.
    pub outcome: Outcome,
    /// One per item of the batch.
    pub items: Vec<ItemReport>,
    /// Time spent in the plugin, host functions included. The wrapper measures it; plugins leave it alone.
    pub seconds: f64,
}

impl Report {
    /// [`Outcome::Corrected`] and [`ItemReport::default`] for each of `batch` items.
    pub fn new(batch: usize) -> Self {
        Self { outcome: Outcome::Corrected, items: vec![ItemReport::default(); batch], seconds: 0.0 }
    }
}
