//! Opening a library through either door.

use std::path::Path;

use abi_stable::library::{LibraryError, RawLibrary, lib_header_from_raw_library};

use super::library::Door;
use crate::abi::{SH_ABI_MAJOR, SH_ENTRY_SYMBOL, sh_entry, sh_entry_fn};
use crate::error::{Error, Result, Status};
use crate::export::SamplerHookRef;

/// Loads the library for good and finds its table.
pub(super) fn open(path: &Path) -> Result<(&'static sh_entry, Door)> {
    find(path).map_err(|error| error.context(path.display()))
}

fn find(path: &Path) -> Result<(&'static sh_entry, Door)> {
    if !path.is_file() {
        return Err(Error::new(Status::NotFound, "no plugin library here"));
    }
    // A name without a folder would be looked up in the system's places.
    let path = std::path::absolute(path).map_err(|error| Error::new(Status::NotFound, error.to_string()))?;
    let library = RawLibrary::load_at(&path).map_err(|error| {
        let reason = match error {
            LibraryError::OpenError { err, .. } => err.to_string(),
            other => other.to_string(),
        };
        Error::new(Status::InvalidData, format!("not a library that can be loaded: {reason}"))
    })?;
    let library: &'static RawLibrary = Box::leak(Box::new(library));
    let unfit = |error| Error::new(Status::Unsupported, format!("it does not fit this host: {error}"));
    match rust_door(library).map_err(unfit)? {
        Some(entry) => Ok((check(entry)?, Door::Rust)),
        None => Ok((check(c_door(library)?)?, Door::C)),
    }
}

/// The table in abi_stable's root module, after its layout check; `None` when the library has none.
fn rust_door(library: &'static RawLibrary) -> std::result::Result<Option<&'static sh_entry>, LibraryError> {
    // SAFETY: the library is never unloaded.
    match unsafe { lib_header_from_raw_library(library) } {
        Ok(header) => Ok(Some(header.init_root_module::<SamplerHookRef>()?.entry())),
        Err(LibraryError::GetSymbolError { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The table that the exported C function returns.
fn c_door(library: &'static RawLibrary) -> Result<&'static sh_entry> {
    // SAFETY: the header says what this symbol is.
    let symbol = unsafe { library.get::<sh_entry_fn>(SH_ENTRY_SYMBOL.as_bytes()) };
    let entry = symbol.ok().and_then(|symbol| *symbol);
    let message = format!("not a plugin library: it does not export {SH_ENTRY_SYMBOL}");
    let entry = entry.ok_or_else(|| Error::new(Status::InvalidData, message))?;
    // SAFETY: as above.
    let entry = unsafe { entry(SH_ABI_MAJOR) };
    if entry.is_null() {
        let message = format!("the library does not speak version {SH_ABI_MAJOR} of the interface");
        return Err(Error::new(Status::Unsupported, message));
    }
    // SAFETY: not null, so a table that lives as long as the library by the header's rule.
    unsafe { crate::ffi::check_struct(entry, "entry") }?;
    // SAFETY: checked above, and the library is never unloaded.
    Ok(unsafe { &*entry })
}

/// Version and functions of a table. Any minor will do: what it adds is found by sizes and extensions.
fn check(entry: &'static sh_entry) -> Result<&'static sh_entry> {
    if entry.abi_major != SH_ABI_MAJOR {
        let message = format!(
            "the library was asked for version {SH_ABI_MAJOR} of the interface and gave version {}",
            entry.abi_major
        );
        return Err(Error::new(Status::Unsupported, message));
    }
    if (entry.struct_size as usize) < size_of::<sh_entry>() || entry.descriptor.is_none() || entry.create.is_none() {
        return Err(Error::new(Status::InvalidData, "the library's entry is incomplete"));
    }
    Ok(entry)
}
