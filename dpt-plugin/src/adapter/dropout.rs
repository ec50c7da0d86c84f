use candle_core::Tensor;

use super::graph::{Graph, Value};
use super::layers::{self, Linear};
use crate::Result;

/// Dropout in training, where DETR has it: on attention weights, on what a layer adds, and within the feed-forward layers.
/// Each value is zero with a probability, and the others grow, so that their mean stays.
pub struct Dropout<'a>(Option<Dropped<'a>>);

struct Dropped<'a> {
    /// Of 65536 values of 16 bits, those that are dropped.
    dropped: u16,
    bits: &'a mut dyn FnMut() -> u64,
}

impl<'a> Dropout<'a> {
    /// At inference: nothing is dropped.
    pub fn none() -> Self {
        Self(None)
    }

    /// With a probability in [0, 1), rounded to a multiple of 2^-16, by random bits, of which each value takes 16. Panics on
    /// another probability.
    pub fn new(probability: f64, bits: &'a mut dyn FnMut() -> u64) -> Self {
        assert!((0. ..1.).contains(&probability), "a probability of {probability}");
        let dropped = (probability * f64::from(1u32 << 16)).round().min(f64::from(u16::MAX)) as u16;
        Self((dropped > 0).then_some(Dropped { dropped, bits }))
    }

    /// Whether anything is dropped.
    pub(super) fn drops(&self) -> bool {
        self.0.is_some()
    }

    pub(super) fn apply(&mut self, graph: &mut Graph, x: Value) -> Result<Value> {
        if !self.drops() {
            return Ok(x);
        }
        let mask = self.mask(x.tensor())?;
        layers::scale(graph, &x, mask)
    }

    /// `residual` plus what is left of `linear(x)`.
    pub(super) fn forward_onto<'g>(
        &mut self,
        graph: &mut Graph<'g>,
        linear: &'g Linear,
        residual: &Value,
        x: &Value,
    ) -> Result<Value> {
        if !self.drops() {
            return linear.forward_onto(graph, residual, x);
        }
        let y = linear.forward(graph, x)?;
        let y = self.apply(graph, y)?;
        layers::add(graph, residual, &y)
    }

    /// What `x` is multiplied by: zeros and factors.
    pub(super) fn mask(&mut self, x: &Tensor) -> Result<Tensor> {
        let Some(Dropped { dropped, bits }) = &mut self.0 else { return Ok(x.ones_like()?) };
        let grown = 65536. / (65536. - f32::from(*dropped));
        let mut mask = Vec::with_capacity(x.elem_count() + 3);
        while mask.len() < x.elem_count() {
            let word = bits();
            mask.extend([0, 16, 32, 48].map(|shift| if ((word >> shift) as u16) < *dropped { 0. } else { grown }));
        }
        mask.truncate(x.elem_count());
        Ok(Tensor::from_vec(mask, x.shape(), x.device())?.to_dtype(x.dtype())?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    /// A generator of well mixed bits (splitmix64).
    fn bits(mut state: u64) -> impl FnMut() -> u64 {
        move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        }
    }

    #[test]
    fn drops_its_share_and_keeps_the_mean() {
        let ones = Tensor::ones((101, 99), DType::F64, &Device::Cpu).unwrap();
        let mut bits = bits(1);
        let ones = Value::constant(ones);
        let dropped = Dropout::new(0.1, &mut bits).apply(&mut Graph::default(), ones).unwrap();
        let values: Vec<f64> = dropped.tensor().flatten_all().unwrap().to_vec1().unwrap();
        let zeros = values.iter().filter(|v| **v == 0.).count() as f64 / values.len() as f64;
        // Five deviations of a share of 0.1 among 9999.
        assert!((zeros - 0.1).abs() < 0.015, "{zeros}");
        assert!(values.iter().all(|v| *v == 0. || (v - 1. / 0.9).abs() < 1e-5));
    }

    #[test]
    fn none_leaves_everything() {
        let x = Tensor::arange(0f32, 12., &Device::Cpu).unwrap();
        let mut never = || unreachable!("no bits are needed");
        for mut dropout in [Dropout::none(), Dropout::new(0., &mut never)] {
            let kept = dropout.apply(&mut Graph::default(), Value::constant(x.clone())).unwrap();
            assert_eq!(kept.tensor().to_vec1::<f32>().unwrap(), x.to_vec1::<f32>().unwrap());
        }
    }
}
