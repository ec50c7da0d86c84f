use std::path::PathBuf;

use serde::Deserialize;

use crate::{Error, Result, SizeHints};

/// The JSON schema of the configuration, for user interfaces.
pub const SCHEMA: &str = include_str!("config.schema.json");

/// The plugin's configuration. Relative paths start from the process's current directory.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Adapter weights in the released names: safetensors, or a PyTorch pickle.
    pub adapter: PathBuf,
    /// LoRA weights, one file or several, stacked. Absent: those in the adapter's file, if it has any.
    #[serde(default)]
    pub lora: Option<LoraChoices>,
    /// Multiplies every LoRA entry.
    #[serde(default = "one")]
    pub lora_strength: f64,
    /// The model that is sampled, a diffusers folder or a single file, where the plugin computes the gradient with its own
    /// U-Net.
    #[serde(default)]
    pub base_model: Option<PathBuf>,
    /// A folder of configurations for a single file whose model is not of Stable Diffusion's sizes.
    #[serde(default)]
    pub base_configs: Option<PathBuf>,
    /// Who computes features and gradient. Absent: the plugin when there is a `base_model`, else the host through what it
    /// lends, its gradient before its weights.
    #[serde(default)]
    pub gradient: Option<GradientSource>,
    /// The U-Net block that the adapter reads, where its file does not say.
    #[serde(default)]
    pub tap: Option<String>,
    /// The adapter's attention heads, where its file does not say.
    #[serde(default)]
    pub heads: Option<usize>,
    /// How many of the adapter's queries are for matching, where its file does not say.
    #[serde(default)]
    pub matching_queries: Option<usize>,
    /// Where the adapter and the plugin's own U-Net compute: `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "cpu")]
    pub device: String,
    /// What the plugin's own U-Net computes in: `f32`, `f16` or `bf16`.
    #[serde(default = "f32")]
    pub dtype: String,
    /// Threads that the plugin computes on, on the CPU. Absent: as many as there are cores, or as `RAYON_NUM_THREADS` says, shared by
    /// all instances.
    #[serde(default)]
    pub threads: Option<usize>,
    /// On CUDA: launch the kernels of each of a run's steps but the first as one graph.
    #[serde(default = "yes")]
    pub cuda_graphs: bool,
    /// Correct also when the host adds U-Net inputs that the plugin's own U-Net cannot see.
    #[serde(default)]
    pub ignore_extra_inputs: bool,
    /// Step size of the correction (Eq. 9).
    #[serde(default = "half")]
    pub eta: f64,
    /// Share of the steps after which correction starts.
    #[serde(default)]
    pub start: f64,
    /// Share of the steps after which it ends.
    #[serde(default = "one")]
    pub end: f64,
    /// Correct every k-th step of that range.
    #[serde(default = "first")]
    pub every: u32,
    /// Bound on the correction's norm relative to the latents'; 0: none.
    #[serde(default)]
    pub max_correction: f64,
    /// Compute the score also in steps that are not corrected, to report it.
    #[serde(default)]
    pub monitor: bool,
}

/// A file of LoRA weights, in the released names, PEFT's or kohya's.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "LoraText")]
pub struct LoraChoice {
    /// Safetensors, or a PyTorch pickle.
    pub path: PathBuf,
    /// Multiplies its entries.
    pub strength: f64,
}

/// One file or several.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged, expecting = "a LoRA is a path, {\"path\", \"strength\"}, or a list of these")]
pub enum LoraChoices {
    /// One.
    One(LoraChoice),
    /// Several.
    Several(Vec<LoraChoice>),
}

impl LoraChoices {
    /// All of them.
    pub fn list(&self) -> &[LoraChoice] {
        match self {
            Self::One(choice) => std::slice::from_ref(choice),
            Self::Several(choices) => choices,
        }
    }
}

/// How a configuration writes a [`LoraChoice`].
#[derive(Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum LoraText {
    Path(PathBuf),
    Full {
        path: PathBuf,
        #[serde(default = "one")]
        strength: f64,
    },
}

impl TryFrom<LoraText> for LoraChoice {
    type Error = String;

    fn try_from(text: LoraText) -> std::result::Result<Self, String> {
        match text {
            LoraText::Path(path) => Ok(Self { path, strength: 1. }),
            LoraText::Full { path, strength } if strength.is_finite() => Ok(Self { path, strength }),
            LoraText::Full { strength, .. } => {
                Err(format!("a LoRA's strength is {strength}, expected a finite number"))
            }
        }
    }
}

/// Who computes U-Net features and their gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GradientSource {
    /// The host, through its `gradient/1` extension.
    Host,
    /// The plugin's own U-Net, loaded up to the tap from `base_model`.
    Plugin,
    /// The plugin's own U-Net on the host's weights, through its `weights/1` extension.
    Weights,
    /// The host, which calls the plugin's `split/1` extension instead of `step`.
    Split,
}

impl GradientSource {
    /// As it is written in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Plugin => "plugin",
            Self::Weights => "weights",
            Self::Split => "split",
        }
    }
}

fn one() -> f64 {
    1.
}

fn yes() -> bool {
    true
}

fn half() -> f64 {
    0.5
}

fn first() -> u32 {
    1
}

fn cpu() -> String {
    "cpu".into()
}

fn f32() -> String {
    "f32".into()
}

