//! A plugin library.

use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Arc;

use super::Host;
use super::bridge::Bridge;
use super::door;
use super::instance::Instance;
use super::plugin::Plugin;
use crate::abi::{sh_descriptor, sh_entry, sh_plugin, sh_string};
use crate::error::{Error, Result, Status};
use crate::ffi::{self, read_string, read_struct};
use crate::plugin::{PluginList, entry};
use crate::types::{Descriptor, Device};

/// How a library was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Door {
    /// The exported C function.
    C,
    /// abi_stable's root module.
    Rust,
    /// Linked into this program.
    Linked,
}

/// A plugin library. It is never unloaded, since it may own threads.
#[derive(Clone, Debug)]
pub struct Library {
    entry: &'static sh_entry,
    door: Door,
    descriptors: Vec<Descriptor>,
    path: Option<PathBuf>,
}

impl Library {
    /// Loads the library at `path`: through the Rust door when it has one, else through the C door.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (entry, door) = door::open(path)?;
        let library = Self::new(entry, door).map_err(|error| error.context(path.display()))?;
        Ok(Self { path: Some(path.to_owned()), ..library })
    }

    /// Loads the library at `path` in its flavour for `device`. A plugin that comes built for CUDA too has that build beside it,
    /// under its name with `_cuda` behind (`libdpt.so`, `libdpt_cuda.so`): a build for CUDA does not load where there is no driver.
    /// For a CUDA device that flavour is tried first; the second value says why it is not the one that was loaded.
    pub fn open_for(path: impl AsRef<Path>, device: Device) -> Result<(Self, Option<Error>)> {
        let path = path.as_ref();
        let flavour = match device {
            Device::Cpu => None,
            Device::Cuda(_) => cuda_flavour(path),
        };
        match flavour.map(Self::open) {
            None => Ok((Self::open(path)?, None)),
            Some(Ok(library)) => Ok((library, None)),
            Some(Err(why)) => Self::open(path).map(|library| (library, Some(why))),
        }
    }

    /// Where it was loaded from; none when it is linked into this program.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The plugins of a list that is linked into this program; see [`plugin_list!`](crate::plugin_list).
    pub fn linked<L: PluginList>() -> Result<Self> {
        Self::new(Box::leak(Box::new(entry::<L>())), Door::Linked)
    }

    fn new(entry: &'static sh_entry, door: Door) -> Result<Self> {
        let descriptors = (0..entry.plugin_count).map(|index| read_descriptor(entry, index)).collect::<Result<_>>()?;
        Ok(Self { entry, door, descriptors, path: None })
    }

    /// The plugins of the library.
    pub fn descriptors(&self) -> &[Descriptor] {
        &self.descriptors
    }

    /// How the library was reached.
    pub fn door(&self) -> Door {
        self.door
    }

    /// Creates an instance of the plugin `id`. `config` is a JSON object or empty.
    pub fn create(&self, id: &str, host: Arc<dyn Host>, config: &str) -> Result<Instance> {
        let create = self.entry.create.ok_or_else(|| Error::new(Status::InvalidData, "create is NULL"))?;
        let bridge = Bridge::into_raw(host);
        let mut plugin: *const sh_plugin = ptr::null();
        let mut error = ffi::error::empty();
        // SAFETY: the bridge lives until the instance is destroyed, the rest outlives the call.
        let code = unsafe {
            create(
                sh_string::borrowing(id),
                &raw const (*bridge).table,
                sh_string::borrowing(config),
                &mut plugin,
                &mut error,
            )
        };
        let created = ffi::error::read(code, &error).and_then(|()| {
            // SAFETY: the library says that it set `plugin` to its new instance.
            unsafe { Plugin::new(plugin, bridge) }
        });
        created.map(Instance::new).inspect_err(|_| {
            // SAFETY: made above by `into_raw`; no instance came of it, so nothing holds it.
            drop(unsafe { Box::from_raw(bridge.cast_mut()) });
        })
    }
}

/// `libdpt_cuda.so` for `libdpt.so`; none for a library that is that flavour itself.
fn cuda_flavour(path: &Path) -> Option<PathBuf> {
    const FLAVOUR: &str = "_cuda";
    let mut name = path.file_stem().filter(|name| !name.to_string_lossy().ends_with(FLAVOUR))?.to_owned();
    name.push(FLAVOUR);
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    Some(path.with_file_name(name))
}

fn read_descriptor(entry: &sh_entry, index: u32) -> Result<Descriptor> {
    let descriptor = entry.descriptor.ok_or_else(|| Error::new(Status::InvalidData, "descriptor is NULL"))?;
    // SAFETY: the function of a table that was checked; descriptors live as long as the library.
    let raw = unsafe { read_struct::<sh_descriptor>(descriptor(index), "descriptor") }?;
    // SAFETY: as above, for each string. It is copied for good, once per plugin of a library.
    let text = |text: sh_string, what: &str| Ok(&*unsafe { read_string(text, what) }?.leak());
    Ok(Descriptor {
        id: text(raw.id, "plugin id")?,
        name: text(raw.name, "plugin name")?,
        version: text(raw.version, "plugin version")?,
        vendor: text(raw.vendor, "plugin vendor")?,
        description: text(raw.description, "plugin description")?,
    })
}
