use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use diffusion::scheduler::Scheduler;
use host_demo::{PluginChoice, Request, Rgb, Session, default_plugin, seeded_noise};
use serde::Serialize;
use serde_json::json;

use super::{Moments, Share, frechet_distance};
use crate::world::{Caption, Category, SIDE, Split, example, see};
use crate::{Error, Result};

/// What is sampled with.
#[derive(Clone, Debug)]
pub struct Variant {
    /// What it is called in tables.
    pub label: String,
    /// The plugin's adapter, whose LoRA is merged; without one there is no plugin.
    pub adapter: Option<PathBuf>,
    /// Strength of the correction; 0 leaves the LoRA alone.
    pub eta: f64,
    /// LoRA of the host's own.
    pub lora: Option<PathBuf>,
}

/// How pictures are sampled.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Steps of DDIM.
    pub steps: usize,
    /// Classifier-free guidance.
    pub guidance: f64,
    /// Captions of each split.
    pub captions: usize,
    /// Pictures of each caption.
    pub seeds: usize,
    /// The first seed, and that of the captions.
    pub seed: u64,
    /// Pictures that are sampled together.
    pub batch: usize,
}

/// What a variant's pictures show of their captions.
#[derive(Clone, Debug, Serialize)]
pub struct Alignment {
    /// Pictures that the oracle finds right, by category.
    pub by_category: BTreeMap<Category, Share>,
    /// Of all.
    pub all: Share,
    /// Of each picture, in the order of the captions: two variants of one [`Sampling`] are compared picture by picture.
    pub right: Vec<bool>,
    /// Frechet distance to drawn scenes of the same proportions of captions, in the space of [`features`].
    pub frechet: f64,
}

/// The captions of a split: as many, in the proportions of the world.
pub fn captions(split: Split, count: usize, seed: u64) -> Vec<Caption> {
    (0..count as u64).map(|index| example(seed, index, Some(split)).caption).collect()
}

/// Side of the grid of [`features`].
const GRID: usize = 4;
/// Drawn scenes for each caption.
const DRAWS: u64 = 4;

/// A picture's place in the space of the Frechet distance: its latents (the mean of the autoencoder's distribution, scaled),
/// averaged over the cells of a 4x4 grid. 64 numbers for 4 latent channels.
pub fn features(session: &Session, pictures: &[Rgb], device: &Device) -> Result<Vec<Vec<f32>>> {
    let images =
        pictures.iter().map(|picture| picture.to_tensor(device)).collect::<std::result::Result<Vec<_>, _>>()?;
    let latents = session.encode(&Tensor::stack(&images, 0)?)?;
    let cell = latents.dim(2)? / GRID;
    Ok(latents.avg_pool2d(cell)?.flatten_from(1)?.to_vec2()?)
}

/// Samples every caption of a split with a variant on a device (`cpu`, `cuda`, `cuda:N`) and asks the oracle.
pub fn generative(
    model: &Path,
    variant: &Variant,
    split: Split,
    sampling: Sampling,
    device: &str,
    progress: &mut dyn FnMut(usize),
) -> Result<Alignment> {
    let on = diffusion::device(device)?;
    let plugin = match &variant.adapter {
        None => None,
        Some(adapter) => {
            let config = json!({"adapter": adapter, "eta": variant.eta, "device": device});
            Some(PluginChoice { library: default_plugin()?, config, split: false })
        }
    };
    let mut session = Session::load(model, DType::F32, &on, plugin.as_ref())?;
    if let Some(lora) = &variant.lora {
        session.set_lora(&[(lora.clone(), 1.)])?;
    }
    let side = SIDE / session.latent_scale();
    if session.native_size() != Some((SIDE, SIDE)) {
        let found = session.native_size();
        return Err(Error::Request(format!("the oracle judges pictures of {SIDE}x{SIDE}, the model draws {found:?}")));
    }
    let captions = captions(split, sampling.captions, sampling.seed);
    let starts: Vec<(usize, u64)> =
        (0..captions.len()).flat_map(|index| (0..sampling.seeds as u64).map(move |n| (index, n))).collect();
    let width = session.latent_channels() * GRID * GRID;
    let (mut drawn, mut sampled) = (Moments::new(width), Moments::new(width));
    let mut by_category = BTreeMap::<Category, Share>::new();
    let mut right = Vec::with_capacity(starts.len());
    for (number, chunk) in starts.chunks(sampling.batch).enumerate() {
        let first = sampling.seed + (number * sampling.batch) as u64;
        let noise = seeded_noise(first, [chunk.len(), session.latent_channels(), side, side], &on)?;
        let prompts = chunk.iter().map(|(index, _)| captions[*index].to_string()).collect();
        let request = Request::new(prompts, Scheduler::Ddim, sampling.steps, sampling.guidance, noise);
        let outcome = session.run(&request, &mut |_, _| {})?;
        let images = session.decode(&outcome.latents)?;
        let pictures = (0..chunk.len()).map(|i| Ok(Rgb::from_tensor(&images.get(i)?)?)).collect::<Result<Vec<_>>>()?;
        for ((index, _), picture) in chunk.iter().zip(&pictures) {
            let caption = &captions[*index];
            let fits = caption.fits(&see(picture));
            by_category.entry(caption.category()).or_default().add(fits);
            right.push(fits);
        }
        features(&session, &pictures, &on)?.iter().for_each(|row| sampled.add(row));
        progress((number * sampling.batch + chunk.len()).min(starts.len()));
    }
    // Scenes that were drawn for the same proportions of captions, with other numbers than the captions' own.
    for start in (0..captions.len() as u64 * DRAWS).step_by(sampling.batch) {
        let end = (start + sampling.batch as u64).min(captions.len() as u64 * DRAWS);
        let pictures: Vec<Rgb> =
            (start..end).map(|i| example(sampling.seed ^ 0xd0a1, i, Some(split)).scene.draw()).collect();
        features(&session, &pictures, &on)?.iter().for_each(|row| drawn.add(row));
    }
    let all = by_category.values().fold(Share::default(), |all, share| all.and(*share));
    Ok(Alignment { by_category, all, right, frechet: frechet_distance(&sampled, &drawn)? })
}
