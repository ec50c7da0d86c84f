//! A plugin's extensions, as a host sees them.

use std::path::Path;
use std::sync::Arc;

use super::plugin::Plugin;
use crate::abi::{
    SH_PARAM_BOOLEAN, SH_PARAM_CHOICE, SH_PARAM_FLOAT, SH_PARAM_INTEGER, SH_PARAM_LIVE, SH_PLUGIN_LORA,
    SH_PLUGIN_PARAMS, sh_lora_entry, sh_param, sh_plugin_lora, sh_plugin_params, sh_string,
};
use crate::error::{Error, Result, Status};
use crate::ffi::{self, read_array, read_string};
use crate::plugin::{LoraEntry, LoraLayout, ParamKind, ParamSpec};
use crate::view::{Reach, View, ViewMut};

/// The parameters of an instance. Usable from any thread, also during a step.
#[derive(Clone)]
pub struct InstanceParams {
    plugin: Arc<Plugin>,
    table: sh_plugin_params,
}

impl InstanceParams {
    pub(super) fn new(plugin: Arc<Plugin>) -> Result<Option<Self>> {
        // SAFETY: the struct of this extension.
        let table = unsafe { plugin.extension::<sh_plugin_params>(SH_PLUGIN_PARAMS) }?;
        Ok(table.map(|table| Self { plugin, table }))
    }

    fn count(&self) -> u32 {
        // SAFETY: the instance lives as long as `self`.
        self.table.count.map_or(0, |count| unsafe { count(self.plugin.as_ptr()) })
    }

    /// All parameters, in the plugin's order.
    pub fn list(&self) -> Result<Vec<ParamSpec>> {
        (0..self.count()).map(|index| self.info(index)).collect()
    }

    fn info(&self, index: u32) -> Result<ParamSpec> {
        let mut raw = sh_param {
            struct_size: ffi::struct_size::<sh_param>(),
            kind: 0,
            name: sh_string::EMPTY,
            description: sh_string::EMPTY,
            unit: sh_string::EMPTY,
            minimum: 0.0,
            maximum: 0.0,
            default_value: 0.0,
            flags: 0,
            choice_count: 0,
            choices: std::ptr::null(),
        };
        // SAFETY: the instance lives as long as `self`; the rest outlives the call.
        self.plugin.call(self.table.info, |f, plugin, error| unsafe { f(plugin, index, &mut raw, error) })?;
        // SAFETY: the plugin's strings are valid until destroy.
        let text = |string| unsafe { read_string(string, "parameter text") };
        let kind = match raw.kind {
            SH_PARAM_FLOAT => ParamKind::Float { minimum: raw.minimum, maximum: raw.maximum },
            SH_PARAM_INTEGER => ParamKind::Integer { minimum: raw.minimum as i64, maximum: raw.maximum as i64 },
            SH_PARAM_BOOLEAN => ParamKind::Boolean,
            SH_PARAM_CHOICE => {
                // SAFETY: as above.
                let names = unsafe { read_array(raw.choices, raw.choice_count.into(), "choices") }?;
                ParamKind::Choice(names.into_iter().map(text).collect::<Result<_>>()?)
            }
            other => {
                return Err(Error::new(Status::Unsupported, format!("parameter {index} is of unknown kind {other}")));
            }
        };
        Ok(ParamSpec {
            name: text(raw.name)?,
            description: text(raw.description)?,
            unit: text(raw.unit)?,
            kind,
            default: raw.default_value,
            live: raw.flags & SH_PARAM_LIVE != 0,
        })
    }

    fn index(&self, name: &str) -> Result<u32> {
        for index in 0..self.count() {
            if self.info(index)?.name == name {
                return Ok(index);
            }
        }
        Err(Error::new(Status::NotFound, format!("the plugin has no parameter {name}")))
    }

    /// The value of that name.
    pub fn get(&self, name: &str) -> Result<f64> {
        let index = self.index(name)?;
        let mut value = 0.0;
        // SAFETY: the instance lives as long as `self`; the rest outlives the call.
        self.plugin.call(self.table.get, |f, plugin, error| unsafe { f(plugin, index, &mut value, error) })?;
        Ok(value)
    }

