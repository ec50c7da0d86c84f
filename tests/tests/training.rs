//! Training on the shipped model: gradients by finite differences, exact resumption, and what comes out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Tensor};
use diffusion::lora::LoraFile;
use diffusion::{LoraEntry, Pipeline, UNet};
use dpt_plugin::loss::GroundingLoss;
use dpt_plugin::{Adapter, AdapterSizes, SizeHints};
use serde_json::json;
use tests::{assert_same, device};
use weights::data::{Encoder, ShapesSource};
use weights::train::{
    AdamWSettings, Batcher, Contrast, Decay, LearningRate, LoraLayers, LossWeights, Model, Objective, Outcome, Plan,
    Trainer, untrained, untrained_lora,
};
use weights::world::{Random, Split};

fn shipped() -> PathBuf {
    host_demo::default_model().unwrap()
}

/// Smaller pictures than the model was trained on: a quarter of the time.
fn encoder() -> Encoder {
    let Pipeline { text, vae, .. } = Pipeline::load(&shipped(), DType::F32, device()).unwrap();
    Encoder::new(text, vae, (32, 32), device(), None).unwrap()
}

fn source() -> ShapesSource {
    ShapesSource { seed: 5, split: Some(Split::Train), len: 24 }
}

fn sizes(tap: &str, unet: &UNet) -> AdapterSizes {
    AdapterSizes {
        tap: tap.into(),
        channels: unet.config().tap_channels(unet.config().tap(tap).unwrap()),
        d_model: 32,
        heads: 4,
        feedforward: 48,
        encoder_layers: 1,
        decoder_layers: 1,
        matching_queries: 3,
        grounding_queries: 4,
        clip_dim: unet.config().cross_attention_dim,
        classes: 1,
    }
}

/// A model with a small untrained adapter and, where asked for, low-rank changes that are not zero.
fn model(tap: &str, dtype: DType, lora: Option<LoraLayers>) -> Model {
    let unet = UNet::load(&shipped().join("unet"), dtype, device()).unwrap();
    let scheduler = diffusion::scheduler::SchedulerConfig::load(&shipped().join("scheduler")).unwrap();
    let mut random = Random::new(3, 1);
    let sizes = sizes(tap, &unet);
    let adapter = untrained(&sizes, &mut random, device()).unwrap();
    let entries = lora.map_or_else(Vec::new, |layers| untrained_lora(&unet, layers, 2, &mut random).unwrap());
    let entry = |entry: LoraEntry| {
        let up = random.normals(entry.up.elem_count()).into_iter().map(|v| 0.05 * v).collect();
        LoraEntry { up: Tensor::from_vec(up, entry.up.shape(), device()).unwrap(), ..entry }
    };
    Model::new(unet, sizes, adapter, entries.into_iter().map(entry).collect(), &scheduler).unwrap()
}

fn objective(contrast: Contrast, denoising: f64) -> Objective {
    let weights = LossWeights { matching: 1., grounding: 0.5, denoising };
    Objective { weights, contrast, grounding: GroundingLoss::DEFAULT, dropout: 0.1 }
}

