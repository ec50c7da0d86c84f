//! A [`Host`] behind an `sh_host`.

use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex};

use super::{Host, Weights};
use super::{gradient, weights};
use crate::abi::{
    SH_HOST_GRADIENT, SH_HOST_PROGRESS, SH_HOST_WEIGHTS, SH_LOG_DEBUG, SH_LOG_ERROR, SH_LOG_TRACE, SH_LOG_WARN,
    sh_host, sh_host_progress, sh_string,
};
use crate::ffi::{self, read_string};
use crate::view::{Lent, Reach};

/// What `sh_host.instance` points to. Lives in a box from create to destroy.
pub(super) struct Bridge {
    pub(super) table: sh_host,
    pub(super) host: Arc<dyn Host>,
    /// The last activation; a plugin holds pointers into it until vjp or release.
    pub(super) activation: Mutex<Option<Box<Lent>>>,
    /// The tensor that was asked for last; a plugin holds pointers into it until the next.
    pub(super) tensor: Mutex<Option<Box<Lent>>>,
    /// Names of the tensors that the host lends; empty when it lends none.
    pub(super) weight_names: Vec<String>,
    name: String,
    version: String,
    lends_gradient: bool,
}

impl Bridge {
    /// The memory that the host can reach.
    pub(super) fn reach(&self) -> Reach {
        Reach(self.host.device_memory())
    }

    /// The box is given away as a pointer, so that no Rust reference claims it while plugins use it.
    pub(super) fn into_raw(host: Arc<dyn Host>) -> *const Self {
        let table = sh_host {
            struct_size: ffi::struct_size::<sh_host>(),
            reserved: 0,
            instance: ptr::null_mut(),
            name: sh_string::EMPTY,
            version: sh_string::EMPTY,
            log: Some(log),
            cancelled: Some(cancelled),
            extension: Some(extension),
        };
        let (name, version) = (host.name().to_owned(), host.version().to_owned());
        let lends_gradient = host.gradient().is_some();
        let weight_names = host.weights().map_or_else(Vec::new, Weights::names);
        let (activation, tensor) = (Mutex::new(None), Mutex::new(None));
        let bridge = Self { table, host, activation, tensor, weight_names, name, version, lends_gradient };
        let bridge = Box::new(bridge);
        let bridge = Box::into_raw(bridge);
        // SAFETY: just allocated, and nobody else has it yet.
        unsafe {
            let name = sh_string::borrowing(&(&*bridge).name);
            let version = sh_string::borrowing(&(&*bridge).version);
            (*bridge).table.instance = bridge.cast();
            (*bridge).table.name = name;
            (*bridge).table.version = version;
        }
        bridge
    }
}

/// The bridge of a host table.
///
/// # Safety
/// `host` is null or the table of a living bridge.
pub(super) unsafe fn bridge<'a>(host: *const sh_host) -> Option<&'a Bridge> {
    // SAFETY: the caller's promise; `instance` was set when the bridge was made.
    unsafe { host.as_ref().and_then(|table| table.instance.cast::<Bridge>().as_ref()) }
}

unsafe extern "C" fn log(host: *const sh_host, level: i32, message: sh_string) {
    // SAFETY: the plugin passes the host that it was given, and a string that is valid for this call.
    let (bridge, message) = unsafe { (bridge(host), read_string(message, "message")) };
    let level = match level {
        SH_LOG_ERROR => log::Level::Error,
        SH_LOG_WARN => log::Level::Warn,
        SH_LOG_DEBUG => log::Level::Debug,
        SH_LOG_TRACE => log::Level::Trace,
        _ => log::Level::Info,
    };
    if let (Some(bridge), Ok(message)) = (bridge, message) {
        let _ = ffi::catch(|| {
            bridge.host.log(level, &message);
            Ok(())
        });
    }
}

unsafe extern "C" fn cancelled(host: *const sh_host) -> i32 {
    // SAFETY: the plugin passes the host that it was given.
    let Some(bridge) = (unsafe { bridge(host) }) else { return 1 };
    i32::from(ffi::catch(|| Ok(bridge.host.cancelled())).unwrap_or(true))
}

unsafe extern "C" fn extension(host: *const sh_host, id: sh_string) -> *const c_void {
    // SAFETY: the plugin passes the host that it was given, and a string that is valid for this call.
    let (bridge, id) = unsafe { (bridge(host), read_string(id, "extension id")) };
    match (bridge, id.as_deref()) {
        (Some(bridge), Ok(SH_HOST_GRADIENT)) if bridge.lends_gradient => ptr::from_ref(&gradient::TABLE).cast(),
        (Some(bridge), Ok(SH_HOST_WEIGHTS)) if !bridge.weight_names.is_empty() => ptr::from_ref(&weights::TABLE).cast(),
        (Some(_), Ok(SH_HOST_PROGRESS)) => ptr::from_ref(&PROGRESS).cast(),
        _ => ptr::null(),
    }
}

static PROGRESS: sh_host_progress =
    sh_host_progress { struct_size: ffi::struct_size::<sh_host_progress>(), reserved: 0, progress: Some(progress) };

unsafe extern "C" fn progress(host: *const sh_host, task: sh_string, done: u64, total: u64) {
    // SAFETY: the plugin passes the host that it was given, and a string that is valid for this call.
    let (bridge, task) = unsafe { (bridge(host), read_string(task, "task")) };
    if let (Some(bridge), Ok(task)) = (bridge, task) {
        let _ = ffi::catch(|| {
            bridge.host.progress(&task, done, total);
            Ok(())
        });
    }
}
