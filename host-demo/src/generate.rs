//! `host-demo generate`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{Device, Tensor};
use clap::Args;
use host_demo::{
    Error, PromptSwitch, Report, Request, Result, Rgb, Session, Settings, StartImage, StepRecord, check_output,
    latents_from_file, peak_bytes, seeded_noise,
};
use indicatif::{MultiProgress, ProgressBar};
use serde_json::{Value, json};

use crate::options::{Loaded, ModelOptions, SamplingOptions, bar_style, write_json};

#[derive(Args)]
pub(crate) struct Generate {
    /// What to draw.
    #[arg(long)]
    prompt: String,
    /// From that share of the schedule on, another prompt; may be given several times
    #[arg(long, value_name = "SHARE=PROMPT", value_parser = parse_switch)]
    prompt_at: Vec<PromptSwitch>,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    sampling: SamplingOptions,
    /// Step size of the correction; 0 corrects nothing [default: the configuration's; 8 where the shipped adapter
    /// is taken because none is named]
    #[arg(long, value_name = "F")]
    eta: Option<f64>,
    /// Item i of the batch starts from seed + i.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of pictures [default: 1, or as many as --latents holds]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Start from these latents [batch, channels, h, w] (safetensors) instead of seeded noise
    #[arg(long, value_name = "FILE", conflicts_with_all = ["size", "seed"])]
    latents: Option<PathBuf>,
    /// Start from this picture, noised
    #[arg(long, value_name = "FILE.png", conflicts_with_all = ["size", "latents"])]
    image: Option<PathBuf>,
    /// How much of the picture may change: the share of the schedule that is run, above 0 and at most 1
    #[arg(long, value_name = "F", requires = "image", default_value_t = 0.8)]
    strength: f64,
    /// Sample without any plugin
    #[arg(long, conflicts_with_all = ["plugin", "config", "gradient", "eta", "monitor"])]
    no_plugin: bool,
    /// Compute scores also in steps that are not corrected, at the cost of a forward pass to the tap.
    #[arg(long)]
    monitor: bool,
    /// Write what the run did as JSON
    #[arg(long, value_name = "FILE.json")]
    report: Option<PathBuf>,
    /// The picture; several get -0, -1, ... before the extension
    #[arg(long, value_name = "FILE.png", default_value = "out.png")]
    out: PathBuf,
}

fn parse_switch(text: &str) -> std::result::Result<PromptSwitch, String> {
    let parts = text.split_once('=').and_then(|(from, prompt)| Some((from.trim().parse().ok()?, prompt)));
    match parts.filter(|(from, _)| (0. ..=1.).contains(from)) {
        Some((from, prompt)) => Ok(PromptSwitch { from, prompt: prompt.to_owned() }),
        None => Err(format!("`{text}`: expected SHARE=PROMPT with a share from 0 to 1, such as 0.5=a blue square")),
    }
}

impl Generate {
    pub(crate) fn run(&self, bars: &MultiProgress) -> Result<()> {
        let mut loaded = self.model.load(!self.no_plugin, bars)?;
        for (name, value) in [("eta", self.eta), ("monitor", self.monitor.then_some(1.))] {
            value.map(|value| loaded.session.set_param(name, value)).transpose()?;
        }
        let request = self.request(&loaded)?;
        let images = self.image_paths(request.noise.dim(0)?);
        images.iter().chain(&self.report).try_for_each(|path| check_output(path))?;
        let steps = (self.sampling.steps - request.first_step()?) as u64;
        let bar = bars.add(ProgressBar::new(steps).with_style(bar_style()));
        let mut outcome = loaded.session.run(&request, &mut |_, record| {
            if let Some(score) = record.and_then(StepRecord::mean_score) {
                bar.set_message(format!("score {score:.3}"));
            }
            bar.inc(1);
        })?;
        bar.finish();
        let started = Instant::now();
        let images = loaded.session.decode(&outcome.latents)?;
        outcome.seconds.decode = started.elapsed().as_secs_f64();

        let settings = self.settings(&loaded, &request)?;
        let files = self.save_images(&images, &settings)?;
        let Some(path) = &self.report else { return Ok(()) };
        let report = Report {
            settings,
            steps: outcome.steps,
            lora_entries: outcome.lora_entries,
            seconds: outcome.seconds,
            peak_memory_bytes: peak_bytes(),
            plugin_memory_bytes: loaded.session.plugin_memory(),
            images: files,
        };
        write_json(path, &report)
    }

