//! LoRA weights as a safetensors file.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::{Lora, LoraEntry, LoraLayout};
use crate::error::{Error, Result, Status};

impl Lora {
    /// Writes all entries. The file appears whole or not at all: it is written beside its place and then renamed.
    pub fn write(&self, path: &Path, layout: LoraLayout) -> Result<()> {
        let bytes = self.to_safetensors(layout)?;
        replace(path, &bytes).map_err(|error| {
            let status = match error.kind() {
                ErrorKind::NotFound | ErrorKind::NotADirectory => Status::NotFound,
                _ => Status::Internal,
            };
            Error::new(status, format!("cannot write {}: {error}", path.display()))
        })
    }

    /// The bytes of the file.
    pub fn to_safetensors(&self, layout: LoraLayout) -> Result<Vec<u8>> {
        let little_endian = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let mut tensors = Vec::new();
        for entry in self.entries() {
            let LoraEntry { rank, in_features, out_features, .. } = *entry;
            let (prefix, down, up) = match layout {
                LoraLayout::Peft => (format!("unet.{}", entry.module), "lora_A", "lora_B"),
                LoraLayout::Kohya => (format!("lora_unet_{}", entry.module.replace('.', "_")), "lora_down", "lora_up"),
            };
            tensors.push((format!("{prefix}.{down}.weight"), vec![rank, in_features], little_endian(&entry.down)));
            tensors.push((format!("{prefix}.{up}.weight"), vec![out_features, rank], little_endian(&entry.up)));
            // PEFT's is in the header; a tensor that is named for no factor makes diffusers refuse the file.
            if layout == LoraLayout::Kohya {
                let alpha = (entry.scale * rank as f64) as f32;
                tensors.push((format!("{prefix}.alpha"), vec![], little_endian(&[alpha])));
            }
        }
        let mut views = Vec::with_capacity(tensors.len());
        for (name, shape, bytes) in &tensors {
            views.push((name, TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(broken)?));
        }
        let metadata =
            (layout == LoraLayout::Peft).then(|| HashMap::from([(PEFT_METADATA.to_owned(), self.peft_metadata())]));
        safetensors::serialize(views, metadata).map_err(broken)
    }

    /// What PEFT keeps in a file's header; diffusers takes alpha from it alone.
    fn peft_metadata(&self) -> String {
        let alpha = |entry: &LoraEntry| entry.scale * entry.rank as f64;
        let map = |value: &dyn Fn(&LoraEntry) -> Value| -> Value {
            Value::Object(self.entries().iter().map(|entry| (entry.module.clone(), value(entry))).collect())
        };
        let first = self.entries().first();
        json!({
            "unet.peft_type": "LORA",
            "unet.r": first.map_or(1, |entry| entry.rank),
            "unet.lora_alpha": first.map_or(1., alpha),
            "unet.rank_pattern": map(&|entry| json!(entry.rank)),
            "unet.alpha_pattern": map(&|entry| json!(alpha(entry))),
            "unet.target_modules": self.entries().iter().map(|entry| &entry.module).collect::<Vec<_>>(),
        })
        .to_string()
    }
}

/// The header entry that PEFT and diffusers read.
const PEFT_METADATA: &str = "lora_adapter_metadata";

fn broken(error: SafeTensorError) -> Error {
    Error::new(Status::Internal, format!("LoRA as safetensors: {error}"))
}

/// A name beside `path` that no other call uses.
fn beside(path: &Path) -> io::Result<PathBuf> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or_else(|| io::Error::new(ErrorKind::NotFound, "the path names no file"))?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.{}.tmp", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
    Ok(path.with_file_name(temporary))
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = beside(path)?;
    let mut file = File::create_new(&temporary)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    drop(file);
    let renamed = written.and_then(|()| fs::rename(&temporary, path));
    if renamed.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    renamed
}
