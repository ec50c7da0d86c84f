//! `scheduler_config.json`.

use std::path::Path;

use serde::Deserialize;

use super::{DpmSolverOptions, Prediction, Scheduler, SigmaOptions, Spacing};
use crate::{Error, Result};

/// More training timesteps than any model has; a longer schedule in a file is a mistake or an attack.
const MOST_TIMESTEPS: usize = 100_000;

/// What a diffusers scheduler configuration says, whichever scheduler class wrote it.
#[derive(Clone, Debug, PartialEq)]
pub struct SchedulerConfig {
    /// T: the model was trained at timesteps 0 to T - 1.
    pub num_train_timesteps: usize,
    /// How much noise each training timestep adds.
    pub betas: Betas,
    /// Whether to shift the schedule so that its last timestep is pure noise (arXiv 2305.08891, Algorithm 1).
    pub rescale_betas_zero_snr: bool,
    /// What the U-Net predicts.
    pub prediction: Prediction,
    /// Where the steps lie among the timesteps; each sampler has its own default.
    pub spacing: Option<Spacing>,
    /// Added to every timestep of leading spacing.
    pub steps_offset: usize,
    /// Whether the last step ends at alpha_bar 1 rather than at timestep 0's; each sampler has its own default.
    pub set_alpha_to_one: Option<bool>,
    /// Bound that the predicted z_0 is clipped to, symmetric about 0. Models of latents do not clip.
    pub clip: Option<f64>,
    /// The algorithm of the class that wrote the file, where it is one of those implemented.
    pub scheduler: Option<Scheduler>,
    /// Whether PNDM leaves its Runge-Kutta steps out, as Stable Diffusion's does; it must.
    pub skip_prk_steps: Option<bool>,
    /// For samplers in sigma.
    pub sigmas: SigmaOptions,
    /// For DPM-Solver.
    pub dpm_solver: DpmSolverOptions,
}

/// The noise that each training timestep adds: `z_t = sqrt(1 - beta_t) z_{t-1} + sqrt(beta_t) noise`.
#[derive(Clone, Debug, PartialEq)]
pub enum Betas {
    /// Evenly spaced from start to end.
    Linear {
        /// beta of timestep 0.
        start: f64,
        /// beta of the last timestep.
        end: f64,
    },
    /// Their square roots evenly spaced; Stable Diffusion's schedule.
    ScaledLinear {
        /// beta of timestep 0.
        start: f64,
        /// beta of the last timestep.
        end: f64,
    },
    /// alpha_bar falls as a squared cosine, betas capped at 0.999 (Glide).
    SquaredCosine,
    /// Given one by one.
    Trained(Vec<f32>),
}

impl SchedulerConfig {
    /// What Stable Diffusion 1.x and 2.x were trained with: 1000 timesteps of the scaled linear schedule, predicting the noise.
    pub fn stable_diffusion() -> Self {
        Self {
            num_train_timesteps: 1000,
            betas: Betas::ScaledLinear { start: 0.00085, end: 0.012 },
            rescale_betas_zero_snr: false,
            prediction: Prediction::Epsilon,
            spacing: None,
            steps_offset: 1,
            set_alpha_to_one: Some(false),
            clip: None,
            scheduler: None,
            skip_prk_steps: None,
            sigmas: SigmaOptions::default(),
            dpm_solver: DpmSolverOptions::default(),
        }
    }

