//! The functions of the plugin extensions: from C into [`Params`] and [`Lora`].

use std::path::Path;
use std::sync::Arc;

use super::instance::{Instance, State};
use super::tables::enter;
use super::{Lora, LoraLayout, ParamKind, Params, Plugin};
use crate::abi::{
    SH_PARAM_BOOLEAN, SH_PARAM_CHOICE, SH_PARAM_FLOAT, SH_PARAM_INTEGER, SH_PARAM_LIVE, SH_VIEW_READ_ONLY, sh_error,
    sh_lora_entry, sh_param, sh_plugin, sh_plugin_lora, sh_plugin_params, sh_status, sh_string, sh_view,
};
use crate::error::{Error, Result, Status};
use crate::ffi::{self, read_string};
use crate::view::{Reach, ViewMut};

/// Parameters with what the host may point into until destroy.
pub(super) struct ParamsTable {
    params: Arc<Params>,
    choices: Vec<Vec<sh_string>>,
}

impl ParamsTable {
    pub(super) fn new(params: Arc<Params>) -> Self {
        let choices = |kind: &ParamKind| match kind {
            ParamKind::Choice(names) => names.iter().map(|name| sh_string::borrowing(name)).collect(),
            _ => Vec::new(),
        };
        let choices = params.specs().iter().map(|spec| choices(&spec.kind)).collect();
        Self { params, choices }
    }
}

/// LoRA weights with what the host may point into until destroy.
pub(super) struct LoraTable {
    lora: Arc<Lora>,
    factors: Vec<[Factor; 2]>,
}

/// `down` or `up`: a view and the shape that it points to, both where they stay.
struct Factor {
    _shape: Box<[i64; 2]>,
    view: Box<sh_view>,
}

impl Factor {
    fn new(data: &[f32], rows: usize, columns: usize) -> Self {
        let mut shape = Box::new([rows as i64, columns as i64]);
        let mut view = Box::new(ffi::view::empty());
        view.flags = SH_VIEW_READ_ONLY;
        view.tensor.data = data.as_ptr().cast_mut().cast();
        view.tensor.ndim = 2;
        view.tensor.shape = shape.as_mut_ptr();
        Self { _shape: shape, view }
    }
}

impl LoraTable {
    pub(super) fn new(lora: Arc<Lora>) -> Self {
        let factors = lora.entries().iter().map(|entry| {
            let down = Factor::new(&entry.down, entry.rank, entry.in_features);
            [down, Factor::new(&entry.up, entry.out_features, entry.rank)]
        });
        Self { factors: factors.collect(), lora }
    }
}

/// The table of `sampler-hook.params/1`.
pub(super) fn params<P: Plugin>() -> &'static sh_plugin_params {
    const {
        &sh_plugin_params {
            struct_size: ffi::struct_size::<sh_plugin_params>(),
            reserved: 0,
            count: Some(param_count::<P>),
            info: Some(param_info::<P>),
            get: Some(param_get::<P>),
            set: Some(param_set::<P>),
            schema: Some(param_schema::<P>),
        }
    }
}

/// The table of `sampler-hook.lora/1`.
pub(super) fn lora<P: Plugin>() -> &'static sh_plugin_lora {
    const {
        &sh_plugin_lora {
            struct_size: ffi::struct_size::<sh_plugin_lora>(),
            reserved: 0,
            count: Some(lora_count::<P>),
            entry: Some(lora_entry::<P>),
            merge: Some(lora_merge::<P>),
            write: Some(lora_write::<P>),
        }
    }
}

fn params_of<P>(instance: &Instance<P>) -> Result<&ParamsTable> {
    instance.params.as_ref().ok_or_else(|| Error::new(Status::Unsupported, "this plugin has no parameters"))
}

fn lora_of<P>(instance: &Instance<P>) -> Result<&LoraTable> {
    instance.lora.as_ref().ok_or_else(|| Error::new(Status::Unsupported, "this plugin has no LoRA"))
}

fn null(what: &str) -> Error {
    Error::invalid_argument(format!("{what} is NULL"))
}

unsafe extern "C" fn param_count<P: Plugin>(plugin: *const sh_plugin) -> u32 {
    let mut count = 0;
    let call = |instance: &Instance<P>| {
        count = params_of(instance)?.params.specs().len() as u32;
        Ok(())
    };
    // SAFETY: the host's promise.
    unsafe { enter(plugin, std::ptr::null_mut(), call) };
    count
}