    /// What was asked for and what the defaults made of it.
    fn settings(&self, loaded: &Loaded, request: &Request) -> Result<Settings> {
        let (batch, _, h, w) = request.noise.dims4()?;
        let mut config = loaded.plugin.as_ref().map(|choice| choice.config.clone());
        if let Some(Value::Object(config)) = &mut config {
            config.extend(self.eta.map(|eta| ("eta".into(), json!(eta))));
            config.extend(self.monitor.then(|| ("monitor".into(), json!(true))));
        }
        let path = |path: &Path| path.display().to_string();
        Ok(Settings {
            prompt: self.prompt.clone(),
            negative: self.sampling.negative.clone(),
            model: path(&loaded.folder),
            plugin: loaded.plugin.as_ref().map(|choice| path(&choice.library)),
            config,
            scheduler: request.scheduler.name(),
            mode: request.mode.name(),
            steps: request.steps,
            guidance: request.guidance,
            seed: self.seed,
            batch,
            width: w * loaded.session.latent_scale(),
            height: h * loaded.session.latent_scale(),
            latents: self.latents.as_deref().map(path),
            image: self.image.as_deref().map(path),
            strength: self.image.is_some().then_some(self.strength),
            prompt_at: self.prompt_at.iter().map(|switch| (switch.from, switch.prompt.clone())).collect(),
            lora: loaded.lora.clone(),
            device: self.model.device.clone(),
            dtype: self.model.dtype.clone(),
        })
    }

    /// One PNG per item, each with the settings that make it alone; returns their paths.
    fn save_images(&self, images: &Tensor, settings: &Settings) -> Result<Vec<String>> {
        let paths = self.image_paths(images.dim(0)?);
        for (item, path) in paths.iter().enumerate() {
            let mut settings = settings.clone();
            // An item of a file of latents cannot be drawn without the others.
            if self.latents.is_none() {
                settings = Settings { seed: self.seed.wrapping_add(item as u64), batch: 1, ..settings };
            }
            let text = serde_json::to_string(&settings).expect("settings are plain data");
            let texts = [("prompt", self.prompt.clone()), ("host-demo", text)];
            Rgb::from_tensor(&images.get(item)?)?.save_png(path, &texts)?;
            eprintln!("{}", path.display());
        }
        Ok(paths.iter().map(|path| path.display().to_string()).collect())
    }

    /// Where the pictures of a batch go.
    fn image_paths(&self, batch: usize) -> Vec<PathBuf> {
        if batch == 1 { vec![self.out.clone()] } else { (0..batch).map(|item| numbered(&self.out, item)).collect() }
    }

    fn request(&self, loaded: &Loaded) -> Result<Request> {
        let image = self.image.as_deref().map(|path| encode(path, &loaded.session, &loaded.device)).transpose()?;
        let noise = match &self.latents {
            Some(path) => self.noise_from(path, loaded)?,
            None => {
                let batch = self.batch.unwrap_or(1);
                if batch == 0 {
                    return Err(Error::Request("--batch 0: nothing to draw".into()));
                }
                let [channels, height, width] = match &image {
                    Some(latents) => latents.dims3()?.into(),
                    None => self.sampling.latents_shape(&loaded.session)?,
                };
                seeded_noise(self.seed, [batch, channels, height, width], &loaded.device)?
            }
        };
        let strength = self.strength;
        let start = |latents: Tensor| -> Result<StartImage> {
            Ok(StartImage { latents: latents.broadcast_as(noise.shape())?.contiguous()?, strength })
        };
        let image = image.map(start).transpose()?;
        let prompts = vec![self.prompt.clone(); noise.dim(0)?];
        let switches = self.prompt_at.clone();
        Ok(Request { switches, image, ..self.sampling.request(loaded, prompts, noise)? })
    }

    fn noise_from(&self, path: &Path, loaded: &Loaded) -> Result<Tensor> {
        let latents = latents_from_file(path, loaded.session.latent_channels(), &loaded.device)?;
        let found = latents.dim(0)?;
        match self.batch.filter(|asked| *asked != found) {
            None => Ok(latents),
            Some(asked) => {
                let message = format!("holds {found} item(s), --batch asks for {asked}");
                Err(Error::File { path: path.to_owned(), message })
            }
        }
    }
}

/// A picture's latents `[channels, h, w]`.
fn encode(path: &Path, session: &Session, device: &Device) -> Result<Tensor> {
    let (picture, scale) = (Rgb::load_png(path)?, session.latent_scale() as u32);
    if picture.width % scale != 0 || picture.height % scale != 0 {
        let message = format!("{}x{} pixels; both must be divisible by {scale}", picture.width, picture.height);
        return Err(Error::File { path: path.to_owned(), message });
    }
    Ok(session.encode(&picture.to_tensor(device)?.unsqueeze(0)?)?.squeeze(0)?)
}

/// `dir/out.png` to `dir/out-3.png`.
fn numbered(path: &Path, item: usize) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map_or_else(|| "png".into(), |e| e.to_string_lossy());
    path.with_file_name(format!("{stem}-{item}.{extension}"))
}
