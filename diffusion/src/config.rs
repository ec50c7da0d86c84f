//! Where a model folder keeps its configuration and its weights.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// Reads a JSON file into `T`. Errors name the file, the field or type that serde missed, and the place.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::file(path, e))
}

/// The weights in `folder`: `<stem>.safetensors`, `<stem>.fp16.safetensors` where a download holds only half precision, or
/// `<stem>.bin`, a PyTorch pickle (`pytorch_model.bin` for the stem `model`), in older ones.
pub fn weights_file(folder: &Path, stem: &str) -> Result<PathBuf> {
    let pickle = if stem == "model" { "pytorch_model.bin".to_owned() } else { format!("{stem}.bin") };
    let names = [format!("{stem}.safetensors"), format!("{stem}.fp16.safetensors"), pickle];
    names
        .iter()
        .map(|name| folder.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| Error::file(folder, format!("no weights here: expected `{}`", names.join("` or `"))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Folder;

    #[derive(Debug, serde::Deserialize)]
    struct Sizes {
        #[allow(dead_code)]
        hidden_size: usize,
    }

    fn failure(folder: &Folder) -> String {
        read_json::<Sizes>(&folder.path().join("config.json")).unwrap_err().to_string()
    }

    #[test]
    fn json_errors_name_the_file_and_the_field() {
        let folder = Folder::new();
        let message = failure(&folder);
        assert!(message.contains("config.json") && message.contains("No such file"), "{message}");

        folder.write("config.json", r#"{"hidden"#);
        let message = failure(&folder);
        assert!(message.contains("config.json") && message.contains("EOF"), "{message}");

        folder.write("config.json", "{}");
        let message = failure(&folder);
        assert!(message.contains("config.json") && message.contains("`hidden_size`"), "{message}");

        folder.write("config.json", r#"{"hidden_size": -3}"#);
        let message = failure(&folder);
        assert!(message.contains("config.json") && message.contains("-3"), "{message}");
    }

    #[test]
    fn full_precision_weights_come_before_half() {
        let folder = Folder::new();
        let message = weights_file(folder.path(), "model").unwrap_err().to_string();
        assert!(message.contains("`model.safetensors`") && message.contains("`model.fp16.safetensors`"), "{message}");

        folder.write("model.fp16.safetensors", "");
        assert!(weights_file(folder.path(), "model").unwrap().ends_with("model.fp16.safetensors"));
        folder.write("model.safetensors", "");
        assert!(weights_file(folder.path(), "model").unwrap().ends_with("model.safetensors"));
    }
}
