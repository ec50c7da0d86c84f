//! The noise of a schedule as sigma, `sigma^2 = 1 / alpha_bar - 1`, for samplers that are written in it.

use serde::Deserialize;

use super::{NoiseSchedule, SchedulerConfig};
use crate::{Error, Result};

/// Where the last step of a sampler in sigma ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinalSigma {
    /// No noise.
    #[default]
    Zero,
    /// The noise of timestep 0.
    SigmaMin,
}

/// What a scheduler configuration says of the sigmas. Absent keys have diffusers' defaults.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct SigmaOptions {
    /// Where the last step ends.
    pub final_sigmas_type: Option<FinalSigma>,
    /// Other spacings of the sigmas, which are not supported.
    pub use_karras_sigmas: Option<bool>,
    /// See [`Self::use_karras_sigmas`].
    pub use_exponential_sigmas: Option<bool>,
    /// See [`Self::use_karras_sigmas`].
    pub use_beta_sigmas: Option<bool>,
    /// See [`Self::use_karras_sigmas`].
    pub use_lu_lambdas: Option<bool>,
    /// See [`Self::use_karras_sigmas`].
    pub use_flow_sigmas: Option<bool>,
    /// How sigmas between two timesteps are found; only `linear` is supported.
    pub interpolation_type: Option<String>,
    /// Whether the model takes sigma itself; only `discrete` is supported.
    pub timestep_type: Option<String>,
}

impl SigmaOptions {
    /// Names what is not supported.
    pub(super) fn check(&self, scheduler: &str) -> Result<()> {
        let spacings = [
            ("use_karras_sigmas", self.use_karras_sigmas),
            ("use_exponential_sigmas", self.use_exponential_sigmas),
            ("use_beta_sigmas", self.use_beta_sigmas),
            ("use_lu_lambdas", self.use_lu_lambdas),
            ("use_flow_sigmas", self.use_flow_sigmas),
        ];
        if let Some((key, _)) = spacings.iter().find(|(_, set)| *set == Some(true)) {
            return Err(Error::Unsupported(format!("scheduler {scheduler}: `{key}` is not supported")));
        }
        let choices = [
            ("interpolation_type", &self.interpolation_type, "linear"),
            ("timestep_type", &self.timestep_type, "discrete"),
        ];
        for (key, found, expected) in choices {
            if let Some(found) = found.as_deref().filter(|found| *found != expected) {
                let message = format!("scheduler {scheduler}: {key} `{found}` is not supported; expected `{expected}`");
                return Err(Error::Unsupported(message));
            }
        }
        Ok(())
    }
}

/// Sigma of every training timestep. A schedule with zero terminal signal-to-noise ratio has no finite last sigma; like
/// diffusers it takes the alpha_bar 2^-24 there.
pub(super) fn sigmas(config: &SchedulerConfig) -> Result<Vec<f64>> {
    let schedule = NoiseSchedule::new(config)?;
    let mut sigmas: Vec<f64> = schedule.alphas_cumprod().iter().map(|alpha_bar| sigma(*alpha_bar)).collect();
    if let (true, Some(last)) = (config.rescale_betas_zero_snr, sigmas.last_mut()) {
        *last = sigma(2f64.powi(-24));
    }
    match sigmas.iter().position(|sigma| !sigma.is_finite()) {
        None => Ok(sigmas),
        Some(t) => {
            Err(Error::Unsupported(format!("scheduler: alpha_bar is 0 at timestep {t}, where sigma is infinite")))
        }
    }
}

fn sigma(alpha_bar: f64) -> f64 {
    ((1. - alpha_bar) / alpha_bar).sqrt()
}

/// alpha_bar of a sigma.
pub(super) fn alpha_bar(sigma: f64) -> f64 {
    1. / (sigma * sigma + 1.)
}

/// The sigmas at `timesteps`, linear between two training timesteps, and the one that the run ends at.
pub(super) fn sigmas_at(config: &SchedulerConfig, timesteps: &[f64]) -> Result<Vec<f64>> {
    let all = sigmas(config)?;
    let at = |t: &f64| {
        let (below, share) = (t.floor(), t.fract());
        let below = (below as usize).min(all.len() - 1);
        all[below] + share * (all[(below + 1).min(all.len() - 1)] - all[below])
    };
    let last = match config.sigmas.final_sigmas_type.unwrap_or_default() {
        FinalSigma::Zero => 0.,
        FinalSigma::SigmaMin => all[0],
    };
    Ok(timesteps.iter().map(at).chain([last]).collect())
}
