//! `host-demo generate`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Tensor;
use clap::{Args, ValueEnum};
use host_demo::{
    Error, PluginChoice, Report, Request, Result, Rgb, Session, Settings, check_output, default_model,
    latents_from_file, peak_bytes, seeded_noise, write_whole,
};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Value, json};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum GradientSource {
    /// This program's U-Net, through the interface.
    Host,
    /// The plugin's own U-Net, loaded from the same model.
    Plugin,
}

#[derive(Args)]
pub(crate) struct Generate {
    /// What to draw.
    #[arg(long)]
    prompt: String,
    /// What to lead away from.
    #[arg(long, default_value = "")]
    negative: String,
    /// Folder in the diffusers layout [default: the shipped weights/shapes]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// The plugin's shared library [default: libdpt beside this program]
    #[arg(long, value_name = "LIB", conflicts_with = "no_plugin")]
    pub(crate) plugin: Option<PathBuf>,
    /// The plugin's configuration, a JSON file or JSON text; with the shipped model its adapter is the default
    #[arg(long, value_name = "FILE|JSON", conflicts_with = "no_plugin")]
    pub(crate) config: Option<String>,
    /// Step size of the correction; 0 corrects nothing
    #[arg(long, value_name = "F", conflicts_with = "no_plugin")]
    eta: Option<f64>,
    /// Whose U-Net computes the gradient
    #[arg(long, value_enum, conflicts_with = "no_plugin")]
    pub(crate) gradient: Option<GradientSource>,
    /// Number of DDIM steps.
    #[arg(long, default_value_t = 25)]
    steps: usize,
    /// Classifier-free guidance; 1 is none [default: 4 for the shipped model, else 7.5]
    #[arg(long, value_name = "F")]
    guidance: Option<f64>,
    /// Item i of the batch starts from seed + i.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of pictures [default: 1, or as many as --latents holds]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Width and height in pixels [default: the model's own]
    #[arg(long, value_name = "WxH", value_parser = parse_size)]
    size: Option<(usize, usize)>,
    /// Start from these latents [batch, channels, h, w] (safetensors) instead of seeded noise
    #[arg(long, value_name = "FILE", conflicts_with_all = ["size", "seed"])]
    latents: Option<PathBuf>,
    /// Sample without any plugin
    #[arg(long)]
    pub(crate) no_plugin: bool,
    /// Compute scores also in steps that are not corrected, at the cost of a forward pass to the tap.
    #[arg(long, conflicts_with = "no_plugin")]
    monitor: bool,
    /// Where to compute: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// What the model computes in: f32, f16 or bf16
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// Write what the run did as JSON
    #[arg(long, value_name = "FILE.json")]
    report: Option<PathBuf>,
    /// The picture; several get -0, -1, ... before the extension
    #[arg(long, value_name = "FILE.png", default_value = "out.png")]
    out: PathBuf,
}

fn parse_size(text: &str) -> std::result::Result<(usize, usize), String> {
    let parse = |side: &str| side.parse::<usize>().ok().filter(|side| *side > 0);
    let sides = text.split_once('x').and_then(|(w, h)| Some((parse(w)?, parse(h)?)));
    sides.ok_or_else(|| format!("`{text}`: expected WIDTHxHEIGHT, such as 512x512"))
}

impl Generate {
    pub(crate) fn run(&self, bars: &MultiProgress) -> Result<()> {
        let folder = self.model.clone().map_or_else(default_model, Ok)?;
        if !folder.exists() {
            return Err(Error::File { path: folder, message: "no such model; expected a folder".into() });
        }
        let shipped = is_shipped(&folder);
        let device = diffusion::device(&self.device)?;
        let dtype = diffusion::dtype(&self.dtype)?;
        let plugin = self.plugin_choice(&folder, shipped)?;
        let mut session = Session::load(&folder, dtype, &device, plugin.as_ref())?;
        for (name, value) in [("eta", self.eta), ("monitor", self.monitor.then_some(1.))] {
            value.map(|value| session.set_param(name, value)).transpose()?;
        }
        let request = self.request(&session, shipped, &device)?;
        let images = self.image_paths(request.start.dim(0)?);
        images.iter().chain(&self.report).try_for_each(|path| check_output(path))?;
        let bar = bars.add(ProgressBar::new(self.steps as u64).with_style(bar_style()));
        let mut outcome = session.run(&request, &mut |_, record| {
            if let Some(score) = record.and_then(host_demo::StepRecord::mean_score) {
                bar.set_message(format!("score {score:.3}"));
            }
            bar.inc(1);
        })?;
        bar.finish();
        let started = Instant::now();
        let images = session.decode(&outcome.latents)?;
        outcome.seconds.decode = started.elapsed().as_secs_f64();

        let settings = self.settings(&folder, plugin, &session, &request)?;
        let files = self.save_images(&images, &settings)?;
        match &self.report {
            None => Ok(()),
            Some(path) => write_json(
                path,
                &Report {
                    settings,
                    steps: outcome.steps,
                    lora_entries: outcome.lora_entries,
                    seconds: outcome.seconds,
                    peak_memory_bytes: peak_bytes(),
                    plugin_memory_bytes: session.plugin_memory(),
                    images: files,
                },
            ),
        }
    }

