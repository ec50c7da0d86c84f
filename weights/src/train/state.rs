use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use diffusion::{Checkpoint, RawTensor, save_safetensors};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{AdamW, AdamWSettings, Moments};
use crate::{Error, Result};

/// Where training stands: parameters, the optimiser's moments, the step, and the settings that it runs by.
pub(super) struct State {
    pub(super) step: u64,
    pub(super) settings: Value,
    pub(super) parameters: HashMap<String, Tensor>,
    moments: BTreeMap<String, Moments>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    step: u64,
    settings: Value,
    /// Steps in which each parameter had a gradient.
    gradients: BTreeMap<String, u64>,
}

const ENTRY: &str = "dpt_training";
const PARTS: [&str; 3] = ["parameter", "mean", "square"];

/// The state's file in a training run's folder.
pub(super) const FILE: &str = "state.safetensors";

/// Writes it whole, or leaves the one that was there.
pub(super) fn save(
    path: &Path,
    step: u64,
    settings: &Value,
    parameters: &BTreeMap<String, Var>,
    optimiser: &AdamW,
) -> Result<()> {
    let mut tensors = Vec::new();
    for (name, variable) in parameters {
        tensors.push((format!("parameter.{name}"), RawTensor::of(variable)?));
    }
    for (name, Moments { mean, square, .. }) in optimiser.moments() {
        tensors.push((format!("mean.{name}"), RawTensor::of(mean)?));
        tensors.push((format!("square.{name}"), RawTensor::of(square)?));
    }
    let gradients = optimiser.moments().iter().map(|(name, moments)| (name.clone(), moments.steps)).collect();
    let header = Header { step, settings: settings.clone(), gradients };
    let header = serde_json::to_string(&header).expect("plain data");
    Ok(save_safetensors(path, tensors, BTreeMap::from([(ENTRY.to_owned(), header)]))?)
}

impl State {
    pub(super) fn open(path: &Path, device: &Device) -> Result<Self> {
        let file = Checkpoint::open(path, DType::F32, device)?;
        let metadata = file.metadata()?;
        let header = metadata.get(ENTRY).ok_or_else(|| Error::file(path, "is not the state of a training run"))?;
        let Header { step, settings, gradients } = serde_json::from_str(header).map_err(|e| Error::file(path, e))?;
        let mut parts = PARTS.map(|_| HashMap::new());
        for name in file.names() {
            let (part, parameter) = name.split_once('.').unwrap_or((&name, ""));
            let index = PARTS.iter().position(|known| *known == part);
            let index = index.ok_or_else(|| Error::file(path, format!("tensor `{name}` is not of a training run")))?;
            let shape = file.root().shape(&name).unwrap_or_default();
            parts[index].insert(parameter.to_owned(), file.root().tensor(&name, &shape)?);
        }
        let [parameters, means, mut squares] = parts;
        let whole = |(name, mean): (String, Tensor)| match (squares.remove(&name), gradients.get(&name)) {
            (Some(square), Some(steps)) => Ok((name, Moments { steps: *steps, mean, square })),
            _ => Err(Error::file(path, format!("of the moments of `{name}` only the mean is there"))),
        };
        let moments = means.into_iter().map(whole).collect::<Result<_>>()?;
        Ok(Self { step, settings, parameters, moments })
    }

    /// Fails when the run was begun with other settings, and names the first that differs.
    pub(super) fn check(&self, path: &Path, settings: &Value) -> Result<()> {
        let empty = serde_json::Map::new();
        let (before, now) = (self.settings.as_object().unwrap_or(&empty), settings.as_object().unwrap_or(&empty));
        let differing = before.keys().chain(now.keys()).find(|key| before.get(*key) != now.get(*key));
        let value = |of: &serde_json::Map<String, Value>, key: &str| of.get(key).cloned().unwrap_or(Value::Null);
        match differing {
            None => Ok(()),
            Some(key) => {
                let (before, now) = (value(before, key), value(now, key));
                Err(Error::file(path, format!("was begun with {key} {before}, not {now}")))
            }
        }
    }

    /// Puts the parameters' values back.
    pub(super) fn restore(&self, path: &Path, parameters: &BTreeMap<String, Var>) -> Result<()> {
        if let Some(name) = self.parameters.keys().find(|name| !parameters.contains_key(*name)) {
            return Err(Error::file(path, format!("holds a parameter `{name}`, which this model does not have")));
        }
        for (name, variable) in parameters {
            let value = self.parameters.get(name);
            let value = value.filter(|value| value.dims() == variable.dims()).ok_or_else(|| {
                let expected = variable.dims();
                let found = value.map(|value| value.dims().to_vec());
                Error::file(path, format!("parameter `{name}`: expected {expected:?}, found {found:?}"))
            })?;
            variable.set(value)?;
        }
        Ok(())
    }

    pub(super) fn optimiser(self, settings: AdamWSettings) -> AdamW {
        AdamW::new(settings, self.moments)
    }
}
