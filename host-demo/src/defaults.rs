//! What is used when nothing is said: the shipped model, and the plugin that was built beside this program.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Where the shipped model lies in a checkout.
const SHAPES: &str = "weights/shapes";

/// The shipped model: `weights/shapes` in the current directory or one above it, else above this program.
pub fn default_model() -> Result<PathBuf> {
    let current = std::env::current_dir().ok();
    let program = std::env::current_exe().ok();
    let starts = [current.as_deref(), program.as_deref()];
    let ancestors = starts.into_iter().flatten().flat_map(Path::ancestors);
    ancestors.map(|folder| folder.join(SHAPES)).find(|folder| folder.join("model_index.json").is_file()).ok_or_else(
        || Error::Request(format!("no `{SHAPES}` in or above the current directory or this program; give --model")),
    )
}

/// The shipped model's adapter, with the LoRA that was trained with it.
pub fn default_adapter() -> Result<PathBuf> {
    Ok(default_model()?.join("dpt.safetensors"))
}

/// The strength that the shipped adapter corrects with: at twice as much it brings hardly more (`weights/shapes/RESULTS.md`).
/// Adapters differ in how steep their scores are: the plugin's own default is the release's.
pub const SHIPPED_ETA: f64 = 8.;

/// The plugin library beside this program (`libdpt.so`, `libdpt.dylib` or `dpt.dll`); it may be there in its flavour for CUDA alone
/// (`libdpt_cuda.so`), which [`Library::open_for`](host_api::host::Library::open_for) finds by this name.
pub fn default_plugin() -> Result<PathBuf> {
    let named = |name: &str| format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let (name, cuda) = (named("dpt"), named("dpt_cuda"));
    let program = std::env::current_exe().map_err(|e| Error::Request(format!("cannot find this program: {e}")))?;
    // Test programs lie one folder deeper than the libraries that were built with them.
    let folders = program.ancestors().skip(1).take(2);
    let mut found = folders.filter(|folder| folder.join(&name).is_file() || folder.join(&cuda).is_file());
    found.next().map(|folder| folder.join(&name)).ok_or_else(|| {
        Error::Request(format!(
            "no {name} beside {}; build it (`cargo build --release`), give --plugin, or use --no-plugin",
            program.display()
        ))
    })
}
