//! A plugin's table and the host it was given, from create to destroy.

use std::ptr;

use super::bridge::Bridge;
use crate::abi::{sh_error, sh_plugin, sh_status, sh_string};
use crate::error::{Error, Result, Status};
use crate::ffi::{self, read_struct};

/// Owns one instance of a plugin.
pub(super) struct Plugin {
    plugin: *const sh_plugin,
    bridge: *const Bridge,
    table: sh_plugin,
}

// SAFETY: the header lets calls move between threads.
unsafe impl Send for Plugin {}
// SAFETY: `&Plugin` only gives out the pointers; who calls a function that is not tagged [any] has to hold `&mut Instance`,
// or an `&Instance`, which is not `Sync`.
unsafe impl Sync for Plugin {}

impl Plugin {
    /// Checks the table. On success the instance and the bridge are owned by the result; else the bridge is still the
    /// caller's, and the instance is destroyed when that is possible.
    ///
    /// # Safety
    /// `plugin` is what `create` returned for the host of `bridge`.
    pub(super) unsafe fn new(plugin: *const sh_plugin, bridge: *const Bridge) -> Result<Self> {
        // SAFETY: the caller's promise.
        let table = unsafe { read_struct(plugin, "the new instance") }
            .map_err(|error| Error::new(Status::InvalidData, error.message))?;
        let missing = [
            ("destroy", table.destroy.is_none()),
            ("prepare", table.prepare.is_none()),
            ("needs", table.needs.is_none()),
            ("begin", table.begin.is_none()),
            ("step", table.step.is_none()),
            ("end", table.end.is_none()),
            ("memory", table.memory.is_none()),
            ("extension", table.extension.is_none()),
        ];
        if let Some((name, _)) = missing.into_iter().find(|(_, missing)| *missing) {
            if let Some(destroy) = table.destroy {
                // SAFETY: the instance was just created and is used by nobody.
                unsafe { destroy(plugin) };
            }
            return Err(Error::new(Status::InvalidData, format!("the plugin's function {name} is NULL")));
        }
        Ok(Self { plugin, bridge, table })
    }

    pub(super) fn as_ptr(&self) -> *const sh_plugin {
        self.plugin
    }

    pub(super) fn table(&self) -> &sh_plugin {
        &self.table
    }

    /// A copy of the table of a plugin extension, when the plugin has it.
    ///
    /// # Safety
    /// `T` is the struct of extension `id`.
    pub(super) unsafe fn extension<T: Copy>(&self, id: &'static str) -> Result<Option<T>> {
        let Some(extension) = self.table.extension else { return Ok(None) };
        // SAFETY: the instance lives as long as `self`.
        let found = unsafe { extension(self.plugin, sh_string::from_static(id)) }.cast::<T>();
        if found.is_null() {
            return Ok(None);
        }
        // SAFETY: not null, so the extension by the caller's and the plugin's promise.
        unsafe { read_struct(found, id) }.map(Some).map_err(|error| Error::new(Status::InvalidData, error.message))
    }

    /// One call of a function that may fail. A null function fails as well.
    pub(super) fn call<F>(
        &self,
        f: Option<F>,
        call: impl FnOnce(F, *const sh_plugin, *mut sh_error) -> sh_status,
    ) -> Result<()> {
        let f = f.ok_or_else(|| Error::new(Status::InvalidData, "a function of the plugin is NULL"))?;
        let mut error = ffi::error::empty();
        let code = call(f, self.plugin, ptr::from_mut(&mut error));
        ffi::error::read(code, &error)
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        if let Some(destroy) = self.table.destroy {
            // SAFETY: the last owner of the instance; no call is in progress.
            unsafe { destroy(self.plugin) };
        }
        // SAFETY: the bridge came from `Bridge::into_raw`, and the plugin that used it is gone.
        drop(unsafe { Box::from_raw(self.bridge.cast_mut()) });
    }
}