    /// What was asked for and what the defaults made of it.
    fn settings(
        &self,
        model: &Path,
        plugin: Option<PluginChoice>,
        session: &Session,
        request: &Request,
    ) -> Result<Settings> {
        let (batch, _, h, w) = request.start.dims4()?;
        let library = plugin.as_ref().map(|choice| choice.library.display().to_string());
        let mut config = plugin.map(|choice| choice.config);
        if let Some(Value::Object(config)) = &mut config {
            config.extend(self.eta.map(|eta| ("eta".into(), json!(eta))));
            config.extend(self.monitor.then(|| ("monitor".into(), json!(true))));
        }
        Ok(Settings {
            prompt: self.prompt.clone(),
            negative: self.negative.clone(),
            model: model.display().to_string(),
            plugin: library,
            config,
            scheduler: "ddim",
            steps: self.steps,
            guidance: request.guidance,
            seed: self.seed,
            batch,
            width: w * session.latent_scale(),
            height: h * session.latent_scale(),
            latents: self.latents.as_ref().map(|path| path.display().to_string()),
            device: self.device.clone(),
            dtype: self.dtype.clone(),
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
            Rgb::from_tensor(&images.get(item)?)?
                .save_png(path, &[("prompt", self.prompt.clone()), ("host-demo", text)])?;
            eprintln!("{}", path.display());
        }
        Ok(paths.iter().map(|path| path.display().to_string()).collect())
    }

    /// Where the pictures of a batch go.
    fn image_paths(&self, batch: usize) -> Vec<PathBuf> {
        if batch == 1 { vec![self.out.clone()] } else { (0..batch).map(|item| numbered(&self.out, item)).collect() }
    }

    fn request(&self, session: &Session, shipped: bool, device: &candle_core::Device) -> Result<Request> {
        let start = match &self.latents {
            Some(path) => {
                let latents = latents_from_file(path, session.latent_channels(), device)?;
                let (found, asked) = (latents.dim(0)?, self.batch);
                if asked.is_some_and(|batch| batch != found) {
                    let message = format!("holds {found} item(s), --batch asks for {}", asked.unwrap_or_default());
                    return Err(Error::File { path: path.clone(), message });
                }
                latents
            }
            None => {
                let scale = session.latent_scale();
                let (width, height) = self
                    .size
                    .or_else(|| session.native_size())
                    .ok_or_else(|| Error::Request("the model does not say its size; give --size".into()))?;
                if width % scale != 0 || height % scale != 0 {
                    return Err(Error::Request(format!("--size {width}x{height}: both must be divisible by {scale}")));
                }
                let batch = self.batch.unwrap_or(1);
                if batch == 0 {
                    return Err(Error::Request("--batch 0: nothing to draw".into()));
                }
                let shape = [batch, session.latent_channels(), height / scale, width / scale];
                seeded_noise(self.seed, shape, device)?
            }
        };
        let guidance = self.guidance.unwrap_or(if shipped { 4. } else { 7.5 });
        if !guidance.is_finite() {
            return Err(Error::Request(format!("--guidance {guidance}: expected a finite number")));
        }
        Ok(Request {
            prompts: vec![self.prompt.clone(); start.dim(0)?],
            negative: self.negative.clone(),
            steps: self.steps,
            guidance,
            start,
        })
    }
}

/// Whether the folder is the shipped model, by whatever path.
fn is_shipped(folder: &Path) -> bool {
    let same = |shipped: PathBuf| Some(folder.canonicalize().ok()? == shipped.canonicalize().ok()?);
    default_model().ok().and_then(same).unwrap_or(false)
}

fn bar_style() -> ProgressStyle {
    let template = "{bar:32} {pos}/{len} steps, {elapsed} of {duration}  {msg}";
    ProgressStyle::with_template(template).expect("the template is valid")
}

fn write_json(path: &Path, report: &Report) -> Result<()> {
    let text = serde_json::to_string_pretty(report).expect("a report is plain data");
    write_whole(path, (text + "\n").as_bytes())
}

/// `dir/out.png` to `dir/out-3.png`.
fn numbered(path: &Path, item: usize) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map_or_else(|| "png".into(), |e| e.to_string_lossy());
    path.with_file_name(format!("{stem}-{item}.{extension}"))
}
