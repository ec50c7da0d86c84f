//! The real plugin over the committed tiny SD 1 pipeline: its configuration, model, text, latents and steps.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Tensor};
use host_api::host::{Host, Instance, Library};
use host_api::{Model, Prediction, Report, Result, Run, Space, Step, Text, View, ViewMut};
use serde_json::{Value, json};

use crate::{committed, device, device_name, plugin_library, values};

/// Steps of a [`run`].
pub const STEPS: usize = 4;

/// A folder for one test, empty.
pub fn scratch(name: &str) -> PathBuf {
    let folder = match std::env::var_os("PREBUILT") {
        Some(_) => std::env::temp_dir().join(format!("{name}-{}", std::process::id())),
        None => plugin_library().ancestors().nth(2).unwrap().join("tmp").join(name),
    };
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// The adapter and LoRA under the released names: tap `mid`, 32 channels, text of width 32.
pub fn adapter() -> PathBuf {
    committed("sd1-cases/release_mid.safetensors")
}

/// The pipeline's folder.
pub fn base_model() -> PathBuf {
    committed("sd1-tiny")
}

/// `base` with the keys of `more` in place of its own; null takes a key out.
pub fn with(base: Value, more: Value) -> Value {
    let mut base = base;
    let keys = base.as_object_mut().unwrap();
    keys.extend(more.as_object().unwrap().clone());
    keys.retain(|_, value| !value.is_null());
    base
}

/// A configuration that has the host compute the gradient. The strength makes corrections of about a tenth of the latents.
pub fn host_config(more: Value) -> Value {
    let base = json!({"adapter": adapter(), "tap": "mid", "heads": 4, "matching_queries": 5, "eta": 20.,
        "device": device_name()});
    with(base, more)
}

/// The same with the plugin's own U-Net.
pub fn own_config(more: Value) -> Value {
    with(host_config(json!({"base_model": base_model()})), more)
}

/// Opened once per test program.
pub fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| Library::open(plugin_library()).unwrap())
}

/// A new instance.
pub fn create(host: Arc<dyn Host>, config: &Value) -> Result<Instance> {
    library().create("dpt", host, &config.to_string())
}

/// A U-Net's `config.json`.
pub fn unet_config(folder: &Path) -> String {
    std::fs::read_to_string(folder.join("unet/config.json")).unwrap()
}

/// The tiny model as a host would describe it.
pub fn model(unet_config: &str) -> Model<'_> {
    Model {
        family: "sd1",
        prediction: Prediction::Epsilon,
        unet_in_channels: 4,
        latent_channels: 4,
        alphas_cumprod: &[0.999, 0.5, 0.005],
        unet_config: Some(unet_config),
    }
}

/// Created and prepared for the tiny model.
pub fn prepared(host: Arc<dyn Host>, config: &Value) -> Instance {
    prepared_for(host, config, host_api::Device::Cpu)
}

/// The same for latents on `device`.
pub fn prepared_for(host: Arc<dyn Host>, config: &Value, device: host_api::Device) -> Instance {
    let mut instance = create(host, config).unwrap();
    instance.prepare(&model(&unet_config(&base_model())), device).unwrap();
    instance
}

/// What a host knows of a batch of prompts.
#[derive(Clone)]
pub struct Texts {
    /// The prompts.
    pub prompts: Vec<String>,
    /// `[B, S, D]`.
    pub context: Vec<f32>,
    /// `[B, D]`.
    pub pooled: Vec<f32>,
    /// B positions.
    pub end_of_text: Vec<i64>,
    /// `[B, S, D]`.
    pub shape: [usize; 3],
}

impl Texts {
    /// The parity cases' prompts of these numbers, as PyTorch encoded them.
    pub fn of(rows: &[usize]) -> Self {
        let prompts: Vec<String> =
            serde_json::from_str(&std::fs::read_to_string(committed("sd1-cases/text.json")).unwrap()).unwrap();
        let tensors: HashMap<String, Tensor> =
            candle_core::safetensors::load(committed("sd1-cases/text.safetensors"), device()).unwrap();
        let flat = |name: &str| {
            let rows = rows.iter().map(|row| tensors[name].get(*row).unwrap()).collect::<Vec<_>>();
            let rows = Tensor::stack(&rows, 0).unwrap().to_dtype(DType::F32).unwrap();
            (rows.dims().to_vec(), rows.flatten_all().unwrap().to_vec1::<f32>().unwrap())
        };
        let ((shape, context), (_, pooled), (_, ids)) = (flat("hidden"), flat("pooled"), flat("ids"));
        // The end-of-text token has the largest id; padding repeats it.
        let end = |ids: &[f32]| ids.iter().position(|id| *id == 1023.).unwrap() as i64;
        Self {
            prompts: rows.iter().map(|row| prompts[*row].clone()).collect(),
            context,
            pooled,
            end_of_text: ids.chunks(shape[1]).map(end).collect(),
            shape: shape.try_into().unwrap(),
        }
    }

    /// The context alone.
    pub fn context(&self) -> Option<View<'_>> {
        Some(View::new(&self.context, &self.shape).unwrap())
    }

    /// The pooled embedding alone.
    pub fn pooled(&self) -> Option<View<'_>> {
        Some(View::new(&self.pooled, &[self.shape[0], self.shape[2]]).unwrap())
    }

    /// Context and pooled embedding, as most hosts give them.
    pub fn text(&self) -> Text<'_> {
        Text { context: self.context(), pooled: self.pooled(), ..Text::default() }
    }
}

/// A run of [`STEPS`] steps with that text.
pub fn run(batch: usize, text: Text<'_>) -> Run<'_> {
    Run { batch, steps: STEPS, guidance_scale: 5., text }
}

/// Step `index` of such a run, in VP space.
pub fn step(index: usize) -> Step<'static> {
    Step {
        index,
        count: STEPS,
        sub_evaluation: 0,
        timestep: 800. - 200. * index as f64,
        alpha_bar: [0.04, 0.2, 0.6, 0.9][index],
        space: Space::Vp,
        extra_inputs: false,
        text: None,
    }
}

/// Noise `[B, 4, 16, 16]`; item i of seed s is item 0 of seed s + i.
pub fn latents(seed: u32, batch: usize) -> Vec<f32> {
    let item = |i: usize| values(seed + i as u32, 4 * 16 * 16).affine(1.4, 0.).unwrap().to_vec1::<f32>().unwrap();
    (0..batch).flat_map(item).collect()
}

/// Corrects `[B, 4, 16, 16]` latents in place.
pub fn correct(instance: &mut Instance, step: &Step<'_>, latents: &mut [f32]) -> Result<Report> {
    let shape = [latents.len() / (4 * 16 * 16), 4, 16, 16];
    instance.step_in_place(step, &mut ViewMut::new(latents, &shape).unwrap())
}

/// A prepared instance with a run begun on it.
pub fn running(host: Arc<dyn Host>, config: &Value, texts: &Texts) -> Instance {
    let mut instance = prepared(host, config);
    instance.begin(&run(texts.shape[0], texts.text())).unwrap();
    instance
}

/// Bits of floats, to compare what is not to change.
pub fn float_bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Two items of fixed latents, corrected at step `index`.
pub fn corrected(instance: &mut Instance, index: usize) -> Vec<f32> {
    let mut numbers = latents(1, 2);
    correct(instance, &step(index), &mut numbers).unwrap();
    numbers
}

/// L2 norm.
pub fn norm<'a>(values: impl IntoIterator<Item = &'a f32>) -> f64 {
    values.into_iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

/// `a - b`.
pub fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}
