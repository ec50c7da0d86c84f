//! From plugin types to the one table that both doors lead to.

use std::ptr;
use std::sync::Arc;

use super::instance::Instance;
use super::slot::HostSlot;
use super::tables::into_raw;
use super::{Plugin, reach};
use crate::abi::{
    SH_ABI_MAJOR, SH_ABI_MINOR, sh_descriptor, sh_entry, sh_error, sh_host, sh_plugin, sh_status, sh_string,
};
use crate::error::{Error, Result, Status};
use crate::ffi::{self, read_string};
use crate::view::Reach;

/// One plugin of a library: its descriptor and how to make an instance.
pub struct Registration {
    id: &'static str,
    descriptor: sh_descriptor,
    reach: fn() -> Reach,
    create: fn(Arc<HostSlot>, &str) -> Result<*const sh_plugin>,
}

impl Registration {
    /// The registration of `P`.
    pub const fn of<P: Plugin>() -> Self {
        let text = P::DESCRIPTOR;
        let descriptor = sh_descriptor {
            struct_size: ffi::struct_size::<sh_descriptor>(),
            reserved: 0,
            id: sh_string::from_static(text.id),
            name: sh_string::from_static(text.name),
            version: sh_string::from_static(text.version),
            vendor: sh_string::from_static(text.vendor),
            description: sh_string::from_static(text.description),
        };
        let create = |host: Arc<HostSlot>, config: &str| Instance::<P>::create(host, config).map(into_raw);
        Self { id: text.id, descriptor, reach: reach::<P>, create }
    }
}

/// The plugins of a library; [`export_plugins!`](crate::export_plugins) implements it.
pub trait PluginList {
    /// One registration per plugin.
    const PLUGINS: &'static [Registration];
}

/// The table of a library with the plugins of `L`.
pub const fn entry<L: PluginList>() -> sh_entry {
    sh_entry {
        struct_size: ffi::struct_size::<sh_entry>(),
        abi_major: SH_ABI_MAJOR,
        abi_minor: SH_ABI_MINOR,
        plugin_count: L::PLUGINS.len() as u32,
        descriptor: Some(descriptor::<L>),
        create: Some(create::<L>),
    }
}

unsafe extern "C" fn descriptor<L: PluginList>(index: u32) -> *const sh_descriptor {
    L::PLUGINS.get(index as usize).map_or(ptr::null(), |plugin| &raw const plugin.descriptor)
}

unsafe extern "C" fn create<L: PluginList>(
    id: sh_string,
    host: *const sh_host,
    config: sh_string,
    plugin: *mut *const sh_plugin,
    error: *mut sh_error,
) -> sh_status {
    // SAFETY: the host's promise.
    if let Err(refused) = unsafe { ffi::error::check(error) } {
        return refused.status.code(); // there is nowhere to put the message
    }
    let call = || {
        // SAFETY: the host's promise, for all three.
        let (id, config) = unsafe { (read_string(id, "plugin id")?, read_string(config, "config")?) };
        if plugin.is_null() {
            return Err(Error::invalid_argument("plugin is NULL"));
        }
        let known = L::PLUGINS.iter().find(|plugin| plugin.id == id);
        let known = known.ok_or_else(|| Error::new(Status::NotFound, format!("no plugin {id:?} in this library")))?;
        let reach = (known.reach)();
        let _inside = reach.inside();
        // SAFETY: the host lives until destroy, when the instance closes the slot; see below for a failed create.
        let slot = Arc::new(unsafe { HostSlot::open(host, reach) }?);
        let created = ffi::catch(|| (known.create)(slot.clone(), &config)).inspect_err(|_| slot.close())?;
        // SAFETY: not null, so room for a pointer by the host's promise.
        unsafe { plugin.write(created) };
        Ok(())
    };
    // SAFETY: `check` accepted the error.
    unsafe { ffi::error::finish(ffi::catch(call), error) }
}
