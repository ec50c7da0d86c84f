//! `weights inspect`.

use std::path::PathBuf;

use clap::Args;
use serde_json::Value;

use crate::summary::Summary;
use weights::Result;

#[derive(Args)]
pub(crate) struct Inspect {
    /// A file of weights (safetensors or PyTorch pickle), or a folder in the diffusers layout
    file: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub(crate) fn run(&self) -> Result<()> {
        let summary = Summary::of(&self.file)?;
        match self.json {
            true => println!("{}", serde_json::to_string_pretty(&summary).expect("plain data")),
            false => print!("{}", table(&summary)),
        }
        Ok(())
    }
}

/// A line per fact.
fn table(summary: &Summary) -> String {
    let mut lines = vec![
        ("file".to_owned(), summary.path.clone()),
        ("is".into(), summary.kinds.join(" and ")),
        ("family".into(), summary.family.unwrap_or("not told by its sizes").into()),
        ("tensors".into(), format!("{} with {} values, {} bytes", summary.tensors, summary.values, summary.bytes)),
        ("types".into(), summary.dtypes.iter().map(|(dtype, n)| format!("{n} {dtype}")).collect::<Vec<_>>().join(", ")),
    ];
    for (name, part) in [("adapter", &summary.adapter), ("LoRA", &summary.lora), ("model", &summary.model)] {
        for (key, value) in part.iter().filter_map(Value::as_object).flatten() {
            if key == "tap" && value.is_null() {
                lines.push((format!("{name}: tap"), "not in the file: configure `tap`".into()));
            } else if !value.is_null() && value.as_array().is_none_or(|values| !values.is_empty()) {
                lines.push((format!("{name}: {}", key.replace('_', " ")), plain(value)));
            }
        }
    }
    lines.extend(summary.metadata.iter().map(|(key, text)| (format!("header: {key}"), shortened(text))));
    if !summary.unknown.is_empty() {
        lines.push((format!("unknown ({})", summary.unknown.len()), shortened(&summary.unknown.join(", "))));
    }
    let width = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    lines.iter().map(|(name, text)| format!("{name:width$}  {text}\n")).collect()
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) if values.iter().all(|value| !value.is_object()) => {
            values.iter().map(plain).collect::<Vec<_>>().join(", ")
        }
        Value::Array(values) => {
            let entry = |value: &Value| format!("{} ({})", plain(&value["module"]), plain(&value["reason"]));
            shortened(&format!("{} modules: {}", values.len(), values.iter().map(entry).collect::<Vec<_>>().join(", ")))
        }
        Value::Object(values) => {
            values.iter().map(|(key, value)| format!("{key}: {}", plain(value))).collect::<Vec<_>>().join(", ")
        }
        other => other.to_string(),
    }
}

/// One line of at most this many characters; control characters of a hostile file do not reach the terminal.
fn shortened(text: &str) -> String {
    const MOST: usize = 200;
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MOST).collect();
    if text.chars().count() > MOST { format!("{line}...") } else { line }
}