/// Every parameter's gradient of a whole second-stage step, LoRA before and behind the tap among them, along random
/// directions; so also what passes through the adapter into the U-Net.
#[test]
fn gradients_of_a_tuning_step_match_finite_differences() {
    const STEP: f64 = 1e-7;
    let (source, mut encoder) = (source(), encoder());
    for (tap, contrast) in [("mid", Contrast::Triplets), ("up0", Contrast::InBatch)] {
        let mut model = model(tap, DType::F64, Some(LoraLayers::All));
        let objective = objective(contrast, 0.7);
        let batch = Batcher::new(&source, 1, 2, 1000, true).unwrap().batch(0, &mut encoder, device()).unwrap();
        let (_, gradients) = objective.evaluate(&model, &batch).unwrap();
        assert_eq!(gradients.len(), model.parameters().len(), "every parameter has one");
        for part in ["unet.down_blocks", "unet.mid_block", "unet.up_blocks", "transformer", "bbox_embed", "logit_scale"]
        {
            let chosen: Vec<String> = gradients.keys().filter(|name| name.starts_with(part)).cloned().collect();
            assert!(!chosen.is_empty(), "{part}");
            let mut random = Random::new(9, 2);
            let direction = |t: &Tensor| {
                let values: Vec<f64> = (0..t.elem_count()).map(|_| f64::from(random.normal())).collect();
                Tensor::from_vec(values, t.shape(), device()).unwrap()
            };
            let directions: Vec<Tensor> = chosen.iter().map(|name| &gradients[name]).map(direction).collect();
            let analytic: f64 = chosen.iter().zip(&directions).map(|(name, d)| dot(&gradients[name], d)).sum();
            let mut loss_at = |step: f64| {
                let before: Vec<Tensor> = chosen.iter().map(|n| model.parameters()[n].copy().unwrap()).collect();
                for (name, (value, d)) in chosen.iter().zip(before.iter().zip(&directions)) {
                    model.parameters()[name].set(&(value + (d * step).unwrap()).unwrap()).unwrap();
                }
                model.refresh().unwrap();
                let loss = objective.evaluate(&model, &batch).unwrap().0["loss"];
                chosen.iter().zip(&before).for_each(|(name, value)| model.parameters()[name].set(value).unwrap());
                model.refresh().unwrap();
                loss
            };
            let numeric = (loss_at(STEP) - loss_at(-STEP)) / (2. * STEP);
            let error = (numeric - analytic).abs() / numeric.abs().max(1e-3);
            assert!(error < 1e-4, "{tap} {contrast:?} {part}: {analytic} by formula, {numeric} by differences");
        }
    }
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    (a * b).unwrap().sum_all().unwrap().to_scalar().unwrap()
}

fn plan(folder: &Path) -> Plan {
    Plan {
        folder: folder.to_owned(),
        steps: 4,
        accumulate: 2,
        optimiser: AdamWSettings::DEFAULT,
        learning_rate: LearningRate { peak: 1e-3, warmup: 1, decay: Decay::Cosine },
        clip: 1.,
        save_every: 3,
        settings: json!({"of": "a test"}),
    }
}

/// Trains in `folder`; stops after `until` steps where it is given.
fn train(folder: &Path, lora: bool, resume: bool, until: Option<u64>) -> weights::Result<Outcome> {
    let (source, mut encoder) = (source(), encoder());
    let mut model = model("mid", DType::F32, lora.then_some(LoraLayers::Cross));
    let stop = AtomicBool::new(until == Some(0));
    let batcher = Batcher::new(&source, 1, 2, 1000, true).unwrap();
    let objective = objective(Contrast::Triplets, if lora { 1. } else { 0. });
    let mut trainer = Trainer { model: &mut model, objective, batcher, encoder: &mut encoder, plan: plan(folder) };
    trainer.run(resume, &stop, &mut |step, _| stop.store(until == Some(step), Ordering::Relaxed))
}

fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("training-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    folder
}

/// An interruption leaves no trace: the same weights and moments, bit for bit, and the same metrics.
#[test]
fn a_resumed_run_ends_where_an_uninterrupted_one_does() {
    for lora in [false, true] {
        let (whole, parts) = (folder(&format!("whole-{lora}")), folder(&format!("parts-{lora}")));
        assert_eq!(train(&whole, lora, false, None).unwrap(), Outcome::Finished);
        assert_eq!(train(&parts, lora, false, Some(2)).unwrap(), Outcome::Interrupted(2));
        assert_eq!(train(&parts, lora, true, None).unwrap(), Outcome::Finished);
        for file in ["state.safetensors", "adapter.safetensors"] {
            let read = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
            assert!(!device().is_cpu() || read(&whole) == read(&parts), "{file} differs, LoRA {lora}");
            let tensors = |folder: &Path| candle_core::safetensors::load(folder.join(file), device()).unwrap();
            let (whole, parts) = (tensors(&whole), tensors(&parts));
            assert_eq!(whole.len(), parts.len());
            whole.iter().for_each(|(name, t)| assert_same(name, t, &parts[name]));
        }
        let losses = |folder: &Path| -> Vec<f64> {
            let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
            let loss = |line: &str| serde_json::from_str::<BTreeMap<String, f64>>(line).unwrap()["loss"];
            text.lines().map(loss).collect()
        };
        let tolerance = if device().is_cpu() { 0. } else { 1e-4 };
        for (whole, parts) in losses(&whole).into_iter().zip(losses(&parts)) {
            assert!((whole - parts).abs() <= tolerance * whole, "{whole} and {parts}");
        }
        assert_eq!(losses(&whole).len(), losses(&parts).len());
        assert_eq!(losses(&whole).len(), 4);
        assert!(whole.join("curves.png").is_file());
    }
}

