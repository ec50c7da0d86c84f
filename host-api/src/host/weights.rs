//! [`Weights`] behind `sampler-hook.weights/1`.

use std::sync::PoisonError;

use super::bridge::{Bridge, bridge};
use super::gradient::enter;
use super::{WeightData, Weights};
use crate::abi::{SH_VIEW_READ_ONLY, sh_error, sh_host, sh_host_weights, sh_status, sh_string, sh_view};
use crate::error::{Error, Result, Status};
use crate::ffi;
use crate::view::{Layout, View};

/// The tensor that was asked for last; a plugin holds a pointer into it until the next.
pub(super) struct LentTensor {
    data: WeightData,
    layout: Box<Layout>,
}

pub(super) static TABLE: sh_host_weights = sh_host_weights {
    struct_size: ffi::struct_size::<sh_host_weights>(),
    reserved: 0,
    revision: Some(revision),
    count: Some(count),
    name: Some(name),
    tensor: Some(tensor),
};

impl LentTensor {
    fn new(shape: &[usize], data: WeightData) -> Result<Self> {
        let layout = match &data {
            WeightData::F32(values) => View::new(values, shape)?,
            WeightData::F16(values) => View::new(values, shape)?,
            WeightData::Bf16(values) => View::new(values, shape)?,
        };
        let layout = Box::new(*layout.parts().1);
        Ok(Self { data, layout })
    }

    fn base(&self) -> *const u8 {
        match &self.data {
            WeightData::F32(values) => values.as_ptr().cast(),
            WeightData::F16(values) => values.as_ptr().cast(),
            WeightData::Bf16(values) => values.as_ptr().cast(),
        }
    }
}

impl Bridge {
    fn weights(&self) -> Result<&dyn Weights> {
        self.host.weights().ok_or_else(|| Error::new(Status::Unsupported, "the host lends no weights any more"))
    }

    fn weight_name(&self, index: u64) -> Result<&str> {
        let names = &self.weight_names;
        let found = usize::try_from(index).ok().and_then(|index| names.get(index));
        found.map(String::as_str).ok_or_else(|| Error::invalid_argument(format!("tensor {index} of {}", names.len())))
    }
}

/// What a function without a status answers; `otherwise` when the host panics.
unsafe fn ask<T: Copy>(host: *const sh_host, otherwise: T, ask: impl FnOnce(&Bridge) -> Result<T>) -> T {
    // SAFETY: the plugin passes the host that it was given.
    let Some(bridge) = (unsafe { bridge(host) }) else { return otherwise };
    ffi::catch(|| ask(bridge)).unwrap_or(otherwise)
}

unsafe extern "C" fn revision(host: *const sh_host) -> u64 {
    // SAFETY: the plugin's promise.
    unsafe { ask(host, 0, |bridge| Ok(bridge.weights()?.revision())) }
}

unsafe extern "C" fn count(host: *const sh_host) -> u64 {
    // SAFETY: the plugin's promise.
    unsafe { ask(host, 0, |bridge| Ok(bridge.weight_names.len() as u64)) }
}

unsafe extern "C" fn name(host: *const sh_host, index: u64, name: *mut sh_string, error: *mut sh_error) -> sh_status {
    let call = |bridge: &Bridge| {
        if name.is_null() {
            return Err(Error::invalid_argument("name is NULL"));
        }
        // SAFETY: not null, so a string by the plugin's promise; names live as long as the bridge.
        unsafe { name.write(sh_string::borrowing(bridge.weight_name(index)?)) };
        Ok(())
    };
    // SAFETY: the plugin's promise.
    unsafe { enter(host, error, call) }
}

unsafe extern "C" fn tensor(
    host: *const sh_host,
    index: u64,
    tensor: *mut sh_view,
    revision: *mut u64,
    error: *mut sh_error,
) -> sh_status {
    let call = |bridge: &Bridge| {
        if revision.is_null() {
            return Err(Error::invalid_argument("revision is NULL"));
        }
        let (name, weights) = (bridge.weight_name(index)?, bridge.weights()?);
        let own = weights.tensor_revision(name)?;
        if !tensor.is_null() {
            // SAFETY: the plugin's promise.
            unsafe { ffi::check_struct(tensor.cast_const(), "tensor") }?;
            let (shape, data) = weights.tensor(name)?;
            let lent = LentTensor::new(&shape, data).map_err(|error| error.context(name))?;
            let raw = ffi::view::to_raw(lent.base(), &lent.layout, SH_VIEW_READ_ONLY);
            // Moves the vector and the box, not what they point to.
            *bridge.tensor.lock().unwrap_or_else(PoisonError::into_inner) = Some(lent);
            // SAFETY: checked above; members are written one by one, so a larger struct keeps its tail.
            unsafe {
                (&raw mut (*tensor).flags).write(raw.flags);
                (&raw mut (*tensor).tensor).write(raw.tensor);
                (&raw mut (*tensor).stream).write(raw.stream);
            }
        }
        // SAFETY: not null, so a number by the plugin's promise.
        unsafe { revision.write(own) };
        Ok(())
    };
    // SAFETY: the plugin's promise.
    unsafe { enter(host, error, call) }
}
