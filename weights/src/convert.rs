//! `weights convert`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use clap::{Args, ValueEnum};
use diffusion::lora::{LoraKey, LoraLayout, LoraModule, LoraPart, Network, PEFT_METADATA, PeftMetadata};
use diffusion::{Checkpoint, RawTensor, save_safetensors, write_single_file};
use indicatif::{ProgressBar, ProgressStyle};

use crate::alpha::{self, NOTES, Note, Notes};
use weights::{Error, Result};

#[derive(Args)]
pub(crate) struct Convert {
    /// A file of weights (safetensors or PyTorch pickle); for single-file a folder in the diffusers layout
    input: PathBuf,
    /// The file to write
    output: PathBuf,
    /// The layout to write
    #[arg(long, value_enum)]
    to: Target,
    /// Write what the LoRA layout has no names for (a DPT adapter) to this file
    #[arg(long, value_name = "FILE")]
    rest: Option<PathBuf>,
    /// Add the tensors of this file (a DPT adapter) to the release
    #[arg(long, value_name = "FILE")]
    with: Option<PathBuf>,
    /// Leave out LoRA modules that the layout has no names for
    #[arg(long)]
    drop: bool,
    /// Write over files that exist
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    /// The same names in a safetensors file.
    Safetensors,
    /// LoRA under PEFT's names.
    Peft,
    /// LoRA under kohya's names.
    Kohya,
    /// LoRA under the DPT release's names, with the adapter.
    Release,
    /// A folder's model under LDM's names.
    SingleFile,
}

/// Marks a header whose `lora_adapter_metadata` repeats what the alphas of the file say, since diffusers reads no others.
const MADE_ENTRY: &str = "dpt_lora_metadata_made";

type Tensors<'a> = BTreeMap<String, RawTensor<'a>>;

/// The tensors of one LoRA module.
#[derive(Default)]
struct Module<'a> {
    down: Option<RawTensor<'a>>,
    up: Option<RawTensor<'a>>,
    alpha: Option<RawTensor<'a>>,
}

impl Convert {
    pub(crate) fn run(&self) -> Result<()> {
        let layout = match self.to {
            Target::Peft => Some(LoraLayout::Peft),
            Target::Kohya => Some(LoraLayout::Kohya),
            Target::Release => Some(LoraLayout::Release),
            Target::Safetensors | Target::SingleFile => None,
        };
        let lora_only = [("--rest", self.rest.is_some()), ("--drop", self.drop)];
        if let (None, Some((flag, _))) = (layout, lora_only.iter().find(|(_, given)| *given)) {
            return Err(Error::Request(format!("{flag} is for the LoRA layouts")));
        }
        if self.with.is_some() && layout != Some(LoraLayout::Release) {
            return Err(Error::Request("--with is for --to release".into()));
        }
        for path in [Some(&self.output), self.rest.as_ref()].into_iter().flatten() {
            if path.exists() && !self.force {
                return Err(Error::Request(format!("{} exists; --force writes over it", path.display())));
            }
        }
        match (self.to, layout) {
            (Target::SingleFile, _) => self.single_file(),
            (_, Some(layout)) => self.lora(layout),
            (_, None) => self.same_names(),
        }
    }

