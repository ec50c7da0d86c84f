//! The text encoder against transformers' CLIPTextModel, in both naming generations and with both activations.

use candle_core::{DType, Tensor};
use diffusion::text::TextEncoder;
use tests::{FAMILIES, assert_close, case, device, parity, relative_error};

fn rows(ids: &Tensor) -> Vec<Vec<u32>> {
    ids.to_dtype(DType::U32).unwrap().to_vec2().unwrap()
}

#[test]
fn parity_hidden_states_and_pooled_embedding() {
    for family in FAMILIES {
        let folder = parity(&format!("{family}-tiny/text_encoder"));
        let encoder = TextEncoder::load(&folder, DType::F32, device()).unwrap();
        let case = case(&format!("{family}-cases/text.safetensors"));
        let (_, positions, width) = case["hidden"].dims3().unwrap();
        assert_eq!((encoder.max_positions(), encoder.hidden_size()), (positions, width));

        let found = encoder.encode(&rows(&case["ids"])).unwrap();
        assert_close(&format!("{family} hidden"), &found.hidden, &case["hidden"], 1e-4);
        assert_close(&format!("{family} pooled"), &found.pooled, &case["pooled"], 1e-4);
    }
}

#[test]
fn parity_holds_in_f64_and_nearly_in_half_precision() {
    for family in FAMILIES {
        let folder = parity(&format!("{family}-tiny/text_encoder"));
        let case = case(&format!("{family}-cases/text.safetensors"));
        let ids = rows(&case["ids"]);
        for (dtype, tolerance) in [(DType::F64, 1e-4), (DType::F16, 5e-3)] {
            let found = TextEncoder::load(&folder, dtype, device()).unwrap().encode(&ids).unwrap();
            assert_eq!(found.hidden.dtype(), dtype);
            assert_close(&format!("{family} hidden in {dtype:?}"), &found.hidden, &case["hidden"], tolerance);
            assert_close(&format!("{family} pooled in {dtype:?}"), &found.pooled, &case["pooled"], tolerance);
        }
    }
}

#[test]
fn parity_does_not_depend_on_the_batch() {
    let encoder = TextEncoder::load(&parity("sd1-tiny/text_encoder"), DType::F32, device()).unwrap();
    let case = case("sd1-cases/text.safetensors");
    for (i, ids) in rows(&case["ids"]).into_iter().enumerate() {
        let found = encoder.encode(&[ids]).unwrap();
        let expected = case["pooled"].narrow(0, i, 1).unwrap();
        assert_close(&format!("prompt {i} alone"), &found.pooled, &expected, 1e-4);
        let other = case["pooled"].narrow(0, (i + 1) % case["pooled"].dim(0).unwrap(), 1).unwrap();
        assert!(relative_error(&found.pooled, &other) > 1e-2, "prompts {i} and the next are told apart");
    }
}
