//! Alphas in a layout that has no name for them.
//!
//! A LoRA's product is scaled by alpha / rank. The release's names have no alpha: a scale is folded into the up factor, where that
//! changes no bit of what it means. PEFT may keep alpha in the file's header, which other layouts know nothing of. A note in the
//! header of the file that is written tells how to come back.

use std::borrow::Cow;
use std::collections::BTreeMap;

use diffusion::RawTensor;
use half::{bf16, f16};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

/// The header entry that holds the notes.
pub(crate) const NOTES: &str = "dpt_lora_alpha";

/// An alpha that a file had no tensor for, or has none for now, and what it was folded with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Note {
    /// Its value; every f16, bf16 and f32 is one of these.
    pub(crate) value: f64,
    /// `F32`, `F16` or `BF16`.
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    /// What the up factor was multiplied by.
    pub(crate) factor: f64,
    /// Whether it was PEFT's header that said it, and no tensor.
    #[serde(default)]
    pub(crate) from_header: bool,
}

/// Notes by module path.
pub(crate) type Notes = BTreeMap<String, Note>;

/// The number in an alpha tensor.
pub(crate) fn read(alpha: &RawTensor) -> Result<f64, String> {
    match &numbers(alpha)?[..] {
        [value] if value.is_finite() => Ok(*value),
        other => Err(format!("alpha is {other:?}, expected one finite number")),
    }
}

/// A tensor of that number.
pub(crate) fn tensor(note: &Note) -> Result<RawTensor<'static>, String> {
    let dtype = match note.dtype.as_str() {
        "F32" => Dtype::F32,
        "F16" => Dtype::F16,
        "BF16" => Dtype::BF16,
        other => return Err(format!("alpha of type {other}, expected F32, F16 or BF16")),
    };
    Ok(RawTensor { dtype, shape: note.shape.clone(), data: Cow::Owned(bytes(dtype, &[note.value])?) })
}

/// The tensor times a power of two. Fails when a value would not come back from it bit for bit.
pub(crate) fn scaled<'a>(tensor: &RawTensor<'_>, factor: f64) -> Result<RawTensor<'a>, String> {
    let values = numbers(tensor)?;
    let product: Vec<f64> = values.iter().map(|value| value * factor).collect();
    let data = bytes(tensor.dtype, &product)?;
    let scaled = RawTensor { dtype: tensor.dtype, shape: tensor.shape.clone(), data: Cow::Owned(data) };
    let back: Vec<f64> = numbers(&scaled)?.iter().map(|value| value / factor).collect();
    if bytes(tensor.dtype, &back)? != tensor.data[..] {
        return Err(format!("a factor of {factor} does not fit {:?} numbers", tensor.dtype));
    }
    Ok(scaled)
}

/// Whether every product with it is exact, as long as it stays in range.
pub(crate) fn is_power_of_two(factor: f64) -> bool {
    factor.is_normal() && factor > 0. && factor.log2().fract() == 0.
}

fn numbers(tensor: &RawTensor) -> Result<Vec<f64>, String> {
    let pairs = || tensor.data.chunks_exact(2).map(|b| [b[0], b[1]]);
    match tensor.dtype {
        Dtype::F32 => {
            Ok(tensor.data.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect())
        }
        Dtype::F16 => Ok(pairs().map(|b| f16::from_le_bytes(b).to_f64()).collect()),
        Dtype::BF16 => Ok(pairs().map(|b| bf16::from_le_bytes(b).to_f64()).collect()),
        other => Err(format!("numbers of type {other:?}, expected F32, F16 or BF16")),
    }
}

fn bytes(dtype: Dtype, values: &[f64]) -> Result<Vec<u8>, String> {
    match dtype {
        Dtype::F32 => Ok(values.iter().flat_map(|value| (*value as f32).to_le_bytes()).collect()),
        Dtype::F16 => Ok(values.iter().flat_map(|value| f16::from_f64(*value).to_le_bytes()).collect()),
        Dtype::BF16 => Ok(values.iter().flat_map(|value| bf16::from_f64(*value).to_le_bytes()).collect()),
        other => Err(format!("numbers of type {other:?}, expected F32, F16 or BF16")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn halves(values: &[f32]) -> RawTensor<'static> {
        let data = values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect();
        RawTensor { dtype: Dtype::F16, shape: vec![values.len()], data: Cow::Owned(data) }
    }

    #[test]
    fn a_power_of_two_goes_in_and_out() {
        let tensor = halves(&[1., -0.3, 0., 1000.]);
        let folded = scaled(&tensor, 4.).unwrap();
        assert_eq!(numbers(&folded).unwrap()[..2], [4., 4. * f16::from_f32(-0.3).to_f64()]);
        assert_eq!(scaled(&folded, 0.25).unwrap().data, tensor.data);
        assert!([0.5, 1., 8.].into_iter().all(is_power_of_two));
        assert!([3., 0., -2., f64::INFINITY].into_iter().all(|factor| !is_power_of_two(factor)));
    }

    #[test]
    fn what_would_be_lost_is_refused() {
        assert!(scaled(&halves(&[60000.]), 4.).unwrap_err().contains("does not fit F16"));
        // The smallest number of all.
        assert!(scaled(&halves(&[6e-8]), 0.5).unwrap_err().contains("does not fit F16"));
        let integers = RawTensor { dtype: Dtype::I32, shape: vec![1], data: Cow::Owned(vec![0; 4]) };
        assert!(read(&integers).unwrap_err().contains("I32"));
    }
}