    fn single_file(&self) -> Result<()> {
        if !self.input.is_dir() {
            let message = "expected a folder in the diffusers layout, to write its model as a single file";
            return Err(Error::Request(format!("{}: {message}", self.input.display())));
        }
        let template = "{bar:32} {pos}/{len} tensors, {elapsed}";
        let bar =
            ProgressBar::new(0).with_style(ProgressStyle::with_template(template).expect("the template is valid"));
        write_single_file(&self.input, &self.output, &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        println!("{}", self.output.display());
        Ok(())
    }

    fn same_names(&self) -> Result<()> {
        let file = open(&self.input)?;
        let tensors = file.names().into_iter().map(|name| Ok((name.clone(), file.raw(&name)?)));
        let tensors = tensors.collect::<Result<Tensors>>()?;
        let count = tensors.len();
        save_safetensors(&self.output, tensors, file.metadata()?)?;
        println!("{}: {count} tensors", self.output.display());
        Ok(())
    }

    fn lora(&self, layout: LoraLayout) -> Result<()> {
        let file = open(&self.input)?;
        let with = self.with.as_deref().map(open).transpose()?;
        let failed = |message: String| Error::Request(format!("{}: {message}", self.input.display()));
        let mut metadata = file.metadata()?;
        let (mut modules, mut rest) = (BTreeMap::<LoraModule, Module>::new(), Tensors::new());
        for name in file.names() {
            match LoraKey::parse(&name).map_err(failed)? {
                None => drop(rest.insert(name.clone(), file.raw(&name)?)),
                Some(LoraKey { module, part, .. }) => {
                    let entry = modules.entry(module).or_default();
                    let place = match part {
                        LoraPart::Down => &mut entry.down,
                        LoraPart::Up => &mut entry.up,
                        LoraPart::Alpha => &mut entry.alpha,
                    };
                    if place.replace(file.raw(&name)?).is_some() {
                        return Err(failed(format!("tensor `{name}` is there twice, under two names")));
                    }
                }
            }
        }
        if modules.is_empty() {
            return Err(failed("holds no LoRA weights; `weights inspect` says what it is".into()));
        }
        // An entry that was made for diffusers alone is made again where it is needed.
        if metadata.remove(MADE_ENTRY).is_some() {
            metadata.remove(PEFT_METADATA);
        }
        let header = PeftMetadata::of_texts(&metadata).map_err(failed)?;
        restore_alphas(&mut modules, &mut metadata).map_err(failed)?;
        let nameless = |module: &LoraModule| module.name(layout, LoraPart::Down).is_none();
        let dropped: Vec<String> = modules.keys().filter(|module| nameless(module)).map(ToString::to_string).collect();
        self.report_dropped(layout, &dropped)?;
        let (mut out, mut notes) = (Tensors::new(), Notes::new());
        if layout == LoraLayout::Peft && !metadata.contains_key(PEFT_METADATA) {
            let described =
                modules.iter().filter_map(|(module, tensors)| describe(module, tensors)).collect::<Vec<_>>();
            if described.iter().any(|(_, rank, alpha)| *alpha != *rank as f64) {
                metadata.insert(PEFT_METADATA.into(), PeftMetadata::entry(&described));
                metadata.insert(MADE_ENTRY.into(), "true".into());
            }
        }
        for (module, tensors) in modules.into_iter().filter(|(module, _)| !nameless(module)) {
            write_module(layout, &module, tensors, &header, &mut out, &mut notes).map_err(failed)?;
        }
        if !notes.is_empty() {
            metadata.insert(NOTES.into(), serde_json::to_string(&notes).expect("plain data"));
        }
        self.finish(layout, out, rest, with.as_ref(), metadata)
    }

    fn report_dropped(&self, layout: LoraLayout, dropped: &[String]) -> Result<()> {
        match (dropped, self.drop) {
            ([], _) => Ok(()),
            (_, true) => {
                println!("left out: {}", dropped.join(", "));
                Ok(())
            }
            ([first, ..], false) => Err(Error::Request(format!(
                "{}: the {layout} layout has no names for {} module(s), the first `{first}`; --drop leaves them out",
                self.input.display(),
                dropped.len()
            ))),
        }
    }

    /// Writes the LoRA with, or beside, what else the file holds.
    fn finish<'a>(
        &self,
        layout: LoraLayout,
        mut out: Tensors<'a>,
        rest: Tensors<'a>,
        with: Option<&'a Checkpoint>,
        mut metadata: BTreeMap<String, String>,
    ) -> Result<()> {
        let count = out.len();
        if layout == LoraLayout::Release {
            out.extend(rest);
            if let Some(with) = with {
                for name in with.names() {
                    if out.insert(name.clone(), with.raw(&name)?).is_some() {
                        return Err(Error::Request(format!("`{name}` is in both files")));
                    }
                }
                metadata = with.metadata()?.into_iter().chain(metadata).collect();
            }
        } else if !rest.is_empty() {
            let Some(path) = &self.rest else {
                return Err(Error::Request(format!(
                    "{}: {} tensor(s) are no LoRA weights, the first `{}`; --rest FILE writes them to a file of their own",
                    self.input.display(),
                    rest.len(),
                    rest.keys().next().map_or("", String::as_str)
                )));
            };
            let others = rest.len();
            save_safetensors(path, rest, metadata.clone())?;
            println!("{}: {others} other tensors", path.display());
        }
        let all = out.len();
        save_safetensors(&self.output, out, metadata)?;
        println!("{}: {count} LoRA tensors under the {layout} names, {all} in all", self.output.display());
        Ok(())
    }
}