    /// Reads `scheduler_config.json` in a `scheduler` folder.
    ///
    /// An absent `clip_sample` or `steps_offset` takes the value that diffusers' Stable Diffusion pipeline sets (false and
    /// 1); values in the file are respected. Fails on an unknown schedule, spacing or prediction, on thresholding, and
    /// without betas (flow-matching schedulers have none).
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("scheduler_config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        // Python writes a bound that is not there as an infinity, which JSON does not have.
        let text = text.replace(": -Infinity", ": null").replace(": Infinity", ": null");
        let file: File = serde_json::from_str(&text).map_err(|e| Error::file(&path, e))?;
        let unsupported = |what: String| Error::Unsupported(format!("{}: {what}", path.display()));
        let needs = |name: &str| Error::file(&path, format!("`{name}` is missing, and so is `trained_betas`"));

        if file.thresholding {
            return Err(unsupported("`thresholding` is not supported; it suits pixels, not latents".to_owned()));
        }
        let betas = match (file.trained_betas, file.beta_schedule.as_deref()) {
            (Some(betas), _) => Betas::Trained(betas),
            (None, Some("squaredcos_cap_v2")) => Betas::SquaredCosine,
            (None, Some(name @ ("linear" | "scaled_linear"))) => {
                let start = file.beta_start.ok_or_else(|| needs("beta_start"))?;
                let end = file.beta_end.ok_or_else(|| needs("beta_end"))?;
                if name == "linear" { Betas::Linear { start, end } } else { Betas::ScaledLinear { start, end } }
            }
            (None, Some(other)) => {
                let expected = "expected `linear`, `scaled_linear` or `squaredcos_cap_v2`";
                return Err(unsupported(format!("beta_schedule `{other}` is not supported; {expected}")));
            }
            (None, None) => return Err(needs("beta_schedule")),
        };
        let prediction = match file.prediction_type.as_deref() {
            None | Some("epsilon") => Prediction::Epsilon,
            Some("v_prediction") => Prediction::Velocity,
            Some(other) => {
                let expected = "expected `epsilon` or `v_prediction`";
                return Err(unsupported(format!("prediction_type `{other}` is not supported; {expected}")));
            }
        };
        let spacing = match file.timestep_spacing.as_deref() {
            None => None,
            Some("leading") => Some(Spacing::Leading),
            Some("trailing") => Some(Spacing::Trailing),
            Some("linspace") => Some(Spacing::Linspace),
            Some(other) => {
                let expected = "expected `leading`, `trailing` or `linspace`";
                return Err(unsupported(format!("timestep_spacing `{other}` is not supported; {expected}")));
            }
        };
        let config = Self {
            num_train_timesteps: file.num_train_timesteps,
            betas,
            rescale_betas_zero_snr: file.rescale_betas_zero_snr,
            prediction,
            spacing,
            steps_offset: file.steps_offset,
            set_alpha_to_one: file.set_alpha_to_one,
            clip: file.clip_sample.then_some(file.clip_sample_range),
            scheduler: file.class.as_deref().and_then(Scheduler::of_class),
            skip_prk_steps: file.skip_prk_steps,
            sigmas: file.sigmas,
            dpm_solver: file.dpm_solver,
        };
        config.check().map_err(|message| Error::file(&path, message))?;
        Ok(config)
    }

    /// Whether the numbers make a schedule at all.
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        let total = self.num_train_timesteps;
        if total == 0 || total > MOST_TIMESTEPS {
            return Err(format!("num_train_timesteps is {total}, expected 1 to {MOST_TIMESTEPS}"));
        }
        if self.steps_offset >= total {
            return Err(format!("steps_offset is {}, expected less than the {total} timesteps", self.steps_offset));
        }
        match &self.betas {
            Betas::Linear { start, end } | Betas::ScaledLinear { start, end } => {
                if !(0.0..=1.0).contains(start) || !(0.0..=1.0).contains(end) {
                    return Err(format!("betas run from {start} to {end}, expected values in [0, 1]"));
                }
            }
            Betas::Trained(betas) if betas.len() != total => {
                return Err(format!("{} trained_betas for {total} num_train_timesteps", betas.len()));
            }
            Betas::Trained(betas) => {
                if let Some(beta) = betas.iter().find(|beta| !(0.0..=1.0).contains(*beta)) {
                    return Err(format!("trained_betas hold {beta}, expected values in [0, 1]"));
                }
            }
            Betas::SquaredCosine => {}
        }
        match self.clip {
            Some(range) if range.is_nan() || range <= 0.0 => {
                Err(format!("clip_sample_range is {range}, expected a positive number"))
            }
            _ => Ok(()),
        }
    }
}

/// The file itself: the keys that matter here, of whichever class.
#[derive(Deserialize)]
struct File {
    num_train_timesteps: usize,
    beta_schedule: Option<String>,
    beta_start: Option<f64>,
    beta_end: Option<f64>,
    trained_betas: Option<Vec<f32>>,
    #[serde(default)]
    rescale_betas_zero_snr: bool,
    prediction_type: Option<String>,
    timestep_spacing: Option<String>,
    #[serde(default = "one")]
    steps_offset: usize,
    set_alpha_to_one: Option<bool>,
    #[serde(default)]
    clip_sample: bool,
    #[serde(default = "unit")]
    clip_sample_range: f64,
    #[serde(default)]
    thresholding: bool,
    #[serde(rename = "_class_name")]
    class: Option<String>,
    skip_prk_steps: Option<bool>,
    #[serde(flatten)]
    sigmas: SigmaOptions,
    #[serde(flatten)]
    dpm_solver: DpmSolverOptions,
}

fn one() -> usize {
    1
}
fn unit() -> f64 {
    1.0
}

#[cfg(test)]
mod tests {
    use super::super::{FinalSigma, SolverType};
    use super::*;
    use crate::testing::Folder;

    const SD: &str =
        r#""num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012"#;

    fn load(json: &str) -> Result<SchedulerConfig> {
        let folder = Folder::new();
        folder.write("scheduler_config.json", json);
        SchedulerConfig::load(folder.path())
    }

