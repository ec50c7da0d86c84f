//! A loaded model with the plugin that hooks into its steps.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device};
use diffusion::lora::{LoraFile, stack};
use diffusion::scheduler::{NoiseSchedule, Prediction, Scheduler, SchedulerConfig};
use diffusion::{LoadOptions, LoraEntry, Pipeline, TextModel, Vae};
use host_api::Model;
use host_api::host::{Instance, Library};
use serde_json::Value;

use crate::host::{DemoHost, ShowProgress};
use crate::{Error, Result};

/// A plugin to load.
#[derive(Debug, Clone)]
pub struct PluginChoice {
    /// The shared library, in its flavour for the device ([`Library::open_for`]); its first plugin is used.
    pub library: PathBuf,
    /// The plugin's configuration.
    pub config: Value,
    /// Whether the host computes features and gradient itself and calls the plugin's two halves of a step
    /// (`sampler-hook.split/1`), rather than the step.
    pub split: bool,
}

/// What is said about loading; the default says nothing.
#[derive(Default)]
pub struct Loading {
    /// What the model does not say of itself.
    pub options: LoadOptions,
    /// Shows what the plugin is busy with.
    pub progress: Option<ShowProgress>,
}

/// A model, and maybe a plugin, ready to sample.
pub struct Session {
    pub(crate) text: TextModel,
    pub(crate) vae: Vae,
    pub(crate) scheduler: SchedulerConfig,
    pub(crate) host: Arc<DemoHost>,
    pub(crate) plugin: Option<Instance>,
    /// The host's own LoRA weights, which every run merges before the plugin's.
    pub(crate) lora: Vec<LoraEntry>,
    /// See [`PluginChoice::split`].
    pub(crate) split: bool,
    /// Seconds that loading took.
    pub load_seconds: f64,
}

impl Session {
    /// Loads a diffusers folder or a single file, and creates and prepares the plugin for it.
    pub fn load(model: &Path, dtype: DType, device: &Device, plugin: Option<&PluginChoice>) -> Result<Self> {
        Self::load_with(model, Loading::default(), dtype, device, plugin)
    }

    /// The same, with more to say.
    pub fn load_with(
        model: &Path,
        loading: Loading,
        dtype: DType,
        device: &Device,
        plugin: Option<&PluginChoice>,
    ) -> Result<Self> {
        let started = Instant::now();
        let pipeline = Pipeline::load_with(model, &loading.options, dtype, device)?;
        let family = pipeline.family();
        let Pipeline { text, unet, vae, scheduler } = pipeline;
        let unet_in_channels = unet.config().in_channels;
        let host = Arc::new(DemoHost::new(unet, loading.progress));
        let split = plugin.is_some_and(|choice| choice.split);
        let plugin = match plugin {
            None => None,
            Some(choice) => {
                let (library, passed_over) =
                    Library::open_for(&choice.library, tensor_views::name(device)).map_err(Error::plugin("load"))?;
                if let Some(why) = passed_over {
                    log::warn!("the plugin's build for CUDA is not used: {}", why.message);
                }
                let id = library
                    .descriptors()
                    .first()
                    .map(|d| d.id)
                    .ok_or_else(|| Error::Request(format!("{} holds no plugin", choice.library.display())))?;
                let mut instance =
                    library.create(id, host.clone(), &choice.config.to_string()).map_err(Error::plugin("create"))?;
                let config = host.unet().config().to_json();
                let noise = NoiseSchedule::new(&scheduler)?;
                let model = Model {
                    family,
                    prediction: match scheduler.prediction {
                        Prediction::Epsilon => host_api::Prediction::Epsilon,
                        Prediction::Velocity => host_api::Prediction::V,
                    },
                    unet_in_channels,
                    latent_channels: vae.config().latent_channels,
                    alphas_cumprod: noise.alphas_cumprod(),
                    unet_config: Some(&config),
                };
                prepare(&mut instance, &model, &host, device)?;
                Some(instance)
            }
        };
        let load_seconds = started.elapsed().as_secs_f64();
        Ok(Self { text, vae, scheduler, host, plugin, lora: Vec::new(), split, load_seconds })
    }

