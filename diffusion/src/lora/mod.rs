//! Low-rank changes of a U-Net's attention projections, from the files that users have.
//!
//! [`LoraFile::read`] understands the released attention processors' names, PEFT's and kohya's ([`LoraLayout`]); [`stack`]
//! combines several files.

mod names;
mod peft_metadata;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};

pub use names::{LoraKey, LoraLayout, LoraModule, LoraPart, Network};
pub use peft_metadata::{PEFT_METADATA, PeftMetadata};

use crate::{Checkpoint, Error, Result};

/// One low-rank change.
#[derive(Debug, Clone)]
pub struct LoraEntry {
    /// Dotted path of the projection, such as `mid_block.attentions.0.transformer_blocks.0.attn2.to_k`.
    pub module: String,
    /// `[rank, in]`.
    pub down: Tensor,
    /// `[out, rank]`.
    pub up: Tensor,
    /// alpha / rank; 1 without alpha.
    pub scale: f64,
}

/// What a file changes of a module that is not an attention projection of the U-Net, and that is therefore left as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotApplied {
    /// The module's path; one of the text encoder starts with `text_encoder`.
    pub module: String,
    /// What it is.
    pub reason: &'static str,
}

/// The low-rank changes that a file holds.
#[derive(Debug, Clone, Default)]
pub struct LoraFile {
    /// One entry per attention projection, sorted by module.
    pub entries: Vec<LoraEntry>,
    /// What is left as it is, sorted by module.
    pub not_applied: Vec<NotApplied>,
    /// The layouts of its names; almost always one.
    pub layouts: BTreeSet<LoraLayout>,
}

/// The tensors of one module.
#[derive(Default)]
struct Names {
    down: Option<String>,
    up: Option<String>,
    alpha: Option<String>,
}

impl LoraFile {
    /// Reads a file of nothing but LoRA weights, safetensors or pickle; an empty one is an error.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        let checkpoint = Checkpoint::open(path, DType::F32, device)?;
        let file = Self::read(&checkpoint)?;
        if file.layouts.is_empty() {
            return Err(Error::file(path, "holds no LoRA weights"));
        }
        checkpoint.finish()?;
        Ok(file)
    }

    /// Takes everything out of the checkpoint that has the name of a low-rank factor; other tensors stay for
    /// [`Checkpoint::finish`].
    ///
    /// Fails on a factor without its partner, factors that do not fit each other, changes that are not two factors (LoHa, LoKr,
    /// DoRA), and factors of a module that no U-Net has.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self> {
        let path = checkpoint.path();
        let failed = |message: String| Error::file(path, message);
        let (mut modules, mut layouts) = (BTreeMap::<LoraModule, Names>::new(), BTreeSet::new());
        for name in checkpoint.unclaimed() {
            let Some(LoraKey { layout, module, part }) = LoraKey::parse(&name).map_err(failed)? else { continue };
            layouts.insert(layout);
            let names = modules.entry(module.clone()).or_default();
            let place = match part {
                LoraPart::Down => &mut names.down,
                LoraPart::Up => &mut names.up,
                LoraPart::Alpha => &mut names.alpha,
            };
            if let Some(other) = place.replace(name.clone()) {
                return Err(failed(format!("tensors `{other}` and `{name}` are both for {module}")));
            }
        }
        let metadata = PeftMetadata::of(checkpoint)?;
        let (mut entries, mut not_applied) = (Vec::new(), Vec::new());
        for (module, names) in modules {
            match module.not_applied().map_err(failed)? {
                Some(reason) => {
                    let known = [names.down, names.up, names.alpha];
                    known.iter().flatten().for_each(|name| checkpoint.ignore(name));
                    not_applied.push(NotApplied { module: module.to_string(), reason });
                }
                None => entries.push(entry(checkpoint, module, names, &metadata)?),
            }
        }
        Ok(Self { entries, not_applied, layouts })
    }

    /// One line about what is not applied, for the user; `None` when everything is.
    pub fn warning(&self) -> Option<String> {
        const NAMED: usize = 3;
        let count = self.not_applied.len();
        let named: Vec<_> =
            self.not_applied.iter().take(NAMED).map(|left| format!("{} ({})", left.module, left.reason)).collect();
        let more = if count > NAMED { ", ..." } else { "" };
        (count > 0).then(|| format!("LoRA: {count} module(s) are not applied: {}{more}", named.join(", ")))
    }
}

