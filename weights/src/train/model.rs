use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use diffusion::lora::{LoraLayout, LoraModule, LoraPart, Network};
use diffusion::scheduler::SchedulerConfig;
use diffusion::{Checkpoint, LoraEntry, RawTensor, UNet, save_safetensors};
use dpt_plugin::{Adapter, AdapterSizes, Draw};
use serde_json::json;

use crate::world::Random;
use crate::{Discriminator, Result};

/// Which attention gets low-rank changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LoraLayers {
    /// The cross-attention (paper).
    Cross,
    /// Every self- and cross-attention (release).
    All,
}

/// A discriminator whose adapter, and in the second stage low-rank changes of whose U-Net, are trained.
pub struct Model {
    discriminator: Discriminator,
    /// Adapter and low-rank factors, by their names in the released checkpoint.
    parameters: BTreeMap<String, Var>,
    /// The factors again: their tensors are the parameters'.
    lora: Vec<LoraEntry>,
}

/// Parameters that a module's factors have.
fn factor_names(module: &str) -> [String; 2] {
    let module = LoraModule { network: Network::UNet, path: module.to_owned() };
    [LoraPart::Down, LoraPart::Up].map(|part| {
        module.name(LoraLayout::Release, part).expect("an attention projection, which the release has names for")
    })
}

fn parameter_dtype(unet: &UNet) -> DType {
    if unet.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

/// The tensors of an untrained adapter.
pub fn untrained(sizes: &AdapterSizes, random: &mut Random, device: &Device) -> Result<HashMap<String, Tensor>> {
    let mut draw = |kind| match kind {
        Draw::Uniform => random.unit() as f32,
        Draw::Normal => random.normal(),
    };
    Ok(sizes.initial(&mut draw, device)?)
}

/// Untrained factors of a U-Net's attention: `up` is zero, so that nothing is changed yet.
pub fn untrained_lora(unet: &UNet, layers: LoraLayers, rank: usize, random: &mut Random) -> Result<Vec<LoraEntry>> {
    let chosen = |path: &str| layers == LoraLayers::All || path.contains(".attn2.");
    let entry = |(module, weight): (String, &Tensor)| -> Result<LoraEntry> {
        let (outputs, inputs) = weight.dims2()?;
        // As diffusers' LoRALinearLayer: a deviation of 1 / rank.
        let down = random.normals(rank * inputs).into_iter().map(|v| v / rank as f32).collect::<Vec<_>>();
        Ok(LoraEntry {
            module,
            down: Tensor::from_vec(down, (rank, inputs), unet.device())?,
            up: Tensor::zeros((outputs, rank), DType::F32, unet.device())?,
            scale: 1.,
        })
    };
    unet.projections().filter(|(path, _)| chosen(path)).map(entry).collect()
}

impl Model {
    /// `adapter` holds the adapter's tensors in the released names, `lora` factors without alpha; both become variables.
    pub fn new(
        unet: UNet,
        sizes: AdapterSizes,
        adapter: HashMap<String, Tensor>,
        lora: Vec<LoraEntry>,
        scheduler: &SchedulerConfig,
    ) -> Result<Self> {
        let dtype = parameter_dtype(&unet);
        let mut parameters = BTreeMap::new();
        let mut variable = |name: &str, tensor: &Tensor| -> Result<Tensor> {
            let variable = Var::from_tensor(&tensor.to_dtype(dtype)?.force_contiguous()?)?;
            let tensor = variable.as_tensor().clone();
            parameters.insert(name.to_owned(), variable);
            Ok(tensor)
        };
        let tensors = adapter.iter().map(|(name, t)| Ok((name.clone(), variable(name, t)?)));
        let tensors = tensors.collect::<Result<HashMap<_, _>>>()?;
        let entry = |entry: LoraEntry| -> Result<LoraEntry> {
            let [down, up] = factor_names(&entry.module);
            // The release has no place for a scale.
            let scaled = (&entry.up * entry.scale)?;
            Ok(LoraEntry { down: variable(&down, &entry.down)?, up: variable(&up, &scaled)?, scale: 1., ..entry })
        };
        let lora = lora.into_iter().map(entry).collect::<Result<Vec<_>>>()?;
        let checkpoint = Checkpoint::from_tensors(Path::new("adapter"), tensors, dtype, unet.device());
        let adapter = Adapter::load(&checkpoint.root(), sizes)?;
        checkpoint.finish()?;
        let mut model = Self { discriminator: Discriminator::new(unet, adapter, scheduler)?, parameters, lora };
        model.refresh()?;
        Ok(model)
    }

    /// What is trained, as it is now.
    pub fn discriminator(&self) -> &Discriminator {
        &self.discriminator
    }

    /// The low-rank changes.
    pub fn lora(&self) -> &[LoraEntry] {
        &self.lora
    }

    /// What is trained.
    pub fn parameters(&self) -> &BTreeMap<String, Var> {
        &self.parameters
    }

    /// The precision of parameters and losses: f32, or f64 where the U-Net has it.
    pub fn dtype(&self) -> DType {
        parameter_dtype(self.discriminator.unet())
    }

    /// Makes what follows from the parameters follow: bounds the temperature and merges the factors as they are now. To be
    /// called after every step.
    pub fn refresh(&mut self) -> Result<()> {
        // 1 / tau stays below this, as CLIP has it.
        const MOST_SCALE: f64 = 100.;
        let scale = &self.parameters["logit_scale"];
        scale.set(&scale.as_detached_tensor().minimum(MOST_SCALE.ln())?)?;
        if !self.lora.is_empty() {
            self.discriminator.unet.restore_lora();
            let detach = |e: &LoraEntry| LoraEntry { down: e.down.detach(), up: e.up.detach(), ..e.clone() };
            let now: Vec<_> = self.lora.iter().map(detach).collect();
            self.discriminator.merge_lora(&now)?;
        }
        Ok(())
    }

    /// The gradients of a module's factors under their parameters' names.
    pub(super) fn lora_gradients(
        &self,
        gradients: BTreeMap<String, diffusion::LoraGradient>,
    ) -> impl Iterator<Item = (String, Tensor)> {
        gradients.into_iter().flat_map(|(module, gradient)| {
            let [down, up] = factor_names(&module);
            [(down, gradient.down), (up, gradient.up)]
        })
    }

    /// Writes adapter and low-rank changes as one file in the released names, with the sizes and `training` in its header;
    /// the plugin loads it as it is.
    pub fn save(&self, path: &Path, training: &serde_json::Value) -> Result<()> {
        let sizes = self.discriminator.adapter().sizes();
        let dpt = json!({
            "tap": sizes.tap,
            "heads": sizes.heads,
            "matching_queries": sizes.matching_queries,
            "training": training,
        });
        let tensor = |(name, variable): (&String, &Var)| Ok((name.clone(), RawTensor::of(variable)?));
        let tensors = self.parameters.iter().map(tensor).collect::<Result<Vec<_>>>()?;
        let metadata = BTreeMap::from([("dpt".to_owned(), dpt.to_string())]);
        Ok(save_safetensors(path, tensors, metadata)?)
    }
}
