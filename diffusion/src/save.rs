//! Files that appear whole or not at all.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, View};

use crate::checkpoint::RawTensor;
use crate::{Error, Result};

impl View for RawTensor<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// Writes a safetensors file beside `path` and renames it when it is on the disk, so that `path` may be a file that is read
/// here, and is never left half written.
pub fn save_safetensors<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, RawTensor<'a>)>,
    metadata: BTreeMap<String, String>,
) -> Result<()> {
    let partial = beside(path)?;
    let metadata = (!metadata.is_empty()).then(|| metadata.into_iter().collect());
    let written = safetensors::serialize_to_file(tensors, metadata, &partial)
        .map_err(|e| Error::file(path, format!("cannot be written: {e}")))
        .and_then(|()| {
            let sync = || File::open(&partial)?.sync_all();
            sync().and_then(|()| std::fs::rename(&partial, path)).map_err(|e| Error::io(path, e))
        });
    if written.is_err() {
        // What is left of it, if anything, helps nobody.
        let _ = std::fs::remove_file(&partial);
    }
    written
}

/// A name in the same folder that no other program uses.
fn beside(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| Error::file(path, "expected the name of a file"))?;
    let mut partial = std::ffi::OsString::from(".");
    partial.push(name);
    partial.push(format!(".{}.partial", std::process::id()));
    Ok(path.with_file_name(partial))
}
