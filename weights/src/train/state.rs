use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use diffusion::{Checkpoint, RawTensor, save_safetensors};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{AdamW, AdamWSettings};
use crate::{Error, Result};

/// Where training stands: parameters, the optimiser's moments, the step, and the settings that it runs by.
pub(super) struct State {
    pub(super) step: u64,
    pub(super) settings: Value,
    pub(super) parameters: HashMap<String, Tensor>,
    pub(super) moments: BTreeMap<String, (Tensor, Tensor)>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    step: u64,
    settings: Value,
}

const ENTRY: &str = "dpt_training";
const PARTS: [&str; 3] = ["parameter", "mean", "square"];

/// The state's file in a training run's folder.
pub(super) fn path(folder: &Path) -> PathBuf {
    folder.join("state.safetensors")
}

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
    for (name, (mean, square)) in optimiser.moments() {
        tensors.push((format!("mean.{name}"), RawTensor::of(mean)?));
        tensors.push((format!("square.{name}"), RawTensor::of(square)?));
    }
    let header = Header { step, settings: settings.clone() };
    let header = serde_json::to_string(&header).expect("plain data");
    Ok(save_safetensors(path, tensors, BTreeMap::from([(ENTRY.to_owned(), header)]))?)
}

impl State {
    pub(super) fn open(path: &Path, device: &Device) -> Result<Self> {
        let file = Checkpoint::open(path, DType::F32, device)?;
        let metadata = file.metadata()?;
        let header = metadata.get(ENTRY).ok_or_else(|| Error::file(path, "is not the state of a training run"))?;
        let Header { step, settings } = serde_json::from_str(header).map_err(|e| Error::file(path, e))?;
        let mut parts = PARTS.map(|_| HashMap::new());
        for name in file.names() {
            let (part, parameter) = name.split_once('.').unwrap_or((&name, ""));
            let index = PARTS.iter().position(|known| *known == part);
            let index = index.ok_or_else(|| Error::file(path, format!("tensor `{name}` is not of a training run")))?;
            let shape = file.root().shape(&name).unwrap_or_default();
            parts[index].insert(parameter.to_owned(), file.root().tensor(&name, &shape)?);
        }
        let [parameters, means, mut squares] = parts;
        let pair = |(name, mean): (String, Tensor)| {
            let square = squares.remove(&name);
            let square = square.ok_or_else(|| Error::file(path, format!("`{name}` has a mean and no square")))?;
            Ok((name, (mean, square)))
        };
        let moments = means.into_iter().map(pair).collect::<Result<_>>()?;
        Ok(Self { step, settings, parameters, moments })
    }

    /// Fails when the run was begun with other settings, and names the first that differs.
    pub(super) fn check(&self, path: &Path, settings: &Value) -> Result<()> {
        let differing = |(key, now): (&String, &Value)| {
            let before = self.settings.get(key).unwrap_or(&Value::Null);
            (before != now).then(|| format!("was begun with {key} {before}, not {now}"))
        };
        match settings.as_object().into_iter().flatten().find_map(differing) {
            None => Ok(()),
            Some(message) => Err(Error::file(path, message)),
        }
    }

    /// Puts the parameters' values back.
    pub(super) fn restore(&self, path: &Path, parameters: &BTreeMap<String, Var>) -> Result<()> {
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
        AdamW::resumed(settings, self.step, self.moments)
    }
}
