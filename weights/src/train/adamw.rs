use std::collections::BTreeMap;

use candle_core::{Tensor, Var};

use crate::{Error, Result};

/// Constants of [`AdamW`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWSettings {
    /// Decay of the mean gradient.
    pub beta1: f64,
    /// Decay of the mean squared gradient.
    pub beta2: f64,
    /// Keeps the quotient finite.
    pub eps: f64,
    /// Share of a parameter that is taken away at each step, times the learning rate.
    pub weight_decay: f64,
}

impl AdamWSettings {
    /// The paper's.
    pub const DEFAULT: Self = Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 1e-2 };
}

/// What [`AdamW`] remembers of a parameter.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Steps in which it had a gradient.
    pub steps: u64,
    /// Mean gradient.
    pub mean: Tensor,
    /// Mean squared gradient.
    pub square: Tensor,
}

/// Adam with decoupled weight decay (arXiv 1711.05101, Algorithm 2), as PyTorch's, with a state that can be saved.
pub struct AdamW {
    settings: AdamWSettings,
    moments: BTreeMap<String, Moments>,
}

impl AdamW {
    /// Before the first step, or after those that left these moments.
    pub fn new(settings: AdamWSettings, moments: BTreeMap<String, Moments>) -> Self {
        Self { settings, moments }
    }

    /// By parameter.
    pub fn moments(&self) -> &BTreeMap<String, Moments> {
        &self.moments
    }

    /// One step. A parameter without a gradient stays as it is.
    pub fn step(
        &mut self,
        parameters: &BTreeMap<String, Var>,
        gradients: &BTreeMap<String, Tensor>,
        learning_rate: f64,
    ) -> Result<()> {
        let AdamWSettings { beta1, beta2, eps, weight_decay } = self.settings;
        for (name, gradient) in gradients {
            let parameter = parameters
                .get(name)
                .ok_or_else(|| Error::Request(format!("a gradient for `{name}`, which is no parameter")))?;
            let Moments { steps, mean, square } = match self.moments.remove(name) {
                Some(moments) => moments,
                None => Moments { steps: 0, mean: gradient.zeros_like()?, square: gradient.zeros_like()? },
            };
            let steps = steps + 1;
            let correction = |beta: f64| 1. - beta.powf(steps as f64);
            let mean = ((mean * beta1)? + (gradient * (1. - beta1))?)?;
            let square = ((square * beta2)? + (gradient.sqr()? * (1. - beta2))?)?;
            let deviation = ((&square / correction(beta2))?.sqrt()? + eps)?;
            let change = ((&mean * (learning_rate / correction(beta1)))? / deviation)?;
            let kept = (parameter.as_detached_tensor() * (1. - learning_rate * weight_decay))?;
            parameter.set(&(kept - change)?)?;
            self.moments.insert(name.clone(), Moments { steps, mean, square });
        }
        Ok(())
    }
}

/// Joint norm of gradients.
pub fn norm_of<'a>(gradients: impl Iterator<Item = &'a Tensor>) -> Result<f64> {
    let mut square = 0.;
    for gradient in gradients {
        square += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
    }
    Ok(square.sqrt())
}

/// Scales the gradients so that their joint norm is at most `limit`; returns the norm that they had.
pub fn clip_norm(gradients: &mut BTreeMap<String, Tensor>, limit: f64) -> Result<f64> {
    let norm = norm_of(gradients.values())?;
    if norm > limit {
        for gradient in gradients.values_mut() {
            *gradient = (&*gradient * (limit / norm))?;
        }
    }
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// Three steps on one parameter, by `torch.optim.AdamW([2., -1.], lr=0.1, weight_decay=0.01)` with these gradients.
    #[test]
    fn as_in_pytorch() {
        let parameter = Var::new(&[2f32, -1.], &Device::Cpu).unwrap();
        let parameters = BTreeMap::from([("w".to_owned(), parameter.clone())]);
        let mut optimiser = AdamW::new(AdamWSettings::DEFAULT, BTreeMap::new());
        for gradient in [[0.5f32, -2.], [0.1, 1.], [-0.3, 0.2]] {
            let gradients = BTreeMap::from([("w".to_owned(), Tensor::new(&gradient, &Device::Cpu).unwrap())]);
            optimiser.step(&parameters, &gradients, 0.1).unwrap();
        }
        let found = parameter.to_vec1::<f32>().unwrap();
        let expected = ADAMW;
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?} is not {expected:?}");
    }

    const ADAMW: [f32; 2] = [1.792_910_8, -0.855_786];

    /// A parameter whose first gradient comes late begins as all do: by about the learning rate.
    #[test]
    fn a_late_first_gradient_is_a_first_one() {
        let parameter = || Var::new(&[2f32], &Device::Cpu).unwrap();
        let parameters = BTreeMap::from([("early".to_owned(), parameter()), ("late".to_owned(), parameter())]);
        let gradient = |name: &str| (name.to_owned(), Tensor::new(&[0.5f32], &Device::Cpu).unwrap());
        let mut optimiser = AdamW::new(AdamWSettings::DEFAULT, BTreeMap::new());
        for _ in 0..100 {
            optimiser.step(&parameters, &BTreeMap::from([gradient("early")]), 1e-4).unwrap();
        }
        let before = parameters["late"].to_vec1::<f32>().unwrap()[0];
        optimiser.step(&parameters, &BTreeMap::from([gradient("late")]), 0.1).unwrap();
        let moved = before - parameters["late"].to_vec1::<f32>().unwrap()[0];
        assert!((moved - 0.102).abs() < 1e-4, "moved by {moved}");
    }

    #[test]
    fn clipping_keeps_directions_and_small_gradients() {
        let gradients = |scale: f32| {
            let tensor = |values: &[f32]| (Tensor::new(values, &Device::Cpu).unwrap() * f64::from(scale)).unwrap();
            BTreeMap::from([("a".to_owned(), tensor(&[3.])), ("b".to_owned(), tensor(&[0., 4.]))])
        };
        let mut large = gradients(1.);
        assert_eq!(clip_norm(&mut large, 1.).unwrap(), 5.);
        assert_eq!(large["b"].to_vec1::<f32>().unwrap(), [0., 0.8]);
        let mut small = gradients(0.1);
        clip_norm(&mut small, 1.).unwrap();
        assert_eq!(small["b"].to_vec1::<f32>().unwrap(), gradients(0.1)["b"].to_vec1::<f32>().unwrap());
    }
}
