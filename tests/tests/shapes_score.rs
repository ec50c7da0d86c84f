//! What the correction does to the score on the shipped model: `captions.txt` holds 128 captions in the proportions that the
//! model was trained on (19 single objects, 45 pairs, 38 relations, 26 counts).

use candle_core::{DType, Device};
use host_demo::{PluginChoice, Request, Session, StepRecord, default_model, seeded_noise};
use serde_json::json;
use tests::plugin_library;

const STEPS: usize = 10;
const BATCH: usize = 32;

/// Mean score over captions, for every step; with the seeds and settings of every other run of the same captions.
fn mean_scores(session: &mut Session, captions: &[&str], eta: f64) -> Vec<f64> {
    session.set_param("eta", eta).unwrap();
    let mut sums = vec![0.; STEPS];
    for (chunk, captions) in captions.chunks(BATCH).enumerate() {
        let shape = [captions.len(), session.latent_channels(), 16, 16];
        let request = Request {
            prompts: captions.iter().map(|caption| (*caption).to_owned()).collect(),
            negative: String::new(),
            steps: STEPS,
            guidance: 4.,
            start: seeded_noise((chunk * BATCH) as u64, shape, &Device::Cpu).unwrap(),
        };
        let outcome = session.run(&request, &mut |_, _| {}).unwrap();
        for (sum, record) in sums.iter_mut().zip(&outcome.steps) {
            *sum += f64::from(StepRecord::mean_score(record).unwrap()) * captions.len() as f64;
        }
    }
    sums.iter().map(|sum| sum / captions.len() as f64).collect()
}

#[test]
fn correction_raises_the_mean_score_over_128_captions() {
    let captions: Vec<&str> = include_str!("../captions.txt").lines().collect();
    assert_eq!(captions.len(), 128);
    let model = default_model().unwrap();
    let config = json!({"adapter": model.join("adapter_stage1.safetensors"), "monitor": true});
    let plugin = PluginChoice { library: plugin_library().to_owned(), config };
    let mut session = Session::load(&model, DType::F32, &Device::Cpu, Some(&plugin)).unwrap();
    let mean = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len() as f64;
    let runs = [0., 0.5, 4.].map(|eta| (eta, mean_scores(&mut session, &captions, eta)));
    for (eta, scores) in &runs {
        let (all, last) = (mean(scores), scores[STEPS - 1]);
        println!("eta {eta}: mean score {all:.4} over {STEPS} steps, {last:.4} at the last");
    }
    let [(_, without), corrected @ ..] = &runs;
    for (eta, scores) in corrected {
        // The first score is computed before anything was corrected.
        assert!((scores[0] - without[0]).abs() < 1e-6, "eta {eta}: {} at the first step, not {}", scores[0], without[0]);
        assert!(scores[1..].iter().zip(&without[1..]).all(|(with, without)| with > without), "eta {eta}: {scores:?}");
    }
    assert!(mean(&runs[2].1) > mean(&runs[1].1), "a larger step size raises the score more: {runs:?}");
}
