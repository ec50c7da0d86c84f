use candle_core::Tensor;
use host_api::{Error, Memory, Result, ViewMut};

use crate::{candle_failed, dtype, lend};

/// Writes a tensor, rounded to the view's dtype, to a view of its shape. From one CUDA device to another is an error.
pub fn write(tensor: &Tensor, to: &mut ViewMut<'_>) -> Result<()> {
    if tensor.dims() != to.shape() {
        let message = format!("a tensor of shape {:?} for a view of {:?}", tensor.dims(), to.shape());
        return Err(Error::shape_mismatch(message));
    }
    let tensor = lend(&tensor.to_dtype(dtype(to.dtype())).map_err(candle_failed)?)?;
    let from = tensor.view();
    match (from.memory(), to.memory()) {
        (Memory::Main, Memory::Main) => to.copy_from(&from),
        _ => crate::device_memory().expect("a view on a device").copy(&from, to)?,
    }
    Ok(())
}
