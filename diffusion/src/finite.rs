//! Whether numbers are numbers.

use candle_core::{CpuStorage, DType, Storage, Tensor};

/// Whether no value of a tensor is NaN or infinite: one pass over the memory of a tensor on the CPU, a reduction elsewhere.
pub(crate) fn is_finite(tensor: &Tensor) -> candle_core::Result<bool> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        drop(storage);
        return is_finite(&tensor.contiguous()?);
    };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => Ok(all(&values[start..end], |v| v.is_finite())),
        Storage::Cpu(CpuStorage::F16(values)) => Ok(all(&values[start..end], |v| v.is_finite())),
        Storage::Cpu(CpuStorage::BF16(values)) => Ok(all(&values[start..end], |v| v.is_finite())),
        Storage::Cpu(CpuStorage::F64(values)) => Ok(all(&values[start..end], |v| v.is_finite())),
        _ => {
            drop(storage);
            // 0 when every value is finite, NaN otherwise.
            Ok(!(tensor.to_dtype(DType::F32)? * 0.)?.sum_all()?.to_scalar::<f32>()?.is_nan())
        }
    }
}

/// Without leaving blocks early, so that the loop is one of vectors.
fn all<T: Copy>(values: &[T], finite: impl Fn(T) -> bool) -> bool {
    values.chunks(4096).all(|block| block.iter().fold(true, |all, value| all & finite(*value)))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn one_value_among_many_is_found() {
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
            let tensor = Tensor::ones((3, 5000), DType::F32, &Device::Cpu).unwrap();
            assert!(is_finite(&tensor.to_dtype(dtype).unwrap()).unwrap());
            for spoilt in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = vec![1f32; 15_000];
                values[14_999] = spoilt;
                let tensor = Tensor::from_vec(values, (3, 5000), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                assert!(!is_finite(&tensor).unwrap());
                // The last column alone, and all but it.
                assert!(!is_finite(&tensor.narrow(1, 4999, 1).unwrap()).unwrap());
                assert!(is_finite(&tensor.narrow(1, 0, 4999).unwrap()).unwrap());
            }
        }
    }
}