impl Config {
    /// Parses JSON; unknown keys, wrong types and a gradient source that cannot work are errors. The ranges of the live
    /// parameters are checked where they are defined.
    pub fn parse(json: &str) -> Result<Self> {
        if json.trim().is_empty() {
            return Err(Error::Config("it is empty; at least `adapter` must be given".into()));
        }
        let config: Self = serde_json::from_str(json).map_err(|e| Error::Config(e.to_string()))?;
        if config.gradient == Some(GradientSource::Plugin) && config.base_model.is_none() {
            return Err(Error::Config("`gradient` is \"plugin\", which needs a `base_model`".into()));
        }
        if config.threads == Some(0) {
            return Err(Error::Config("`threads` is 0, expected at least 1; leave it out for all cores".into()));
        }
        if !config.lora_strength.is_finite() {
            return Err(Error::Config(format!(
                "`lora_strength` is {}, expected a finite number",
                config.lora_strength
            )));
        }
        Ok(config)
    }

    /// What the configuration says of the adapter's sizes.
    pub fn hints(&self) -> SizeHints {
        SizeHints { tap: self.tap.clone(), heads: self.heads, matching_queries: self.matching_queries }
    }
}

/// The schema, serde's configuration and the parameters say the same.
#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use host_api::plugin::ParamKind;
    use serde_json::{Map, Value, json};

    use super::*;

    fn properties() -> Map<String, Value> {
        let schema: Value = serde_json::from_str(SCHEMA).unwrap();
        assert_eq!(schema["additionalProperties"], false);
        assert_eq!(schema["required"], json!(["adapter"]));
        schema["properties"].as_object().unwrap().clone()
    }

    /// The default configuration with one key.
    fn with(key: &str, value: &Value) -> Result<Config> {
        Config::parse(&json!({"adapter": "a", key: value}).to_string())
    }

    #[test]
    fn the_schema_has_the_fields_of_the_configuration() {
        // serde lists them when it meets one that it does not know.
        let message = with("no such field", &Value::Null).unwrap_err().to_string();
        let (_, listed) = message.split_once("expected one of").unwrap();
        let fields: BTreeSet<_> = listed.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        assert_eq!(fields, properties().keys().cloned().collect());
    }

    #[test]
    fn the_schema_has_the_defaults_of_the_configuration() {
        let without = Config::parse(r#"{"adapter": "a"}"#).unwrap();
        for (key, property) in properties().iter().filter(|(key, _)| *key != "adapter") {
            assert!(!property["description"].as_str().unwrap().is_empty(), "{key}");
            assert_eq!(with(key, property.get("default").expect(key)).unwrap(), without, "{key}");
        }
    }

    #[test]
    fn the_schema_has_the_types_of_the_configuration() {
        for (key, property) in &properties() {
            let values = json!({
                "string": "s", "number": 0.25, "integer": 3, "boolean": true, "null": null, "array": [], "object": {},
            });
            let types = match &property["type"] {
                Value::String(only) => vec![only.clone()],
                Value::Array(types) => types.iter().map(|t| t.as_str().unwrap().to_owned()).collect(),
                // One of a few values instead.
                _ => continue,
            };
            for (name, value) in values.as_object().unwrap() {
                let allowed = types.contains(name) || (name == "integer" && types.iter().any(|t| t == "number"));
                let config = json!({"adapter": "a", "base_model": "b"});
                let mut config = config.as_object().unwrap().clone();
                config.insert(key.clone(), value.clone());
                let parsed = Config::parse(&Value::Object(config).to_string());
                assert_eq!(parsed.is_ok(), allowed, "{key}: {name}");
            }
        }
    }

    #[test]
    fn the_schema_lists_the_choices() {
        let properties = properties();
        for dtype in properties["dtype"]["enum"].as_array().unwrap() {
            diffusion::dtype(dtype.as_str().unwrap()).unwrap();
        }
        let mut sources = Vec::new();
        for source in properties["gradient"]["enum"].as_array().unwrap() {
            let config = json!({"adapter": "a", "base_model": "b", "gradient": source});
            sources.push(Config::parse(&config.to_string()).unwrap().gradient);
        }
        let [host, plugin, weights, split] =
            [GradientSource::Host, GradientSource::Plugin, GradientSource::Weights, GradientSource::Split];
        assert_eq!(sources, [Some(host), Some(plugin), Some(weights), Some(split), None]);
        for source in sources.into_iter().flatten() {
            assert!(properties["gradient"]["enum"].as_array().unwrap().contains(&json!(source.name())));
        }
    }

    #[test]
    fn the_schema_has_the_ranges_of_the_parameters() {
        let properties = properties();
        let params = crate::params::params(&Config::parse(r#"{"adapter": "a"}"#).unwrap()).unwrap();
        for spec in params.specs() {
            let property = &properties[&spec.name];
            let kind = match spec.kind {
                ParamKind::Float { .. } => "number",
                ParamKind::Integer { .. } => "integer",
                ParamKind::Boolean => "boolean",
                ParamKind::Choice(_) => "string",
            };
            assert_eq!(property["type"], kind, "{}", spec.name);
            let default = property["default"].as_f64().unwrap_or_else(|| f64::from(property["default"] == true));
            assert_eq!((default, params.get_by_name(&spec.name).unwrap()), (spec.default, spec.default));
            if kind != "boolean" {
                let range = (property["minimum"].as_f64().unwrap(), property["maximum"].as_f64().unwrap());
                assert_eq!(range, spec.kind.range(), "{}", spec.name);
            }
        }
        // And no key with a range is missing among the parameters.
        let ranged = properties.iter().filter(|(_, property)| property.get("maximum").is_some());
        assert!(ranged.map(|(key, _)| params.index(key)).all(|found| found.is_ok()));
    }
}