/// Path, rank and alpha of a module of the U-Net, where its tensors tell.
fn describe(module: &LoraModule, tensors: &Module) -> Option<(String, usize, f64)> {
    let rank = *tensors.down.as_ref()?.shape.first()?;
    let alpha = tensors.alpha.as_ref().map_or(Some(rank as f64), |alpha| alpha::read(alpha).ok())?;
    (module.network == Network::UNet).then(|| (module.path.clone(), rank, alpha))
}

fn open(path: &Path) -> Result<Checkpoint> {
    Ok(Checkpoint::open(path, DType::F32, &Device::Cpu)?)
}

/// Gives alphas that a header's notes speak of their tensors back, and takes their factors out of the up factors.
fn restore_alphas(
    modules: &mut BTreeMap<LoraModule, Module<'_>>,
    metadata: &mut BTreeMap<String, String>,
) -> std::result::Result<(), String> {
    let Some(text) = metadata.remove(NOTES) else { return Ok(()) };
    let mut notes: Notes = serde_json::from_str(&text).map_err(|e| format!("the header's `{NOTES}`: {e}"))?;
    for (module, tensors) in modules.iter_mut() {
        let Some(note) = notes.remove(&module.to_string()) else { continue };
        if !alpha::is_power_of_two(note.factor) {
            return Err(format!("the header's `{NOTES}`: a factor of {} for {module}", note.factor));
        }
        if let Some(up) = tensors.up.as_mut().filter(|_| note.factor != 1.) {
            *up = alpha::scaled(up, 1. / note.factor).map_err(|e| format!("{module}: {e}"))?;
        }
        let tensor = alpha::tensor(&note).map_err(|e| format!("{module}: {e}"))?;
        tensors.alpha = (!note.from_header).then_some(tensor);
    }
    match notes.keys().next() {
        None => Ok(()),
        Some(module) => Err(format!("the header's `{NOTES}` speaks of `{module}`, which is not in the file")),
    }
}

/// Names a module's tensors as `layout` does.
fn write_module<'a>(
    layout: LoraLayout,
    module: &LoraModule,
    tensors: Module<'a>,
    header: &PeftMetadata,
    out: &mut Tensors<'a>,
    notes: &mut Notes,
) -> std::result::Result<(), String> {
    let name = |part| module.name(layout, part);
    let (Some(down), Some(mut up)) = (tensors.down, tensors.up) else {
        return Err(format!("LoRA `{module}` lacks one of its two factors"));
    };
    let rank = down.shape.first().copied().unwrap_or(0);
    if rank == 0 || up.shape.get(1) != Some(&rank) {
        return Err(format!("LoRA `{module}`: factors of shapes {:?} and {:?}", down.shape, up.shape));
    }
    // PEFT keeps a header's alpha where it is; every other layout needs it said of the module.
    let of_header = header.scale(&module.path, rank) * rank as f64;
    let from_header = tensors.alpha.is_none() && layout != LoraLayout::Peft && of_header != rank as f64;
    let alpha = if from_header { Some(number(of_header)) } else { tensors.alpha };
    if let Some(alpha) = alpha {
        let value = alpha::read(&alpha).map_err(|e| format!("LoRA `{module}`: {e}"))?;
        let mut note =
            Note { value, dtype: format!("{:?}", alpha.dtype), shape: alpha.shape.clone(), factor: 1., from_header };
        let place = name(LoraPart::Alpha);
        if place.is_none() {
            note.factor = value / rank as f64;
            if !alpha::is_power_of_two(note.factor) {
                return Err(format!(
                    "LoRA `{module}` has alpha {value} and rank {rank}: the {layout} layout has no alpha, and a scale of {} \
                     cannot be folded into the factors without loss; use peft or kohya",
                    note.factor
                ));
            }
            up = alpha::scaled(&up, note.factor).map_err(|e| format!("LoRA `{module}`: {e}"))?;
        }
        if place.is_none() || from_header {
            notes.insert(module.to_string(), note);
        }
        out.extend(place.map(|name| (name, alpha)));
    }
    for (part, tensor) in [(LoraPart::Down, down), (LoraPart::Up, up)] {
        out.insert(name(part).ok_or_else(|| format!("no name for `{module}`"))?, tensor);
    }
    Ok(())
}

/// A number in f32.
fn number(value: f64) -> RawTensor<'static> {
    let data = Cow::Owned((value as f32).to_le_bytes().to_vec());
    RawTensor { dtype: safetensors::Dtype::F32, shape: Vec::new(), data }
}