fn entry(checkpoint: &Checkpoint, module: LoraModule, names: Names, metadata: &PeftMetadata) -> Result<LoraEntry> {
    let failed = |message: String| Error::file(checkpoint.path(), message);
    let missing = |part: &str| failed(format!("LoRA `{module}` has no {part} factor"));
    let down = matrix(checkpoint, &names.down.ok_or_else(|| missing("down"))?)?;
    let up = matrix(checkpoint, &names.up.ok_or_else(|| missing("up"))?)?;
    let (rank, expected) = (up.dim(1)?, down.dim(0)?);
    if rank != expected {
        let message = format!("LoRA `{module}`: the up factor has rank {rank}, the down factor {expected}");
        return Err(failed(message));
    }
    let scale = match names.alpha {
        Some(name) => alpha(checkpoint, &name)? / rank as f64,
        None => metadata.scale(&module.path, rank),
    };
    Ok(LoraEntry { module: module.path, down, up, scale })
}

/// A factor; one of a 1x1 convolution is taken as the matrix that it is.
fn matrix(checkpoint: &Checkpoint, name: &str) -> Result<Tensor> {
    let root = checkpoint.root();
    match root.shape(name).as_deref() {
        Some(shape @ ([rows, columns] | [rows, columns, 1, 1])) if *rows > 0 && *columns > 0 => {
            Ok(root.tensor(name, shape)?.reshape((*rows, *columns))?)
        }
        found => {
            let found = found.unwrap_or_default();
            Err(Error::file(checkpoint.path(), format!("tensor `{name}` has shape {found:?}, expected a matrix")))
        }
    }
}

fn alpha(checkpoint: &Checkpoint, name: &str) -> Result<f64> {
    let root = checkpoint.root();
    match root.shape(name).as_deref() {
        Some(shape @ ([] | [1])) => Ok(f64::from(root.tensor(name, shape)?.flatten_all()?.to_vec1::<f32>()?[0])),
        found => {
            let found = found.unwrap_or_default();
            Err(Error::file(checkpoint.path(), format!("tensor `{name}` has shape {found:?}, expected a number")))
        }
    }
}

/// Several sets of changes, each with a strength, as one: entries of the same module become one whose rank is the sum of theirs.
/// An entry that is alone keeps its factors bit for bit.
pub fn stack(files: &[(Vec<LoraEntry>, f64)]) -> Result<Vec<LoraEntry>> {
    let mut modules = BTreeMap::<&str, Vec<LoraEntry>>::new();
    for (entries, strength) in files {
        for entry in entries {
            let entry_at_strength = LoraEntry { scale: entry.scale * strength, ..entry.clone() };
            modules.entry(&entry.module).or_default().push(entry_at_strength);
        }
    }
    modules.into_iter().map(|(module, entries)| combine(module, entries)).collect()
}

/// `sum_i scale_i up_i down_i = [scale_1 up_1, scale_2 up_2, ..] [down_1; down_2; ..]`.
fn combine(module: &str, entries: Vec<LoraEntry>) -> Result<LoraEntry> {
    if let [only] = &entries[..] {
        return Ok(only.clone());
    }
    let sizes = |entry: &LoraEntry| -> Result<_> { Ok((entry.down.dim(1)?, entry.up.dim(0)?)) };
    let first = sizes(&entries[0])?;
    for other in &entries[1..] {
        let other = sizes(other)?;
        if other != first {
            let message =
                format!("LoRA `{module}`: one file changes a weight of {first:?} (in, out), another of {other:?}");
            return Err(Error::Input(message));
        }
    }
    let scaled = |entry: &LoraEntry| &entry.up * entry.scale;
    let up = entries.iter().map(scaled).collect::<candle_core::Result<Vec<_>>>()?;
    let down: Vec<_> = entries.iter().map(|entry| &entry.down).collect();
    Ok(LoraEntry { module: module.to_owned(), down: Tensor::cat(&down, 0)?, up: Tensor::cat(&up, 1)?, scale: 1. })
}