    /// Sets a live parameter of the plugin.
    pub fn set_param(&mut self, name: &str, value: f64) -> Result<()> {
        let plugin = self.plugin.as_ref().ok_or_else(|| Error::Request(format!("no plugin to set `{name}` of")))?;
        let params = plugin.params().map_err(Error::plugin("parameters"))?;
        let params = params.ok_or_else(|| Error::Request("the plugin has no parameters".into()))?;
        params.set(name, value).map_err(Error::plugin(format_args!("set `{name}`")))
    }

    /// Takes the host's own LoRA files, each with a strength, in place of those it had. Fails, and changes nothing, when one
    /// cannot be read or does not fit the U-Net. Returns what of each is not applied.
    pub fn set_lora(&mut self, files: &[(PathBuf, f64)]) -> Result<Vec<LoraFile>> {
        let mut unet = self.host.unet();
        let open = |(path, _): &(PathBuf, f64)| -> Result<LoraFile> { Ok(LoraFile::open(path, unet.device())?) };
        let opened = files.iter().map(open).collect::<Result<Vec<_>>>()?;
        for warning in opened.iter().filter_map(LoraFile::warning) {
            log::warn!("{warning}");
        }
        let with_strength = opened.iter().zip(files).map(|(file, (_, strength))| (file.entries.clone(), *strength));
        let lora = stack(&with_strength.collect::<Vec<_>>())?;
        unet.merge_lora(&lora, 1.)?;
        unet.restore_lora();
        drop(unet);
        self.lora = lora;
        Ok(opened)
    }

    /// The sampler that the model's configuration names, where it is one of those that are implemented; DDIM, which every
    /// model can be sampled with, otherwise.
    pub fn default_scheduler(&self) -> Scheduler {
        self.scheduler.scheduler.unwrap_or_else(|| {
            log::info!("the model names no sampler that is implemented here: ddim is used");
            Scheduler::Ddim
        })
    }

    /// Pixels per latent in each direction.
    pub fn latent_scale(&self) -> usize {
        self.vae.config().latent_scale()
    }

    /// Channels of the latents.
    pub fn latent_channels(&self) -> usize {
        self.vae.config().latent_channels
    }

    /// Width and height in pixels that the model was trained at.
    pub fn native_size(&self) -> Option<(usize, usize)> {
        let side = self.host.unet().config().sample_size?.saturating_mul(self.latent_scale());
        Some((side, side))
    }

    /// Path and bits of every attention weight, to see that a run leaves them as they were.
    pub fn attention_weights(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let unet = self.host.unet();
        let bits = |(path, weight): (String, &candle_core::Tensor)| -> Result<_> {
            let mut bytes = Vec::new();
            weight.write_bytes(&mut bytes)?;
            Ok((path, bytes))
        };
        unet.projections().map(bits).collect()
    }

    /// Bytes of weights that the plugin holds.
    pub fn plugin_memory(&self) -> Option<u64> {
        self.plugin.as_ref().map(Instance::memory)
    }
}

/// For latents where the model computes; in main memory where the plugin does not reach there.
fn prepare(instance: &mut Instance, model: &Model<'_>, host: &DemoHost, device: &Device) -> Result<()> {
    let name = tensor_views::name(device);
    match instance.prepare(model, name) {
        Err(error) if error.status == host_api::Status::Unsupported && name != host_api::Device::Cpu => {
            host.lend_on(&Device::Cpu);
            instance.prepare(model, host_api::Device::Cpu).map_err(Error::plugin("prepare"))?;
            log::warn!("tensors cross to the plugin through main memory: {}", error.message);
            Ok(())
        }
        prepared => prepared.map_err(Error::plugin("prepare")),
    }
}
