//! The paper's losses (Eq. 3-7) against PyTorch's.

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use dpt_plugin::Grounding;
use dpt_plugin::loss::{
    GroundingLoss, GroundingWeights, Presence, PresenceLoss, generalized_iou, in_batch_loss, pair_scores,
    scores_of_texts, triplet_loss,
};
use tests::{assert_close, case};

const TOLERANCE: f64 = 1e-5;

fn inverse_tau(case: &HashMap<String, Tensor>) -> Tensor {
    case["tau"].recip().unwrap()
}

#[test]
fn matching() {
    let case = case("losses.safetensors");
    let scores = scores_of_texts(&case["matching"], &case["text"]).unwrap();
    assert_close("scores", &scores, &case["scores"], TOLERANCE);
    let (t2i, i2t) = in_batch_loss(&scores, &inverse_tau(&case)).unwrap();
    assert_close("text to image", &t2i, &case["t2i"], TOLERANCE);
    assert_close("image to text", &i2t, &case["i2t"], TOLERANCE);
    let own = pair_scores(&case["matching"], &case["text"]).unwrap();
    let diagonal = Tensor::stack(&(0..4).map(|i| scores.get(i).unwrap().get(i).unwrap()).collect::<Vec<_>>(), 0);
    assert_close("pairs", &own, &diagonal.unwrap(), TOLERANCE);
}

/// With every other item as a negative the two contrasts are one.
#[test]
fn triplets_over_a_whole_batch_are_the_contrast_within_it() {
    let case = case("losses.safetensors");
    let (scores, scale) = (&case["scores"], inverse_tau(&case));
    let rows = scores.to_vec2::<f32>().unwrap();
    let others = |pick: &dyn Fn(usize, usize) -> f32| {
        let values: Vec<f32> = (0..4).flat_map(|i| (0..4).filter(move |j| *j != i).map(move |j| pick(i, j))).collect();
        Tensor::from_vec(values, (4, 3), scores.device()).unwrap()
    };
    let positive = Tensor::new((0..4).map(|i| rows[i][i]).collect::<Vec<_>>(), scores.device()).unwrap();
    let (images, texts) = (others(&|i, j| rows[j][i]), others(&|i, j| rows[i][j]));
    let (t2i, i2t) = triplet_loss(&positive, &images, &texts, &scale).unwrap();
    assert_close("text to image", &t2i, &case["t2i"], TOLERANCE);
    assert_close("image to text", &i2t, &case["i2t"], TOLERANCE);
}

#[test]
fn grounding() {
    let case = case("losses.safetensors");
    let truth = case["truth"].unsqueeze(1).unwrap().broadcast_as(case["boxes"].shape()).unwrap();
    let giou = generalized_iou(&case["boxes"], &truth).unwrap().affine(-1., 1.).unwrap();
    assert_close("generalised IoU", &giou, &case["giou"], TOLERANCE);

    let lambdas: [f32; 4] = case["lambdas"].to_vec1::<f32>().unwrap().try_into().unwrap();
    let loss = GroundingLoss {
        weights: GroundingWeights { loss: lambdas.map(f64::from), cost: [1.; 3] },
        presence: PresenceLoss::Paper,
        temperature: f64::from(case["tau"].to_scalar::<f32>().unwrap()),
    };
    let found = Grounding {
        class_logits: case["prob"].unsqueeze(2).unwrap(), // not looked at: p is given
        boxes: case["boxes"].clone(),
        semantic: Some(case["objects"].clone()),
    };
    let presence = Presence::of_probability(&case["prob"]).unwrap();
    let terms = loss.terms_of(&presence, &found, &case["truth"], &case["expression"]).unwrap();
    let psi = |t: &Tensor| t.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(psi(&terms.matched), psi(&case["psi"]));
    let contrast = terms.contrast.as_ref().unwrap();
    assert_close("text to object", contrast, &case["text_to_object"].mean(0).unwrap(), TOLERANCE);
    assert_close("all", &loss.total(&terms).unwrap(), &case["ground"], TOLERANCE);
}
