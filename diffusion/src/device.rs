//! Devices and dtypes by the names that users write.

use candle_core::{DType, Device};

use crate::{Error, Result};

/// `cpu`, `cuda` or `cuda:N`. CUDA needs a build with the `cuda` feature.
pub fn device(name: &str) -> Result<Device> {
    match name.split_once(':').map_or((name, Ok(0)), |(kind, ordinal)| (kind, ordinal.parse())) {
        ("cpu", _) if name == "cpu" => Ok(Device::Cpu),
        ("cuda", Ok(_)) if !cfg!(feature = "cuda") => {
            Err(Error::Unsupported(format!("device `{name}`: this build has no CUDA; build with `--features cuda`")))
        }
        ("cuda", Ok(ordinal)) => Ok(Device::new_cuda(ordinal)?),
        _ => Err(Error::Input(format!("device `{name}`: expected `cpu`, `cuda` or `cuda:N`"))),
    }
}

/// `f32`, `f16` or `bf16`.
pub fn dtype(name: &str) -> Result<DType> {
    match name {
        "f32" => Ok(DType::F32),
        "f16" => Ok(DType::F16),
        "bf16" => Ok(DType::BF16),
        _ => Err(Error::Input(format!("dtype `{name}`: expected `f32`, `f16` or `bf16`"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_understood_or_refused() {
        assert!(device("cpu").unwrap().is_cpu());
        for wrong in ["", "cpu:0", "gpu", "cuda:", "cuda:x", "cuda:-1"] {
            assert!(device(wrong).unwrap_err().to_string().contains(&format!("`{wrong}`")), "{wrong}");
        }
        #[cfg(not(feature = "cuda"))]
        assert!(device("cuda:1").unwrap_err().to_string().contains("has no CUDA"));
        assert_eq!(dtype("bf16").unwrap(), DType::BF16);
        assert!(dtype("f64").unwrap_err().to_string().contains("`f64`"));
    }
}
