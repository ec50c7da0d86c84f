//! Files that appear whole or not at all.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Fails when nothing could be written there, so that a run need not end to find out.
pub fn check_output(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        return Err(Error::file(path, format!("there is no folder {}", folder.display())));
    }
    if path.is_dir() {
        return Err(Error::file(path, "is a folder; expected the name of a file"));
    }
    Ok(())
}

/// Writes beside `path`, then renames.
pub fn write_whole(path: &Path, content: &[u8]) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written = std::fs::write(&partial, content).and_then(|()| std::fs::rename(&partial, path));
    written.map_err(|e| {
        // What is left of it, if anything, helps nobody.
        let _ = std::fs::remove_file(&partial);
        Error::file(path, e)
    })
}
