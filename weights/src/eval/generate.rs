//! `weights eval generate`: how well generated pictures fit their captions.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use clap::Args;
use diffusion::Checkpoint;
use dpt_plugin::{Adapter, SizeHints};
use host_demo::{Curve, Figure};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use weights::evaluate::{Alignment, Sampling, Variant, generative, paired_difference, wilson};
use weights::world::{Category, Split};
use weights::{Error, Result};

use crate::training::model_or_shipped;

/// Samples captions of the shapes world and asks its oracle. Needs a model that draws 64x64.
#[derive(Args)]
pub(crate) struct Generate {
    /// The base model [default: the shipped weights/shapes]
    #[arg(long, value_name = "DIR|FILE")]
    model: Option<PathBuf>,
    /// An adapter to correct with, its LoRA merged; may be given several times
    #[arg(long, value_name = "FILE")]
    adapter: Vec<PathBuf>,
    /// Strengths of the correction; 0 measures an adapter's LoRA alone
    #[arg(long, value_name = "F,F,..", value_delimiter = ',', default_values_t = [0., 1., 8.])]
    eta: Vec<f64>,
    /// LoRA to sample with and no correction; may be given several times
    #[arg(long, value_name = "FILE")]
    lora: Vec<PathBuf>,
    /// A file of `weights tune` whose LoRA the others are held against, beside the base model: that of denoising alone
    #[arg(long, value_name = "FILE")]
    control: Option<PathBuf>,
    /// Captions of each split
    #[arg(long, default_value_t = 128, value_parser = at_least_one)]
    captions: usize,
    /// Pictures of each caption
    #[arg(long, default_value_t = 1, value_parser = at_least_one)]
    seeds: usize,
    /// Only this split
    #[arg(long, value_enum)]
    split: Option<Split>,
    /// Steps of DDIM
    #[arg(long, default_value_t = 25)]
    steps: usize,
    /// Classifier-free guidance
    #[arg(long, default_value_t = 4.)]
    guidance: f64,
    /// Pictures that are sampled together
    #[arg(long, default_value_t = 32, value_parser = at_least_one)]
    batch: usize,
    /// Another seed, other captions and noise
    #[arg(long, default_value_t = 2_000_000)]
    seed: u64,
    /// Where to compute: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Write the numbers as JSON
    #[arg(long, value_name = "FILE.json")]
    json: Option<PathBuf>,
    /// Draw alignment over eta
    #[arg(long, value_name = "FILE.png", requires = "adapter")]
    plot: Option<PathBuf>,
}

fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a number from 1".into()),
        Ok(number) => Ok(number),
    }
}

impl Generate {
    pub(crate) fn run(&self) -> Result<()> {
        self.json.iter().chain(&self.plot).try_for_each(|path| host_demo::check_output(path))?;
        let model = model_or_shipped(self.model.as_deref())?;
        self.check()?;
        let sampling = Sampling {
            steps: self.steps,
            guidance: self.guidance,
            captions: self.captions,
            seeds: self.seeds,
            seed: self.seed,
            batch: self.batch,
        };
        let variants = self.variants();
        let splits = self.split.map_or(vec![Split::Train, Split::HeldOut], |split| vec![split]);
        let (mut records, mut points) = (Vec::new(), Vec::new());
        for split in splits {
            let references = if self.control.is_some() { &["base", "control"][..] } else { &["base"] };
            let columns: String = references.iter().map(|name| format!(" against {name} |")).collect();
            println!("| {split} | one | binding | spatial | count | all |{columns} Frechet |");
            println!("{}|", "|---".repeat(7 + references.len()));
            // Of each variant so far; the references are the first.
            let mut right = Vec::<Vec<bool>>::new();
            for variant in &variants {
                let template = "{msg} {bar:32} {pos}/{len} pictures, {elapsed} of {duration}";
                let style = ProgressStyle::with_template(template).expect("the template is valid");
                let bar = ProgressBar::new((self.captions * self.seeds) as u64).with_style(style);
                bar.set_message(format!("{split}, {}", variant.label));
                let step = &mut |done: usize| bar.set_position(done as u64);
                let found = generative(&model, variant, split, sampling, &self.device, step)?;
                bar.finish_and_clear();
                let earlier: Vec<_> = (0..references.len()).map(|at| right.get(at).map(Vec::as_slice)).collect();
                println!("{}", row(&variant.label, &found, &earlier));
                right.push(found.right.clone());
                points.push((split, variant.clone(), found.clone()));
                records.push(json!({
                    "split": split.to_string(),
                    "variant": variant.label,
                    "adapter": variant.adapter,
                    "lora": variant.lora,
                    "eta": variant.eta,
                    "alignment": found,
                }));
                // After every variant: what took hours is not lost with what comes after.
                self.write_json(&model, &records)?;
            }
        }
        if let Some(path) = &self.plot {
            self.figure(&points).draw()?.save_png(path, &[])?;
        }
        Ok(())
    }

