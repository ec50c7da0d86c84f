use std::f64::consts::PI;

/// What becomes of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Decay {
    /// Stays.
    Constant,
    /// Half a cosine, to 0 at the last step.
    Cosine,
}

/// The learning rate of every step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRate {
    /// The highest.
    pub peak: f64,
    /// Steps over which it rises in a line from 0.
    pub warmup: u64,
    /// What follows.
    pub decay: Decay,
}

impl LearningRate {
    /// At a step, counted from 0, of `steps`.
    pub fn at(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        match self.decay {
            Decay::Constant => self.peak,
            Decay::Cosine => {
                let rest = steps.saturating_sub(self.warmup).max(1) as f64;
                let share = ((step - self.warmup) as f64 / rest).min(1.);
                self.peak * 0.5 * (1. + (PI * share).cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_and_falls() {
        let rate = LearningRate { peak: 2., warmup: 4, decay: Decay::Cosine };
        assert_eq!([0, 1, 3, 4].map(|step| rate.at(step, 12)), [0.5, 1., 2., 2.]);
        assert!((rate.at(8, 12) - 1.).abs() < 1e-12 && rate.at(12, 12) < 1e-12);
        let constant = LearningRate { warmup: 0, decay: Decay::Constant, ..rate };
        assert_eq!([0, 7, 100].map(|step| constant.at(step, 12)), [2.; 3]);
    }
}