    #[test]
    fn another_classes_configuration_is_a_noise_schedule_too() {
        let config = load(&format!(r#"{{"_class_name": "PNDMScheduler", "skip_prk_steps": true, {SD}}}"#)).unwrap();
        assert_eq!(config.betas, Betas::ScaledLinear { start: 0.00085, end: 0.012 });
        assert_eq!((config.prediction, config.spacing), (Prediction::Epsilon, None));
        assert_eq!((config.steps_offset, config.set_alpha_to_one, config.clip), (1, None, None));
        assert_eq!((config.scheduler, config.skip_prk_steps), (Some(Scheduler::Pndm), Some(true)));
    }

    #[test]
    fn every_key_is_read() {
        let config = load(
            r#"{"num_train_timesteps": 2, "beta_schedule": "linear", "trained_betas": [0.1, 1.0], "steps_offset": 0,
                "rescale_betas_zero_snr": true, "prediction_type": "v_prediction", "timestep_spacing": "trailing",
                "set_alpha_to_one": false, "clip_sample": true, "clip_sample_range": 2.5, "_class_name": "HeunScheduler",
                "skip_prk_steps": false, "final_sigmas_type": "sigma_min", "use_karras_sigmas": true,
                "solver_type": "heun", "lambda_min_clipped": -Infinity, "solver_order": 3}"#,
        );
        let expected = SchedulerConfig {
            num_train_timesteps: 2,
            betas: Betas::Trained(vec![0.1, 1.0]),
            rescale_betas_zero_snr: true,
            prediction: Prediction::Velocity,
            spacing: Some(Spacing::Trailing),
            steps_offset: 0,
            set_alpha_to_one: Some(false),
            clip: Some(2.5),
            scheduler: None,
            skip_prk_steps: Some(false),
            sigmas: SigmaOptions {
                final_sigmas_type: Some(FinalSigma::SigmaMin),
                use_karras_sigmas: Some(true),
                ..SigmaOptions::default()
            },
            dpm_solver: DpmSolverOptions {
                solver_order: Some(3),
                solver_type: Some(SolverType::Heun),
                ..DpmSolverOptions::default()
            },
        };
        assert_eq!(config.unwrap(), expected);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (key, named) in [
            (r#""prediction_type": "sample""#, "prediction_type `sample`"),
            (r#""prediction_type": "flow_prediction""#, "prediction_type `flow_prediction`"),
            (r#""timestep_spacing": "middle""#, "timestep_spacing `middle`"),
            (r#""thresholding": true"#, "`thresholding`"),
        ] {
            let error = load(&format!("{{{key}, {SD}}}")).unwrap_err();
            let message = error.to_string();
            assert!(matches!(error, Error::Unsupported(_)), "{message}");
            assert!(message.contains(named) && message.contains("scheduler_config.json"), "{message}");
        }
        let message = load(r#"{"num_train_timesteps": 9, "beta_schedule": "sigmoid"}"#).unwrap_err().to_string();
        assert!(message.contains("beta_schedule `sigmoid`"), "{message}");
    }

    #[test]
    fn senseless_numbers_are_refused() {
        for (json, named) in [
            (r#"{"num_train_timesteps": 1000, "shift": 3.0}"#, "`beta_schedule` is missing"),
            (r#"{"num_train_timesteps": 10, "beta_schedule": "linear", "beta_start": 0.1}"#, "`beta_end` is missing"),
            (r#"{"beta_schedule": "linear"}"#, "`num_train_timesteps`"),
            (r#"{"num_train_timesteps": 0, "beta_schedule": "squaredcos_cap_v2"}"#, "num_train_timesteps is 0"),
            (r#"{"num_train_timesteps": 99999999999, "beta_schedule": "squaredcos_cap_v2"}"#, "is 99999999999"),
            (r#"{"num_train_timesteps": 3, "trained_betas": [0.1, 0.2]}"#, "2 trained_betas for 3"),
            (&format!(r#"{{{SD}, "steps_offset": 18446744073709551615}}"#), "steps_offset is 18446744073709551615"),
            (r#"{"num_train_timesteps": 2, "trained_betas": [0.1, 1.5]}"#, "hold 1.5"),
            (r#"{"num_train_timesteps": 2, "beta_schedule": "linear", "beta_start": -1, "beta_end": 0.1}"#, "from -1"),
            (&format!(r#"{{{SD}, "clip_sample": true, "clip_sample_range": 0}}"#), "clip_sample_range is 0"),
        ] {
            let message = load(json).unwrap_err().to_string();
            assert!(message.contains(named) && message.contains("scheduler_config.json"), "{message}");
        }
    }
}
