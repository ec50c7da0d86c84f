//! PyTorch pickles. candle's reader interprets the opcodes itself and calls nothing that the file names, but it trusts the
//! file's sizes and the number of its arguments; hence the checks around it.

mod check;

use std::collections::HashMap;
use std::panic::catch_unwind;
use std::path::Path;

use candle_core::Tensor;
use candle_core::pickle::PthTensors;

use crate::{Error, Result};

/// All tensors at the top level of a pickle in the zip format.
pub(crate) fn read(path: &Path) -> Result<HashMap<String, Tensor>> {
    let broken = |message: &str| Error::file(path, format!("not a readable PyTorch pickle of tensors: {message}"));
    // A pickle with too few arguments makes candle index past their end. Such a panic says that the file is broken, and
    // nothing outlives it: the reader and its stack are gone, and the closure borrows the path alone.
    let tensors =
        catch_unwind(|| read_trusting(path)).unwrap_or_else(|_| Err("its arguments are not a tensor's".into()));
    let tensors = tensors.map_err(|message| broken(&message))?;
    if tensors.is_empty() {
        return Err(broken("it holds no tensors at its top level"));
    }
    Ok(tensors)
}

fn read_trusting(path: &Path) -> std::result::Result<HashMap<String, Tensor>, String> {
    check::check(path)?;
    let file_size = std::fs::metadata(path).map_err(|e| e.to_string())?.len();
    let file = PthTensors::new(path, None).map_err(|e| e.to_string())?;
    let mut tensors = HashMap::new();
    for (name, info) in file.tensor_infos() {
        // candle makes room before it reads. PyTorch stores without compression, so nothing is larger than the file.
        let dims = info.layout.dims();
        let mut factors = dims.iter().map(|dim| *dim as u64);
        let bytes = factors.try_fold(info.dtype.size_in_bytes() as u64, u64::checked_mul);
        if bytes.is_none_or(|bytes| bytes > file_size) {
            return Err(format!("tensor `{name}` of shape {dims:?} in a file of {file_size} bytes"));
        }
        let tensor = file.get(name).map_err(|e| format!("tensor `{name}`: {e}"))?;
        tensors.extend(tensor.map(|tensor| (name.clone(), tensor)));
    }
    Ok(tensors)
}
