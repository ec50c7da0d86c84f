//! Which plugin is loaded, with which configuration.

use std::path::Path;

use candle_core::Device;
use host_api::host::Library;
use host_demo::{Error, PluginChoice, Result, SHIPPED_ETA, default_adapter, default_plugin};
use serde_json::{Value, json};

use crate::options::{GradientSource, ModelOptions};

/// The plugin of this repository; what is filled in below are keys of its configuration.
const DPT: &str = "dpt";

impl ModelOptions {
    /// The plugin and its configuration: the one given, with the shipped adapter and its strength where the shipped model is used
    /// and no adapter is named. There is no default for other models: an adapter belongs to the model it was trained on.
    pub(crate) fn plugin_choice(&self, model: &Path, shipped: bool, device: &Device) -> Result<PluginChoice> {
        let library = self.plugin.clone().map_or_else(default_plugin, Ok)?;
        let mut config = self.config.as_deref().map_or_else(|| Ok(json!({})), read_config)?;
        let Value::Object(keys) = &mut config else {
            return Err(Error::Request(format!("--config: expected a JSON object, found {config}")));
        };
        let device = tensor_views::name(device);
        let (plugins, passed_over) = Library::open_for(&library, device)
            .map_err(|source| Error::Plugin { call: format!("load {}", library.display()), source })?;
        let is_dpt = plugins.descriptors().first().is_some_and(|plugin| plugin.id == DPT);
        if is_dpt && !keys.contains_key("adapter") {
            if !shipped {
                return Err(Error::Request(format!(
                    "no adapter for {}: give --config '{{\"adapter\": \"FILE\"}}', or use --no-plugin",
                    model.display()
                )));
            }
            keys.insert("adapter".into(), json!(default_adapter()?));
            keys.entry("eta").or_insert(json!(SHIPPED_ETA));
        }
        // On the device where this program computes, in a build that can.
        if is_dpt && device != host_api::Device::Cpu && passed_over.is_none() {
            keys.entry("device").or_insert_with(|| json!(device.to_string()));
        }
        if let Some(source) = self.gradient {
            if !is_dpt {
                return Err(Error::Request("--gradient is for the DPT plugin; configure others with --config".into()));
            }
            keys.insert("gradient".into(), json!(source.name()));
            if source == GradientSource::Plugin {
                keys.entry("base_model").or_insert_with(|| json!(model));
                if let Some(configs) = &self.configs {
                    keys.entry("base_configs").or_insert_with(|| json!(configs));
                }
            }
        }
        let split = is_dpt && keys.get("gradient") == Some(&json!("split"));
        Ok(PluginChoice { library, config, split })
    }
}

fn read_config(text: &str) -> Result<Value> {
    if text.trim_start().starts_with('{') {
        return serde_json::from_str(text).map_err(|e| Error::Request(format!("--config: {e}")));
    }
    let failed = |message: String| Error::File { path: text.into(), message };
    let content = std::fs::read_to_string(text).map_err(|e| failed(e.to_string()))?;
    serde_json::from_str(&content).map_err(|e| failed(e.to_string()))
}
