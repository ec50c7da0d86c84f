//! Options that commands share: which model and plugin, and how to sample.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use clap::{Args, ValueEnum};
use diffusion::LoadOptions;
use diffusion::scheduler::{Prediction, Scheduler};
use host_demo::{
    Error, Loading, LoraRecord, Mode, PluginChoice, Request, Result, Session, ShowProgress, default_model, write_whole,
};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Serialize;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum GradientSource {
    /// This program's U-Net, through the interface.
    Host,
    /// The plugin's own U-Net, loaded from the same model.
    Plugin,
    /// The plugin's own U-Net, on this program's weights.
    Weights,
    /// This program's, between the two halves of the plugin's step.
    Split,
}

impl GradientSource {
    /// As the plugin's configuration has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Plugin => "plugin",
            Self::Weights => "weights",
            Self::Split => "split",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ModeName {
    /// Both halves of the guidance and the step see the corrected latents (Eq. 9).
    Paper,
    /// The conditional half alone, as in the authors' release.
    ConditionOnly,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PredictionName {
    /// The noise.
    Epsilon,
    /// The velocity (SD 2.x at 768 pixels).
    V,
}

/// What is loaded.
#[derive(Args)]
pub(crate) struct ModelOptions {
    /// Folder in the diffusers layout, or a single file under LDM's names [default: the shipped weights/shapes]
    #[arg(long, value_name = "DIR|FILE")]
    pub(crate) model: Option<PathBuf>,
    /// What the model predicts [default: what it says of itself; a single file that says nothing: epsilon]
    #[arg(long, value_enum)]
    prediction: Option<PredictionName>,
    /// Folder of configurations for a single file that is not of Stable Diffusion's sizes
    #[arg(long, value_name = "DIR", requires = "model")]
    pub(crate) configs: Option<PathBuf>,
    /// The plugin's shared library; for --device cuda the one named like it with _cuda behind, where it is [default: libdpt beside
    /// this program]
    #[arg(long, value_name = "LIB")]
    pub(crate) plugin: Option<PathBuf>,
    /// The plugin's configuration, a JSON file or JSON text; with the shipped model its adapter is the default
    #[arg(long, value_name = "FILE|JSON")]
    pub(crate) config: Option<String>,
    /// Whose U-Net computes the gradient
    #[arg(long, value_enum)]
    pub(crate) gradient: Option<GradientSource>,
    /// LoRA weights of the host's own, merged before the plugin's; may be given several times [strength: 1]
    #[arg(long, value_name = "FILE[:STRENGTH]", value_parser = parse_lora)]
    pub(crate) lora: Vec<(PathBuf, f64)>,
    /// Where to compute: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    pub(crate) device: String,
    /// What the model computes in: f32, f16 or bf16
    #[arg(long, default_value = "f32")]
    pub(crate) dtype: String,
}

/// `a.safetensors:0.5`; a colon that no number follows is part of the name.
fn parse_lora(text: &str) -> std::result::Result<(PathBuf, f64), String> {
    let split = text.rsplit_once(':').and_then(|(path, strength)| Some((path, strength.parse::<f64>().ok()?)));
    let (path, strength) = split.unwrap_or((text, 1.));
    if path.is_empty() || !strength.is_finite() {
        return Err(format!("`{text}`: expected FILE or FILE:STRENGTH with a finite number"));
    }
    Ok((path.into(), strength))
}

/// A loaded model, and what the defaults made of the options.
pub(crate) struct Loaded {
    pub(crate) session: Session,
    pub(crate) folder: PathBuf,
    pub(crate) device: candle_core::Device,
    pub(crate) plugin: Option<PluginChoice>,
    /// The host's own LoRA files.
    pub(crate) lora: Vec<LoraRecord>,
    /// Whether it is the model that comes with this program.
    pub(crate) shipped: bool,
}

impl ModelOptions {
    /// Loads the model and, unless it is not wanted, the plugin.
    pub(crate) fn load(&self, with_plugin: bool, bars: &MultiProgress) -> Result<Loaded> {
        let folder = self.model.clone().map_or_else(default_model, Ok)?;
        if !folder.exists() {
            return Err(Error::File { path: folder, message: "no such model; expected a folder or a file".into() });
        }
        let shipped = is_shipped(&folder);
        let device = diffusion::device(&self.device)?;
        let dtype = diffusion::dtype(&self.dtype)?;
        let plugin = with_plugin.then(|| self.plugin_choice(&folder, shipped, &device)).transpose()?;
        let prediction = self.prediction.map(|prediction| match prediction {
            PredictionName::Epsilon => Prediction::Epsilon,
            PredictionName::V => Prediction::Velocity,
        });
        let options = LoadOptions { prediction, configs: self.configs.clone() };
        let loading = Loading { options, progress: Some(show_progress(bars)) };
        let mut session = Session::load_with(&folder, loading, dtype, &device, plugin.as_ref())?;
        let lora = session.set_lora(&self.lora)?;
        let lora = self.lora.iter().zip(lora).map(|((path, strength), file)| LoraRecord::new(path, *strength, &file));
        Ok(Loaded { session, folder, device, plugin, shipped, lora: lora.collect() })
    }
}

/// A bar for the plugin's task that goes when the task is done.
fn show_progress(bars: &MultiProgress) -> ShowProgress {
    let bars = bars.clone();
    let bar = Mutex::new(None::<ProgressBar>);
    Box::new(move |task, done, total| {
        let mut bar = bar.lock().unwrap_or_else(PoisonError::into_inner);
        if done >= total {
            if let Some(bar) = bar.take() {
                bar.finish_and_clear();
            }
            return;
        }
        let bar = bar.get_or_insert_with(|| bars.add(ProgressBar::new(total).with_style(task_style())));
        bar.set_message(format!("plugin: {task}"));
        bar.set_position(done);
    })
}

fn task_style() -> ProgressStyle {
    ProgressStyle::with_template("{bar:32} {pos}/{len}  {msg}").expect("the template is valid")
}

/// Whether the folder is the shipped model, by whatever path.
fn is_shipped(folder: &Path) -> bool {
    let same = |shipped: PathBuf| Some(folder.canonicalize().ok()? == shipped.canonicalize().ok()?);
    default_model().ok().and_then(same).unwrap_or(false)
}

/// How to sample, whatever is drawn.
#[derive(Args)]
pub(crate) struct SamplingOptions {
    /// What to lead away from.
    #[arg(long, default_value = "")]
    pub(crate) negative: String,
    /// ddim, euler, pndm or dpmpp-2m [default: the model's own where it is one of these, else ddim]
    #[arg(long, value_name = "NAME")]
    scheduler: Option<Scheduler>,
    /// Number of steps.
    #[arg(long, default_value_t = 25)]
    pub(crate) steps: usize,
    /// Classifier-free guidance; 1 is none [default: 4 for the shipped model, else 7.5]
    #[arg(long, value_name = "F")]
    guidance: Option<f64>,
    /// Who sees the corrected latents
    #[arg(long, value_enum, default_value = "paper")]
    mode: ModeName,
    /// Width and height in pixels [default: the model's own]
    #[arg(long, value_name = "WxH", value_parser = parse_size)]
    size: Option<(usize, usize)>,
}

fn parse_size(text: &str) -> std::result::Result<(usize, usize), String> {
    let parse = |side: &str| side.parse::<usize>().ok().filter(|side| *side > 0);
    let sides = text.split_once('x').and_then(|(w, h)| Some((parse(w)?, parse(h)?)));
    sides.ok_or_else(|| format!("`{text}`: expected WIDTHxHEIGHT, such as 512x512"))
}

impl SamplingOptions {
    /// Latents' channels, height and width.
    pub(crate) fn latents_shape(&self, session: &Session) -> Result<[usize; 3]> {
        let scale = session.latent_scale();
        let (width, height) = self
            .size
            .or_else(|| session.native_size())
            .ok_or_else(|| Error::Request("the model does not say its size; give --size".into()))?;
        if width % scale != 0 || height % scale != 0 {
            return Err(Error::Request(format!("--size {width}x{height}: both must be divisible by {scale}")));
        }
        Ok([session.latent_channels(), height / scale, width / scale])
    }

    /// A run of these prompts from that noise.
    pub(crate) fn request(&self, loaded: &Loaded, prompts: Vec<String>, noise: candle_core::Tensor) -> Result<Request> {
        let guidance = self.guidance.unwrap_or(if loaded.shipped { 4. } else { 7.5 });
        if !guidance.is_finite() {
            return Err(Error::Request(format!("--guidance {guidance}: expected a finite number")));
        }
        let scheduler = self.scheduler.unwrap_or_else(|| loaded.session.default_scheduler());
        let mode = match self.mode {
            ModeName::Paper => Mode::Paper,
            ModeName::ConditionOnly => Mode::ConditionOnly,
        };
        let negative = self.negative.clone();
        Ok(Request { negative, mode, ..Request::new(prompts, scheduler, self.steps, guidance, noise) })
    }
}

pub(crate) fn bar_style() -> ProgressStyle {
    let template = "{bar:32} {pos}/{len} steps, {elapsed} of {duration}  {msg}";
    ProgressStyle::with_template(template).expect("the template is valid")
}

/// Writes plain data as JSON; the file appears whole or not at all.
pub(crate) fn write_json(path: &Path, data: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(data).expect("plain data");
    write_whole(path, (text + "\n").as_bytes())
}
