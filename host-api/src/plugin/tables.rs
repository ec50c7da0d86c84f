//! The functions that a host calls: from C into [`Instance`].

use std::ffi::c_void;
use std::ptr;

use super::Plugin;
use super::instance::{Instance, State};
use super::step::{StepArguments, step as run_step};
use super::{extensions, instance, reach, split};
use crate::abi::{
    SH_PLUGIN_LORA, SH_PLUGIN_PARAMS, SH_PLUGIN_SPLIT, sh_device, sh_error, sh_model, sh_needs, sh_plugin, sh_report,
    sh_run, sh_status, sh_step, sh_string, sh_view,
};
use crate::error::{Error, Result, Status};
use crate::ffi::sampling::{ModelParts, RunParts};
use crate::ffi::{self, read_string};

/// The table of an instance of `P`, without its instance.
pub(super) fn plugin<P: Plugin>() -> sh_plugin {
    sh_plugin {
        struct_size: ffi::struct_size::<sh_plugin>(),
        reserved: 0,
        instance: ptr::null_mut(),
        destroy: Some(destroy::<P>),
        prepare: Some(prepare::<P>),
        needs: Some(needs::<P>),
        begin: Some(begin::<P>),
        step: Some(step::<P>),
        end: Some(end::<P>),
        memory: Some(memory::<P>),
        extension: Some(extension::<P>),
    }
}

/// Gives the instance a fixed place; [`destroy`] takes it back.
pub(super) fn into_raw<P: Plugin>(instance: Instance<P>) -> *const sh_plugin {
    let instance = Box::into_raw(Box::new(instance));
    // SAFETY: just allocated, and nobody else has it yet.
    unsafe {
        (*instance).table.instance = instance.cast();
        &raw const (*instance).table
    }
}

/// # Safety
/// `plugin` is null or was made by [`into_raw`] of the same `P` and not destroyed.
unsafe fn instance<'a, P: Plugin>(plugin: *const sh_plugin) -> Result<&'a Instance<P>> {
    if plugin.is_null() || !plugin.is_aligned() {
        return Err(Error::invalid_argument("plugin is NULL"));
    }
    // SAFETY: not null, so a table by the caller's promise; its instance was set by `into_raw`.
    unsafe { (*plugin).instance.cast::<instance::Instance<P>>().as_ref() }
        .ok_or_else(|| Error::invalid_argument("plugin->instance is NULL"))
}

/// Runs one call: finds the instance, catches panics, poisons, fills the error.
///
/// # Safety
/// As [`instance`]; `error` is null or points to an `sh_error`.
pub(super) unsafe fn enter<P: Plugin>(
    plugin: *const sh_plugin,
    error: *mut sh_error,
    call: impl FnOnce(&Instance<P>) -> Result<()>,
) -> sh_status {
    // SAFETY: the caller's promise.
    if let Err(refused) = unsafe { ffi::error::check(error) } {
        return refused.status.code(); // there is nowhere to put the message
    }
    let _inside = reach::<P>().inside();
    // SAFETY: the caller's promise.
    let result = unsafe { instance::<P>(plugin) }.and_then(|instance| {
        instance.check_poisoned()?;
        let result = ffi::catch(|| call(instance));
        if matches!(&result, Err(error) if error.status == Status::Panic) {
            instance.poison();
        }
        result
    });
    // SAFETY: `check` accepted the error.
    unsafe { ffi::error::finish(result, error) }
}

unsafe extern "C" fn destroy<P: Plugin>(plugin: *const sh_plugin) {
    // SAFETY: null, or the host's promise.
    if plugin.is_null() || unsafe { (*plugin).instance }.is_null() {
        return;
    }
    let _inside = reach::<P>().inside();
    // SAFETY: the host's promise: this instance, once; `into_raw` made its pointer from a box. It is taken as it was stored:
    // one that came from a shared reference may not be freed.
    let instance = unsafe { Box::from_raw((*plugin).instance.cast::<Instance<P>>()) };
    instance.destroy();
}

