use candle_core::{Device, Tensor};
use host_api::{Result, ViewMut};

use crate::candle_failed;

/// A new f32 tensor of that shape on `device`, as `write` writes it; what it does not write is 0.
pub fn fill(shape: &[usize], device: &Device, write: impl FnOnce(&mut ViewMut<'_>) -> Result<()>) -> Result<Tensor> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => crate::cuda::fill(shape, cuda, write),
        _ => {
            let mut values = vec![0f32; shape.iter().product()];
            write(&mut ViewMut::new(&mut values, shape)?)?;
            Tensor::from_vec(values, shape, device).map_err(candle_failed)
        }
    }
}
