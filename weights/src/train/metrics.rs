use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use host_demo::{Curve, Figure};
use serde_json::Value;

use super::EventFile;
use crate::{Error, Result};

/// The numbers of a training run: a JSON Lines file, a TensorBoard event file, and at the end curves.
pub struct Metrics {
    path: PathBuf,
    events: EventFile,
    /// By name, of every step.
    history: BTreeMap<String, Vec<(f64, f64)>>,
}

impl Metrics {
    /// The name of the JSON Lines file in a run's folder.
    pub const FILE: &'static str = "metrics.jsonl";

    /// Of the run in `folder`. What an interrupted run wrote up to `step` is kept, what it wrote after is
    /// dropped, but for the event file of that time.
    pub fn open(folder: &Path, step: u64) -> Result<Self> {
        let path = folder.join(Self::FILE);
        let mut history = BTreeMap::<String, Vec<_>>::new();
        let mut kept = String::new();
        if step > 0 && path.is_file() {
            let text = std::fs::read_to_string(&path).map_err(|e| Error::file(&path, e))?;
            // A line that a crash cut short is not JSON.
            for (line, values) in text.lines().filter_map(|line| Some((line, numbers(line)?))) {
                let at = values.get("step").copied().unwrap_or(f64::INFINITY);
                if at <= step as f64 {
                    kept.push_str(line);
                    kept.push('\n');
                    values.into_iter().for_each(|(name, value)| history.entry(name).or_default().push((at, value)));
                }
            }
        }
        host_demo::write_whole(&path, kept.as_bytes())?;
        Ok(Self { path, events: EventFile::create(folder)?, history })
    }

    /// The numbers of a step, counted from 1.
    pub fn add(&mut self, step: u64, values: &BTreeMap<String, f64>) -> Result<()> {
        let mut line = serde_json::Map::new();
        line.insert("step".into(), step.into());
        line.extend(values.iter().map(|(name, value)| (name.clone(), Value::from(*value))));
        let mut text = Value::Object(line).to_string();
        text.push('\n');
        let write = || OpenOptions::new().append(true).create(true).open(&self.path)?.write_all(text.as_bytes());
        write().map_err(|e| Error::file(&self.path, e))?;
        self.events.scalars(step, values.iter().map(|(name, value)| (name.as_str(), *value)))?;
        for (name, value) in values {
            self.history.entry(name.clone()).or_default().push((step as f64, *value));
        }
        Ok(())
    }

    /// The mean of the last `count` values of a number.
    pub fn recent(&self, name: &str, count: usize) -> Option<f64> {
        let values = self.history.get(name)?;
        let last = &values[values.len().saturating_sub(count)..];
        (!last.is_empty()).then(|| last.iter().map(|(_, value)| value).sum::<f64>() / last.len() as f64)
    }

    /// Draws the named numbers over the steps, smoothed, as a PNG; nothing where there are none.
    pub fn plot(&self, path: &Path, names: &[&str]) -> Result<()> {
        let curve = |name: &&str| {
            let points = smoothed(self.history.get(*name)?);
            Some(Curve { label: (*name).to_owned(), points })
        };
        let curves: Vec<_> = names.iter().filter_map(curve).collect();
        if curves.is_empty() {
            return Ok(());
        }
        let axes = ("step".into(), "loss, smoothed".into());
        let figure = Figure { columns: Vec::new(), rows: Vec::new(), curves, axes };
        Ok(figure.draw()?.save_png(path, &[])?)
    }
}

fn numbers(line: &str) -> Option<BTreeMap<String, f64>> {
    let value: BTreeMap<String, Value> = serde_json::from_str(line).ok()?;
    Some(value.into_iter().filter_map(|(name, value)| Some((name, value.as_f64()?))).collect())
}

/// Means over a fiftieth of the points each.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let window = points.len().div_ceil(50).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let n = chunk.len() as f64;
        (chunk.iter().map(|p| p.0).sum::<f64>() / n, chunk.iter().map(|p| p.1).sum::<f64>() / n)
    };
    points.chunks(window).map(mean).collect()
}
