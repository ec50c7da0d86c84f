//! The live parameters and what they mean for a step.

use std::sync::Arc;

use host_api::plugin::{ParamKind, ParamSpec, Params};
use host_api::{Outcome, Step};

use crate::config::{Config, SCHEMA};
use crate::{Error, Result};

/// The parameters of one instance at the configuration's values; all may change during a run.
pub(crate) fn params(config: &Config) -> Result<Arc<Params>> {
    let float = |maximum: f64| ParamKind::Float { minimum: 0., maximum };
    let share = "share of the steps";
    let specs = [
        ("eta", "step size of the correction", "", float(100.), 0.5, config.eta),
        ("start", "share of the steps after which correction starts", share, float(1.), 0., config.start),
        ("end", "share of the steps after which correction ends", share, float(1.), 1., config.end),
        (
            "every",
            "correct every k-th step of that range",
            "steps",
            ParamKind::Integer { minimum: 1, maximum: 1000 },
            1.,
            f64::from(config.every),
        ),
        (
            "max_correction",
            "bound on the correction's norm; 0: none",
            "of the latents' norm",
            float(100.),
            0.,
            config.max_correction,
        ),
        (
            "monitor",
            "compute the score also in steps that are not corrected",
            "",
            ParamKind::Boolean,
            0.,
            f64::from(u8::from(config.monitor)),
        ),
    ];
    let spec = |(name, description, unit, kind, default, _): &(&str, &str, &str, ParamKind, f64, f64)| ParamSpec {
        name: (*name).into(),
        description: (*description).into(),
        unit: (*unit).into(),
        kind: kind.clone(),
        default: *default,
        live: true,
    };
    let params = Params::new(specs.iter().map(spec).collect(), SCHEMA)?;
    for (name, .., value) in specs {
        params.set_by_name(name, value).map_err(|e| Error::Config(e.message))?;
    }
    Ok(Arc::new(params))
}

/// The parameters as one step sees them.
pub(crate) struct Strength {
    pub(crate) eta: f64,
    pub(crate) bound: Option<f64>,
    pub(crate) monitor: bool,
    start: f64,
    end: f64,
    every: usize,
}

impl Strength {
    pub(crate) fn read(params: &Params) -> Result<Self> {
        let value = |name| params.get_by_name(name);
        let max_correction = value("max_correction")?;
        Ok(Self {
            eta: value("eta")?,
            bound: (max_correction > 0.).then_some(max_correction),
            monitor: value("monitor")? != 0.,
            start: value("start")?,
            end: value("end")?,
            every: value("every")? as usize,
        })
    }

    /// Whether a step is corrected, or why not. Step i of n is in the range when `start n <= i < end n`.
    pub(crate) fn outcome(&self, step: &Step) -> Outcome {
        let first = (self.start * step.count as f64).ceil() as usize;
        let index = step.index;
        if step.sub_evaluation > 0 {
            Outcome::SkippedSubEvaluation
        } else if self.eta == 0. {
            Outcome::SkippedStrength
        } else if index < first || index as f64 >= self.end * step.count as f64 {
            Outcome::SkippedRange
        } else if !(index - first).is_multiple_of(self.every) {
            Outcome::SkippedInterval
        } else {
            Outcome::Corrected
        }
    }
}

#[cfg(test)]
mod tests {
    use host_api::Space;

    use super::*;

    fn outcomes(config: &str, count: usize) -> Vec<bool> {
        let config = Config::parse(&format!(r#"{{"adapter": "a", {config}}}"#)).unwrap();
        let strength = Strength::read(&params(&config).unwrap()).unwrap();
        let step = |index| Step {
            index,
            count,
            sub_evaluation: 0,
            timestep: 1.,
            alpha_bar: 0.5,
            space: Space::Vp,
            extra_inputs: false,
            text: None,
        };
        let sub = Step { sub_evaluation: 1, ..step(0) };
        assert_eq!(strength.outcome(&sub), Outcome::SkippedSubEvaluation);
        (0..count).map(|i| strength.outcome(&step(i)) == Outcome::Corrected).collect()
    }

    #[test]
    fn range_and_interval_choose_steps() {
        let (yes, no) = (true, false);
        assert_eq!(outcomes(r#""eta": 1"#, 4), [yes; 4]);
        assert_eq!(outcomes(r#""eta": 0"#, 4), [no; 4]);
        assert_eq!(outcomes(r#""start": 0.25, "end": 0.75"#, 4), [no, yes, yes, no]);
        assert_eq!(outcomes(r#""start": 0.3"#, 4), [no, no, yes, yes]);
        assert_eq!(outcomes(r#""every": 3"#, 7), [yes, no, no, yes, no, no, yes]);
        // The interval counts from the first step of the range.
        assert_eq!(outcomes(r#""start": 0.2, "every": 2"#, 5), [no, yes, no, yes, no]);
        assert_eq!(outcomes(r#""start": 0.5, "end": 0.5"#, 4), [no; 4]);
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        for (wrong, name) in [
            (r#""eta": -0.1"#, "eta"),
            (r#""eta": 101"#, "eta"),
            (r#""start": 1.5"#, "start"),
            (r#""end": -1"#, "end"),
            (r#""every": 0"#, "every"),
            (r#""max_correction": -1"#, "max_correction"),
        ] {
            let config = Config::parse(&format!(r#"{{"adapter": "a", {wrong}}}"#)).unwrap();
            let message = params(&config).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains("not between"), "{message}");
        }
    }
}