unsafe extern "C" fn param_info<P: Plugin>(
    plugin: *const sh_plugin,
    index: u32,
    param: *mut sh_param,
    error: *mut sh_error,
) -> sh_status {
    let call = |instance: &Instance<P>| {
        // SAFETY: the host's promise.
        unsafe { ffi::check_struct(param.cast_const(), "param") }?;
        let table = params_of(instance)?;
        let spec = table.params.spec(index as usize)?;
        let choices = &table.choices[index as usize];
        let (minimum, maximum) = spec.kind.range();
        let known = sh_param {
            // SAFETY: checked above.
            struct_size: unsafe { (*param).struct_size },
            kind: match spec.kind {
                ParamKind::Float { .. } => SH_PARAM_FLOAT,
                ParamKind::Integer { .. } => SH_PARAM_INTEGER,
                ParamKind::Boolean => SH_PARAM_BOOLEAN,
                ParamKind::Choice(_) => SH_PARAM_CHOICE,
            },
            name: sh_string::borrowing(&spec.name),
            description: sh_string::borrowing(&spec.description),
            unit: sh_string::borrowing(&spec.unit),
            minimum,
            maximum,
            default_value: spec.default,
            flags: if spec.live { SH_PARAM_LIVE } else { 0 },
            choice_count: choices.len() as u32,
            choices: if choices.is_empty() { std::ptr::null() } else { choices.as_ptr() },
        };
        // SAFETY: checked above.
        unsafe { param.write(known) };
        Ok(())
    };
    // SAFETY: the host's promise.
    unsafe { enter::<P>(plugin, error, call) }
}

unsafe extern "C" fn param_get<P: Plugin>(
    plugin: *const sh_plugin,
    index: u32,
    value: *mut f64,
    error: *mut sh_error,
) -> sh_status {
    let call = |instance: &Instance<P>| {
        if value.is_null() {
            return Err(null("value"));
        }
        let found = params_of(instance)?.params.get(index as usize)?;
        // SAFETY: not null, so a double by the host's promise.
        unsafe { value.write(found) };
        Ok(())
    };
    // SAFETY: the host's promise.
    unsafe { enter::<P>(plugin, error, call) }
}

unsafe extern "C" fn param_set<P: Plugin>(
    plugin: *const sh_plugin,
    index: u32,
    value: f64,
    error: *mut sh_error,
) -> sh_status {
    let call = |instance: &Instance<P>| {
        let params = &params_of(instance)?.params;
        let spec = params.spec(index as usize)?;
        if spec.live {
            return params.set(index as usize, value);
        }
        // Held while setting, so that a prepare in progress on another thread is not overtaken.
        let _core = instance.lock(&format!("set {}, which is not live,", spec.name), &[State::Created])?;
        params.set(index as usize, value)
    };
    // SAFETY: the host's promise.
    unsafe { enter::<P>(plugin, error, call) }
}

unsafe extern "C" fn param_schema<P: Plugin>(plugin: *const sh_plugin) -> sh_string {
    let mut schema = sh_string::EMPTY;
    let call = |instance: &Instance<P>| {
        schema = sh_string::borrowing(params_of(instance)?.params.schema());
        Ok(())
    };
    // SAFETY: the host's promise.
    unsafe { enter(plugin, std::ptr::null_mut(), call) };
    schema
}

unsafe extern "C" fn lora_count<P: Plugin>(plugin: *const sh_plugin) -> u64 {
    let mut count = 0;
    let call = |instance: &Instance<P>| {
        count = lora_of(instance)?.lora.entries().len() as u64;
        Ok(())
    };
    // SAFETY: the host's promise.
    unsafe { enter(plugin, std::ptr::null_mut(), call) };
    count
}

/// An index into a list, whatever its width.
fn narrow(index: u64) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}

unsafe extern "C" fn lora_entry<P: Plugin>(
    plugin: *const sh_plugin,
    index: u64,
    entry: *mut sh_lora_entry,
    error: *mut sh_error,
) -> sh_status {
    let call = |instance: &Instance<P>| {
        // SAFETY: the host's promise.
        unsafe { ffi::check_struct(entry.cast_const(), "entry") }?;
        let table = lora_of(instance)?;
        let found = table.lora.entry(narrow(index))?;
        let [down, up] = &table.factors[narrow(index)];
        let known = sh_lora_entry {
            // SAFETY: checked above.
            struct_size: unsafe { (*entry).struct_size },
            rank: found.rank as u32,
            module: sh_string::borrowing(&found.module),
            down: &raw const *down.view,
            up: &raw const *up.view,
            scale: found.scale,
        };
        // SAFETY: checked above.
        unsafe { entry.write(known) };
        Ok(())
    };
    // SAFETY: the host's promise.
    unsafe { enter::<P>(plugin, error, call) }
}

unsafe extern "C" fn lora_merge<P: Plugin>(
    plugin: *const sh_plugin,
    index: u64,
    strength: f64,
    weight: *const sh_view,
    error: *mut sh_error,
) -> sh_status {
    let call = |instance: &Instance<P>| {
        let entry = lora_of(instance)?.lora.entry(narrow(index))?;
        // SAFETY: the host's promise.
        entry.merge(strength, &mut unsafe { ViewMut::from_raw(weight, "weight", Reach::MAIN) }?)
    };
    // SAFETY: the host's promise.
    unsafe { enter::<P>(plugin, error, call) }
}

unsafe extern "C" fn lora_write<P: Plugin>(
    plugin: *const sh_plugin,
    path: sh_string,
    layout: i32,
    error: *mut sh_error,
) -> sh_status {
    let call = |instance: &Instance<P>| {
        // SAFETY: the host's promise.
        let path = unsafe { read_string(path, "path") }?;
        lora_of(instance)?.lora.write(Path::new(&path), LoraLayout::from_code(layout)?)
    };
    // SAFETY: the host's promise.
    unsafe { enter::<P>(plugin, error, call) }
}