    /// Fails before anything is sampled where it would fail after.
    fn check(&self) -> Result<()> {
        if self.captions * self.seeds < 2 {
            return Err(Error::Request("one picture has no Frechet distance: more --captions or --seeds".into()));
        }
        for path in &self.lora {
            Checkpoint::open(path, DType::F32, &Device::Cpu)?;
        }
        for path in self.adapter.iter().chain(&self.control) {
            Adapter::open(path, SizeHints::default(), &Device::Cpu)?;
        }
        diffusion::device(&self.device)?;
        Ok(())
    }

    fn write_json(&self, model: &Path, records: &[Value]) -> Result<()> {
        let Some(path) = &self.json else { return Ok(()) };
        let all = json!({
            "model": model,
            "steps": self.steps,
            "guidance": self.guidance,
            "captions": self.captions,
            "seeds": self.seeds,
            "seed": self.seed,
            "results": records,
        });
        Ok(host_demo::write_whole(path, serde_json::to_string_pretty(&all).expect("plain data").as_bytes())?)
    }

    /// The base model, the control, every LoRA alone, and every adapter at every eta.
    fn variants(&self) -> Vec<Variant> {
        let base = Variant { label: "base".into(), adapter: None, eta: 0., lora: None };
        let name = |path: &PathBuf| {
            let mut parts: Vec<_> = path.iter().rev().take(2).map(|part| part.to_string_lossy()).collect();
            parts.reverse();
            parts.join("/")
        };
        let alone =
            self.lora.iter().map(|path| Variant { label: name(path), lora: Some(path.clone()), ..base.clone() });
        let corrected = self.adapter.iter().flat_map(|path| {
            self.eta.iter().map(|eta| Variant {
                label: format!("{}, eta {eta}", name(path)),
                adapter: Some(path.clone()),
                eta: *eta,
                lora: None,
            })
        });
        let control = self.control.iter().map(|path| Variant {
            label: format!("{}, control", name(path)),
            adapter: Some(path.clone()),
            ..base.clone()
        });
        [base.clone()].into_iter().chain(control).chain(alone).chain(corrected).collect()
    }

    fn figure(&self, points: &[(Split, Variant, Alignment)]) -> Figure {
        let mut curves = Vec::new();
        for (split, adapter) in
            [Split::Train, Split::HeldOut].iter().flat_map(|s| self.adapter.iter().map(move |a| (s, a)))
        {
            let of_curve = points.iter().filter(|(s, v, _)| s == split && v.adapter.as_ref() == Some(adapter));
            let mut points: Vec<_> = of_curve.map(|(_, v, found)| (v.eta, found.all.percent())).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            if !points.is_empty() {
                curves.push(Curve { label: format!("{}, {split}", adapter.display()), points });
            }
        }
        Figure { columns: Vec::new(), rows: Vec::new(), curves, axes: ("eta".into(), "aligned, %".into()) }
    }
}

/// A line of the table: shares in percent, the whole with its interval, and the differences from the references that there are
/// already.
fn row(label: &str, found: &Alignment, references: &[Option<&[bool]>]) -> String {
    let cell = |category: Category| match found.by_category.get(&category) {
        Some(share) => format!("{:.0}", share.percent()),
        None => "none".into(),
    };
    let cells = Category::ALL.map(cell).join(" | ");
    let (low, high) = wilson(found.all.hits, found.all.trials);
    let all = format!("{:.1} ({:.1} to {:.1})", found.all.percent(), 100. * low, 100. * high);
    let difference = |reference: &Option<&[bool]>| match reference {
        None => " |".into(),
        Some(reference) => {
            let (difference, (low, high)) = paired_difference(reference, &found.right);
            format!(" {:+.1} ({:+.1} to {:+.1}) |", 100. * difference, 100. * low, 100. * high)
        }
    };
    let differences: String = references.iter().map(difference).collect();
    format!("| {label} | {cells} | {all} |{differences} {:.3} |", found.frechet)
}
