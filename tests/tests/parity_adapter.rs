//! The adapter's queries, heads, score and feature gradient against PyTorch, from both containers of the released layout.

use candle_core::{D, DType, IndexOp};
use dpt_plugin::{Adapter, SizeHints, score, score_and_gradient};
use tests::{FAMILIES, assert_close, case, device, parity};

const TAPS: [&str; 2] = ["mid", "up1"];

fn hints(tap: &str) -> SizeHints {
    SizeHints { tap: Some(tap.into()), heads: Some(4), matching_queries: Some(5) }
}

#[test]
fn parity_adapter_from_both_containers_of_the_released_checkpoint() {
    for (family, tap) in FAMILIES.iter().flat_map(|family| TAPS.map(|tap| (family, tap))) {
        let case = case(&format!("{family}-cases/adapter_{tap}.safetensors"));
        let timesteps: Vec<f64> = case["timesteps"].to_dtype(DType::F64).unwrap().to_vec1().unwrap();
        for container in ["safetensors", "bin"] {
            let file = parity(&format!("{family}-cases/release_{tap}.{container}"));
            let adapter = Adapter::open(&file, hints(tap), device()).unwrap();
            let close = |what: &str, found: &candle_core::Tensor, tolerance| {
                assert_close(&format!("{family} {tap} {container} {what}"), found, &case[what], tolerance);
            };
            assert_eq!((adapter.sizes().matching_queries, adapter.sizes().grounding_queries), (5, 7));

            let queries = adapter.queries(&case["feature"], &timesteps).unwrap();
            close("queries", &queries, 1e-4);
            let queries = queries.i(0).unwrap();
            close("matching", &adapter.matching(&queries).unwrap(), 1e-4);
            let grounding = adapter.grounding(&queries).unwrap();
            close("class_logits", &grounding.class_logits, 1e-4);
            close("boxes", &grounding.boxes, 1e-4);
            assert!(grounding.semantic.is_none());

            let sinusoids = adapter.sinusoids(&timesteps).unwrap();
            close("score", &score(&adapter, &case["feature"], &sinusoids, &case["pooled"]).unwrap(), 1e-4);
            let (scores, gradient) =
                score_and_gradient(&adapter, &case["feature"], &sinusoids, &case["pooled"]).unwrap();
            close("score", &scores, 1e-4);
            close("feature_grad", &gradient, 1e-4);
        }
    }
}

/// The shipped adapter tells its sizes itself and has the paper's semantic head.
#[test]
fn the_shipped_adapter_describes_itself() {
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../weights/shapes/adapter_stage1.safetensors");
    let adapter = Adapter::open(&file, SizeHints::default(), device()).unwrap();
    let sizes = adapter.sizes();
    assert_eq!((sizes.tap.as_str(), sizes.d_model, sizes.heads), ("mid", 128, 8));
    assert_eq!((sizes.matching_queries, sizes.grounding_queries, sizes.classes), (8, 12, 1));
    let features = candle_core::Tensor::randn(0f32, 1., (1, 128, 8, 8), device()).unwrap();
    let grounding = adapter.grounding(&adapter.queries(&features, &[500.]).unwrap().i(0).unwrap()).unwrap();
    assert_eq!(grounding.semantic.unwrap().dims(), [1, 12, 128]);
    let range = |t: &candle_core::Tensor| (t.min(D::Minus1).unwrap(), t.max(D::Minus1).unwrap());
    let (low, high) = range(&grounding.boxes.flatten_all().unwrap());
    assert!(low.to_scalar::<f32>().unwrap() > 0. && high.to_scalar::<f32>().unwrap() < 1.);
}

/// What the file does not say must be configured, and the error says which.
#[test]
fn missing_sizes_are_named() {
    let file = parity("sd1-cases/release_mid.safetensors");
    let failure = |hints| Adapter::open(&file, hints, device()).err().expect("must fail").to_string();
    assert!(failure(SizeHints { tap: None, ..hints("mid") }).contains("`tap`"));
    assert!(failure(SizeHints { heads: None, ..hints("mid") }).contains("`heads`"));
    assert!(failure(SizeHints { matching_queries: None, ..hints("mid") }).contains("`matching_queries`"));
    let message = failure(SizeHints { heads: Some(3), ..hints("mid") });
    assert!(message.contains("32") && message.contains("3 heads"), "{message}");
    let message = failure(SizeHints { matching_queries: Some(13), ..hints("mid") });
    assert!(message.contains("13 matching queries of 12"), "{message}");
}