#[test]
fn a_run_is_neither_overwritten_nor_resumed_with_other_settings() {
    let folder = folder("settings");
    assert_eq!(train(&folder, false, false, Some(1)).unwrap(), Outcome::Interrupted(1));
    let message = train(&folder, false, false, None).unwrap_err().to_string();
    assert!(message.contains("--resume"), "{message}");
    let (source, mut encoder) = (source(), encoder());
    let mut model = model("mid", DType::F32, None);
    let batcher = Batcher::new(&source, 1, 2, 1000, true).unwrap();
    let plan = Plan { clip: 2., ..plan(&folder) };
    let objective = objective(Contrast::Triplets, 0.);
    let mut trainer = Trainer { model: &mut model, objective, batcher, encoder: &mut encoder, plan };
    let message = trainer.run(true, &AtomicBool::new(false), &mut |_, _| {}).unwrap_err().to_string();
    assert!(message.contains("clip 1.0, not 2.0"), "{message}");
}

/// The first stage leaves the U-Net alone; the second's file holds LoRA; both load as the plugin loads them.
#[test]
fn what_comes_out_is_an_adapter_in_the_released_names() {
    for lora in [false, true] {
        let folder = folder(&format!("output-{lora}"));
        train(&folder, lora, false, Some(1)).unwrap();
        let path = folder.join(Trainer::WEIGHTS);
        let adapter = Adapter::open(&path, SizeHints::default(), device()).unwrap();
        assert_eq!((adapter.sizes().tap.as_str(), adapter.sizes().matching_queries), ("mid", 3));
        let file = diffusion::Checkpoint::open(&path, DType::F32, device()).unwrap();
        let entries = LoraFile::read(&file).unwrap().entries;
        assert_eq!(entries.is_empty(), !lora);
        assert!(entries.iter().all(|entry| entry.module.contains("attn2")));
        let header: serde_json::Value = serde_json::from_str(&file.metadata().unwrap()["dpt"]).unwrap();
        assert_eq!((&header["training"]["of"], &header["training"]["step"]), (&json!("a test"), &json!(1)));
    }
}

/// Thirty steps on few examples bring the loss down: gradients, optimiser and data point the same way.
#[test]
fn the_loss_falls() {
    let (source, mut encoder) = (ShapesSource { len: 4, ..source() }, encoder());
    let mut model = model("mid", DType::F32, None);
    let batcher = Batcher::new(&source, 1, 4, 1000, true).unwrap();
    let folder = folder("falls");
    let learning_rate = LearningRate { peak: 2e-3, warmup: 0, decay: Decay::Constant };
    let plan = Plan { steps: 30, accumulate: 1, learning_rate, save_every: 100, ..plan(&folder) };
    let objective = objective(Contrast::Triplets, 0.);
    let mut trainer = Trainer { model: &mut model, objective, batcher, encoder: &mut encoder, plan };
    let (mut first, mut last) = (0., 0.);
    let report = &mut |step: u64, metrics: &weights::train::Metrics| {
        if step == 5 {
            first = metrics.recent("loss", 5).unwrap();
        }
        last = metrics.recent("loss", 5).unwrap();
    };
    trainer.run(false, &AtomicBool::new(false), report).unwrap();
    assert!(last < 0.8 * first, "{first} at first, {last} at last");
}