    /// Sets the value of that name from the next step on.
    pub fn set(&self, name: &str, value: f64) -> Result<()> {
        let index = self.index(name)?;
        // SAFETY: the instance lives as long as `self`.
        self.plugin.call(self.table.set, |f, plugin, error| unsafe { f(plugin, index, value, error) })
    }

    /// JSON schema of the configuration that create takes.
    pub fn schema(&self) -> Result<String> {
        // SAFETY: the instance lives as long as `self`.
        let schema = self.table.schema.map_or(sh_string::EMPTY, |schema| unsafe { schema(self.plugin.as_ptr()) });
        // SAFETY: valid until destroy.
        unsafe { read_string(schema, "schema") }
    }
}

/// The low-rank weights of an instance. Usable from any thread.
#[derive(Clone)]
pub struct InstanceLora {
    plugin: Arc<Plugin>,
    table: sh_plugin_lora,
}

impl InstanceLora {
    pub(super) fn new(plugin: Arc<Plugin>) -> Result<Option<Self>> {
        // SAFETY: the struct of this extension.
        let table = unsafe { plugin.extension::<sh_plugin_lora>(SH_PLUGIN_LORA) }?;
        Ok(table.map(|table| Self { plugin, table }))
    }

    /// Number of entries.
    pub fn count(&self) -> u64 {
        // SAFETY: the instance lives as long as `self`.
        self.table.count.map_or(0, |count| unsafe { count(self.plugin.as_ptr()) })
    }

    /// Copies of all entries.
    pub fn entries(&self) -> Result<Vec<LoraEntry>> {
        (0..self.count()).map(|index| self.entry(index)).collect()
    }

    fn entry(&self, index: u64) -> Result<LoraEntry> {
        let mut raw = sh_lora_entry {
            struct_size: ffi::struct_size::<sh_lora_entry>(),
            rank: 0,
            module: sh_string::EMPTY,
            down: std::ptr::null(),
            up: std::ptr::null(),
            scale: 0.0,
        };
        // SAFETY: the instance lives as long as `self`; the rest outlives the call.
        self.plugin.call(self.table.entry, |f, plugin, error| unsafe { f(plugin, index, &mut raw, error) })?;
        // SAFETY: valid until destroy, for all three.
        let (module, down, up) = unsafe {
            (
                read_string(raw.module, "module")?,
                View::from_raw(raw.down, "down", Reach::MAIN)?,
                View::from_raw(raw.up, "up", Reach::MAIN)?,
            )
        };
        let rank = raw.rank as usize;
        match (down.shape(), up.shape()) {
            (&[down_rank, in_features], &[out_features, up_rank]) if down_rank == rank && up_rank == rank => {
                let (down, up) = (down.to_vec(), up.to_vec());
                Ok(LoraEntry { module, rank, in_features, out_features, down, up, scale: raw.scale })
            }
            (down, up) => {
                Err(Error::shape_mismatch(format!("LoRA {module}: down {down:?} and up {up:?} for rank {rank}")))
            }
        }
    }

    /// Adds `strength * scale * up @ down` of entry `index` to `weight` `[out, in]` in place.
    pub fn merge(&self, index: u64, strength: f64, weight: &mut ViewMut<'_>) -> Result<()> {
        let weight = weight.as_raw();
        // SAFETY: the instance lives as long as `self`; the weight is borrowed from the caller.
        self.plugin.call(self.table.merge, |f, plugin, error| unsafe { f(plugin, index, strength, &weight, error) })
    }

    /// Writes all entries as a safetensors file, whole or not at all.
    pub fn write(&self, path: &Path, layout: LoraLayout) -> Result<()> {
        let path = path.to_str().ok_or_else(|| Error::invalid_argument(format!("{} is not UTF-8", path.display())))?;
        let (path, layout) = (sh_string::borrowing(path), layout.code());
        // SAFETY: the instance lives as long as `self`; the path outlives the call.
        self.plugin.call(self.table.write, |f, plugin, error| unsafe { f(plugin, path, layout, error) })
    }
}