unsafe extern "C" fn prepare<P: Plugin>(
    plugin: *const sh_plugin,
    model: *const sh_model,
    device: sh_device,
    error: *mut sh_error,
) -> sh_status {
    let call = |instance: &Instance<P>| {
        instance.check_state("prepare", &[State::Created, State::Prepared])?;
        // SAFETY: the host's promise.
        let model = unsafe { ModelParts::from_raw(model) }?;
        instance.prepare(&model.model(), ffi::view::device_from_raw(device)?)
    };
    // SAFETY: the host's promise.
    unsafe { enter(plugin, error, call) }
}

unsafe extern "C" fn needs<P: Plugin>(
    plugin: *const sh_plugin,
    needs: *mut sh_needs,
    error: *mut sh_error,
) -> sh_status {
    let call = |instance: &Instance<P>| {
        instance.check_state("needs", &[State::Prepared, State::Running])?;
        // SAFETY: the host's promise.
        unsafe { ffi::check_struct(needs.cast_const(), "needs") }?;
        let known = instance.needs()?;
        // SAFETY: checked above; members are written one by one, so a larger struct keeps its tail.
        unsafe {
            (&raw mut (*needs).flags).write(known.flags);
            (&raw mut (*needs).tap).write(known.tap);
        }
        Ok(())
    };
    // SAFETY: the host's promise.
    unsafe { enter::<P>(plugin, error, call) }
}

unsafe extern "C" fn begin<P: Plugin>(plugin: *const sh_plugin, run: *const sh_run, error: *mut sh_error) -> sh_status {
    let call = |instance: &Instance<P>| {
        instance.check_state("begin", &[State::Prepared])?;
        // SAFETY: the host's promise.
        let run = unsafe { RunParts::from_raw(run, reach::<P>()) }?;
        instance.begin(&run.run())
    };
    // SAFETY: the host's promise.
    unsafe { enter::<P>(plugin, error, call) }
}

unsafe extern "C" fn step<P: Plugin>(
    plugin: *const sh_plugin,
    step: *const sh_step,
    latents: *const sh_view,
    out: *const sh_view,
    report: *mut sh_report,
    error: *mut sh_error,
) -> sh_status {
    let arguments = StepArguments { step, latents, out, report };
    // SAFETY: the host's promise.
    unsafe { enter::<P>(plugin, error, |instance| run_step(instance, &arguments)) }
}

unsafe extern "C" fn end<P: Plugin>(plugin: *const sh_plugin, error: *mut sh_error) -> sh_status {
    // SAFETY: the host's promise.
    unsafe { enter::<P>(plugin, error, Instance::end) }
}

unsafe extern "C" fn memory<P: Plugin>(plugin: *const sh_plugin) -> u64 {
    let mut bytes = 0;
    let call = |instance: &Instance<P>| {
        bytes = instance.memory();
        Ok(())
    };
    // SAFETY: the host's promise.
    match unsafe { enter::<P>(plugin, ptr::null_mut(), call) } {
        code if code == Status::Ok.code() => bytes,
        _ => 0,
    }
}

unsafe extern "C" fn extension<P: Plugin>(plugin: *const sh_plugin, id: sh_string) -> *const c_void {
    // SAFETY: the host's promise.
    let (Ok(instance), Ok(id)) = (unsafe { (instance::<P>(plugin), read_string(id, "extension id")) }) else {
        return ptr::null();
    };
    match id.as_str() {
        SH_PLUGIN_PARAMS if instance.params.is_some() => ptr::from_ref(extensions::params::<P>()).cast(),
        SH_PLUGIN_LORA if instance.lora.is_some() => ptr::from_ref(extensions::lora::<P>()).cast(),
        SH_PLUGIN_SPLIT if P::SPLIT => ptr::from_ref(split::table::<P>()).cast(),
        _ => ptr::null(),
    }
}
