use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use diffusion::{Checkpoint, RawTensor, TextModel, Vae, save_safetensors};

use super::Picture;
use crate::Result;

/// Embeddings of some texts.
pub struct TextBatch {
    /// What the U-Net's cross-attention reads, `[n, tokens, width]`.
    pub hidden: Tensor,
    /// CLIP(y), `[n, p]`.
    pub pooled: Tensor,
}

/// Latents of pictures and embeddings of texts. Each is computed once and remembered: latents in memory and, where there is a
/// folder, in files that later runs find.
pub struct Encoder {
    text: TextModel,
    vae: Vae,
    device: Device,
    /// Width and height of the pictures, in pixels.
    size: (u32, u32),
    latents: HashMap<String, Tensor>,
    texts: HashMap<String, (Tensor, Tensor)>,
    folder: Option<PathBuf>,
    /// In the folder, latents of another autoencoder are told apart by this.
    fingerprint: u128,
}

impl Encoder {
    /// Texts that are remembered; SD 2's take 300 KB each.
    const MOST_TEXTS: usize = 8192;
    /// Bytes of latents that are remembered in memory. Beyond, all are forgotten: those in the folder are read again.
    const MOST_LATENTS: usize = 8 << 30;
    /// Pictures that are encoded together.
    const BATCH: usize = 16;

    /// Pictures are stretched to `size`, width and height in pixels.
    pub fn new(text: TextModel, vae: Vae, size: (u32, u32), device: &Device, folder: Option<PathBuf>) -> Result<Self> {
        if let Some(folder) = &folder {
            std::fs::create_dir_all(folder).map_err(|e| crate::Error::file(folder, e))?;
        }
        let fingerprint = fingerprint(&vae, device)?;
        let (latents, texts) = (HashMap::new(), HashMap::new());
        Ok(Self { text, vae, device: device.clone(), size, latents, texts, folder, fingerprint })
    }

    /// Width and height that pictures are stretched to, in pixels.
    pub fn size(&self) -> (u32, u32) {
        self.size
    }

    /// Scaled latents of pictures, `[n, channels, h, w]` in f32: the mean of the distribution that the autoencoder gives, so
    /// that they can be remembered.
    pub fn latents(&mut self, pictures: &[&Picture]) -> Result<Tensor> {
        let names = pictures.iter().map(|picture| picture.name()).collect::<Result<Vec<_>>>()?;
        let bytes = self.latents.values().next().map_or(0, |latents| 4 * latents.elem_count());
        if bytes * self.latents.len() > Self::MOST_LATENTS {
            self.latents.clear();
        }
        let mut missing: Vec<(&str, &Picture)> = Vec::new();
        for (name, picture) in names.iter().zip(pictures) {
            if self.latents.contains_key(name) || missing.iter().any(|(other, _)| other == name) {
                continue;
            }
            match self.stored(name)? {
                Some(latents) => drop(self.latents.insert(name.clone(), latents)),
                None => missing.push((name, picture)),
            }
        }
        for chunk in missing.chunks(Self::BATCH) {
            let (width, height) = self.size;
            let image = |(_, picture): &(&str, &Picture)| -> Result<Tensor> {
                Ok(picture.pixels(width, height)?.to_tensor(&self.device)?)
            };
            let images = Tensor::stack(&chunk.iter().map(image).collect::<Result<Vec<_>>>()?, 0)?;
            let scale = self.vae.config().scaling_factor;
            let latents = (self.vae.encode(&images)?.mean.to_dtype(DType::F32)? * scale)?;
            for (index, (name, _)) in chunk.iter().enumerate() {
                // Its own memory: a row of the batch would keep all of it.
                let latents = latents.get(index)?.force_contiguous()?;
                self.store(name, &latents)?;
                self.latents.insert((*name).to_owned(), latents);
            }
        }
        let rows: Vec<&Tensor> = names.iter().map(|name| &self.latents[name]).collect();
        Ok(Tensor::stack(&rows, 0)?)
    }

    /// Embeddings of texts, in their order.
    pub fn texts(&mut self, texts: &[&str]) -> Result<TextBatch> {
        if self.texts.len() > Self::MOST_TEXTS {
            self.texts.clear();
        }
        let mut missing: Vec<&str> = texts.iter().copied().filter(|text| !self.texts.contains_key(*text)).collect();
        missing.sort_unstable();
        missing.dedup();
        for chunk in missing.chunks(64) {
            let embedded = self.text.encode(chunk)?;
            for (index, text) in chunk.iter().enumerate() {
                let row = |t: &Tensor| t.get(index)?.to_dtype(DType::F32)?.force_contiguous();
                self.texts.insert((*text).to_owned(), (row(&embedded.hidden)?, row(&embedded.pooled)?));
            }
        }
        let rows = |part: fn(&(Tensor, Tensor)) -> &Tensor| {
            Tensor::stack(&texts.iter().map(|text| part(&self.texts[*text])).collect::<Vec<_>>(), 0)
        };
        Ok(TextBatch { hidden: rows(|pair| &pair.0)?, pooled: rows(|pair| &pair.1)? })
    }

    fn file(&self, name: &str) -> Option<PathBuf> {
        let key = format!("{:032x} {}x{} {name}", self.fingerprint, self.size.0, self.size.1);
        let hash = xxhash_rust::xxh3::xxh3_128(key.as_bytes());
        self.folder.as_ref().map(|folder| folder.join(format!("{hash:032x}.safetensors")))
    }

    fn stored(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(path) = self.file(name).filter(|path| path.is_file()) else { return Ok(None) };
        let file = Checkpoint::open(&path, DType::F32, &self.device)?;
        let shape = file.root().shape("latents").unwrap_or_default();
        Ok(Some(file.root().tensor("latents", &shape)?))
    }

    fn store(&self, name: &str, latents: &Tensor) -> Result<()> {
        let Some(path) = self.file(name) else { return Ok(()) };
        Ok(save_safetensors(&path, [("latents".to_owned(), RawTensor::of(latents)?)], Default::default())?)
    }
}

/// Changes with the autoencoder's weights: what it makes of a fixed picture.
fn fingerprint(vae: &Vae, device: &Device) -> Result<u128> {
    let side = 8 * vae.config().latent_scale();
    let values: Vec<f32> = (0..3 * side * side).map(|i| (i as f32 * 0.37).sin()).collect();
    let latents = vae.encode(&Tensor::from_vec(values, (1, 3, side, side), device)?)?.mean;
    let latents = (latents * vae.config().scaling_factor)?;
    Ok(xxhash_rust::xxh3::xxh3_128(&RawTensor::of(&latents)?.data))
}
