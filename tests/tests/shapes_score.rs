//! What the correction does to the score on the shipped model: `captions.txt` holds 128 captions in the proportions that the
//! model was trained on (19 single objects, 45 pairs, 38 relations, 26 counts).

use candle_core::DType;
use diffusion::scheduler::Scheduler;
use host_demo::{PluginChoice, Request, Session, StepRecord, default_model, seeded_noise};
use serde_json::json;
use tests::{device, plugin_library};

const CAPTIONS: &str = include_str!("../captions.txt");
const BATCH: usize = 32;

/// Mean score over captions, for every step; with the seeds and settings of every other run of the same captions.
fn mean_scores(session: &mut Session, captions: &[&str], steps: usize, eta: f64) -> Vec<f64> {
    session.set_param("eta", eta).unwrap();
    let mut sums = vec![0.; steps];
    for (chunk, captions) in captions.chunks(BATCH).enumerate() {
        let shape = [captions.len(), session.latent_channels(), 16, 16];
        let prompts = captions.iter().map(|caption| (*caption).to_owned()).collect();
        let noise = seeded_noise((chunk * BATCH) as u64, shape, device()).unwrap();
        let request = Request::new(prompts, Scheduler::Ddim, steps, 4., noise);
        let outcome = session.run(&request, &mut |_, _| {}).unwrap();
        for (sum, record) in sums.iter_mut().zip(&outcome.steps) {
            *sum += f64::from(StepRecord::mean_score(record).unwrap()) * captions.len() as f64;
        }
    }
    sums.iter().map(|sum| sum / captions.len() as f64).collect()
}

fn shipped() -> Session {
    let model = default_model().unwrap();
    let config = json!({"adapter": host_demo::default_adapter().unwrap(), "monitor": true});
    let plugin = PluginChoice { library: plugin_library().to_owned(), config, split: false };
    Session::load(&model, DType::F32, device(), Some(&plugin)).unwrap()
}

/// The first score is computed before anything was corrected; every later one must be higher with the correction.
fn assert_raised(eta: f64, with: &[f64], without: &[f64]) {
    assert!((with[0] - without[0]).abs() < 1e-6, "eta {eta}: {} at the first step, not {}", with[0], without[0]);
    assert!(
        with[1..].iter().zip(&without[1..]).all(|(with, without)| with > without),
        "eta {eta}: {with:?}, {without:?}"
    );
}

#[test]
fn correction_raises_the_mean_score() {
    let captions: Vec<&str> = CAPTIONS.lines().step_by(11).collect();
    let mut session = shipped();
    let without = mean_scores(&mut session, &captions, 4, 0.);
    assert_raised(4., &mean_scores(&mut session, &captions, 4, 4.), &without);
}

/// All captions, with the numbers for the README.
#[test]
#[ignore = "takes minutes; see the README for the command"]
fn correction_raises_the_mean_score_over_128_captions() {
    let captions: Vec<&str> = CAPTIONS.lines().collect();
    assert_eq!(captions.len(), 128);
    let mut session = shipped();
    let runs = [0., 1., 8.].map(|eta| (eta, mean_scores(&mut session, &captions, 25, eta)));
    for (eta, scores) in &runs {
        let mean = scores.iter().sum::<f64>() / scores.len() as f64;
        println!("eta {eta}: mean score {mean:.4} over the steps, {:.4} at the last", scores[scores.len() - 1]);
    }
    let [(_, without), corrected @ ..] = &runs;
    corrected.iter().for_each(|(eta, with)| assert_raised(*eta, with, without));
}
