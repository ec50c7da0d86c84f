//! Where a run starts: seeded noise, or latents from a file.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use diffusion::Checkpoint;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};

use crate::{Error, Result};

/// More than any run could hold: 4 GiB of latents.
const MOST_VALUES: usize = 1 << 30;

/// Standard normal noise `[batch, channels, height, width]` in f32. Item i is drawn from `seed + i` alone, so it is the same
/// in every batch and on every machine.
pub fn seeded_noise(seed: u64, shape: [usize; 4], device: &Device) -> Result<Tensor> {
    let [batch, channels, height, width] = shape;
    let count = shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
    if count.is_none_or(|count| count > MOST_VALUES) {
        return Err(Error::Request(format!("latents of shape {shape:?} are more than {MOST_VALUES} values")));
    }
    let item = |i: usize| {
        let rng = ChaCha8Rng::seed_from_u64(seed.wrapping_add(i as u64));
        StandardNormal.sample_iter(rng).take(channels * height * width)
    };
    let values: Vec<f32> = (0..batch).flat_map(item).collect();
    Ok(Tensor::from_vec(values, &shape, device)?)
}

/// The tensor `latents`, or the only one, of a file of weights: `[batch, channels, h, w]` at the first timestep's noise.
pub fn latents_from_file(path: &Path, channels: usize, device: &Device) -> Result<Tensor> {
    let file = Checkpoint::open(path, DType::F32, device)?;
    let names = file.names();
    let name = match &names[..] {
        [only] => only,
        _ if names.iter().any(|name| name == "latents") => "latents",
        _ => return Err(Error::file(path, format!("expected a tensor `latents`, found {names:?}"))),
    };
    let shape = file.root().shape(name).unwrap_or_default();
    match &shape[..] {
        [batch, c, h, w] if *c == channels && *batch > 0 && *h > 0 && *w > 0 => Ok(file.root().tensor(name, &shape)?),
        found => {
            Err(Error::file(path, format!("`{name}` has shape {found:?}, expected [batch, {channels}, height, width]")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_item_depends_on_its_own_seed_alone() {
        let noise = |seed, batch| seeded_noise(seed, [batch, 4, 6, 5], &Device::Cpu).unwrap();
        let item = |t: &Tensor, i: usize| t.get(i).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(item(&noise(7, 3), 2), item(&noise(9, 1), 0));
        let message = seeded_noise(0, [1, 4, usize::MAX, 2], &Device::Cpu).unwrap_err().to_string();
        assert!(message.contains("more than"), "{message}");
        assert_ne!(item(&noise(7, 2), 0), item(&noise(7, 2), 1));
        let values: Vec<f32> = noise(1, 100).flatten_all().unwrap().to_vec1().unwrap();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / values.len() as f32;
        assert!(mean.abs() < 0.03 && (variance - 1.).abs() < 0.04, "mean {mean}, variance {variance}");
    }
}
