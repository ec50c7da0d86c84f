//! Where the steps of a run lie among the training timesteps.

use crate::{Error, Result};

/// The spacings of arXiv 2305.08891, Table 2, with diffusers' rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spacing {
    /// Multiples of `T / steps` (whole division) from 0 up, plus the offset.
    Leading,
    /// Multiples of `T / steps` from T down, minus one: starts at the last timestep.
    Trailing,
    /// From 0 to T - 1, both ends included.
    Linspace,
}

impl Spacing {
    /// `steps` timesteps out of `total`, the noisiest first. `offset` is added to leading ones.
    ///
    /// Fails unless `steps` is 1 to `total`, and when the offset moves a timestep past the last.
    pub fn timesteps(self, total: usize, steps: usize, offset: usize) -> Result<Vec<usize>> {
        if steps == 0 || steps > total {
            let message = format!("scheduler: {steps} steps; expected 1 to {total}, the number of training timesteps");
            return Err(Error::Input(message));
        }
        // numpy rounds halves to even.
        let round = |t: f64| t.round_ties_even() as usize;
        let timesteps: Vec<usize> = match self {
            Self::Leading => (0..steps).rev().map(|i| i * (total / steps) + offset).collect(),
            Self::Trailing => {
                // numpy's arange takes its step from its first two values; halves fall to a side by its rounding.
                let start = total as f64;
                let step = (start - start / steps as f64) - start;
                (0..steps).map(|i| round(start + i as f64 * step) - 1).collect()
            }
            Self::Linspace => {
                let ratio = (total - 1) as f64 / (steps.max(2) - 1) as f64;
                (0..steps).rev().map(|i| round(i as f64 * ratio)).collect()
            }
        };
        match timesteps.first() {
            Some(&first) if first >= total => Err(Error::Input(format!(
                "scheduler: {steps} steps with steps_offset {offset} start at timestep {first}; the last is {}",
                total - 1
            ))),
            _ => Ok(timesteps),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Expected values: numpy's expressions in diffusers' DDIMScheduler.set_timesteps, worked by hand.

    #[test]
    fn leading() {
        let leading = |steps, offset| Spacing::Leading.timesteps(1000, steps, offset).unwrap();
        assert_eq!(leading(4, 1), [751, 501, 251, 1]);
        assert_eq!(leading(3, 0), [666, 333, 0]);
        assert_eq!(leading(1, 1), [1]);
        assert_eq!(leading(1000, 0).first(), Some(&999));
    }

    #[test]
    fn trailing() {
        let trailing = |steps| Spacing::Trailing.timesteps(1000, steps, 1).unwrap();
        assert_eq!(trailing(4), [999, 749, 499, 249]);
        assert_eq!(trailing(3), [999, 666, 332]);
        // Multiples of 62.5: 937.5 rounds to 938, 812.5 to 812.
        assert_eq!(trailing(16)[..4], [999, 937, 874, 811]);
        // Multiples of 20.8333: the step that numpy recovers is a little longer, so 937.5 becomes 937.4999 and 937.
        assert_eq!(trailing(48)[..4], [999, 978, 957, 936]);
        assert_eq!(trailing(1), [999]);
        assert_eq!(trailing(1000).last(), Some(&0));
    }

    #[test]
    fn linspace() {
        let linspace = |steps| Spacing::Linspace.timesteps(1000, steps, 1).unwrap();
        assert_eq!(linspace(4), [999, 666, 333, 0]);
        // Multiples of 499.5: the middle one rounds to even.
        assert_eq!(linspace(3), [999, 500, 0]);
        assert_eq!(linspace(1), [0]);
    }

    #[test]
    fn the_number_of_steps_is_checked() {
        for spacing in [Spacing::Leading, Spacing::Trailing, Spacing::Linspace] {
            for steps in [0, 1001] {
                let message = spacing.timesteps(1000, steps, 1).unwrap_err().to_string();
                assert!(message.contains(&format!("{steps} steps")) && message.contains("1 to 1000"), "{message}");
            }
            for steps in 1..1000 {
                let timesteps = spacing.timesteps(1000, steps, 1).unwrap();
                assert_eq!(timesteps.len(), steps);
                assert!(timesteps.windows(2).all(|pair| pair[0] > pair[1]) && timesteps[0] < 1000, "{timesteps:?}");
            }
        }
    }

    #[test]
    fn an_offset_past_the_end_is_refused() {
        let message = Spacing::Leading.timesteps(1000, 1000, 1).unwrap_err().to_string();
        assert!(message.contains("timestep 1000") && message.contains("steps_offset 1"), "{message}");
    }
}
