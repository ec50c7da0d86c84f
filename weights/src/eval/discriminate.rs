//! `weights eval discriminate`: how well an adapter discriminates.

use std::path::{Path, PathBuf};

use clap::Args;
use host_demo::{Curve, Figure};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use weights::data::{Manifest, ShapesSource, Source};
use weights::evaluate::{Discriminative, Share, baselines, discriminative};
use weights::world::Split;
use weights::{Error, Result};

use crate::judge::{Bench, Judge};

/// Measures matching against hard negatives, and boxes.
#[derive(Args)]
pub(crate) struct Discriminate {
    /// What to evaluate on: `shapes`, or a folder with pictures and a manifest.jsonl
    #[arg(long, default_value = "shapes", value_name = "shapes|DIR")]
    data: String,
    /// Which captions of the shapes world
    #[arg(long, value_enum, default_value = "held-out")]
    split: Split,
    /// Examples
    #[arg(long, default_value_t = 512)]
    examples: usize,
    /// Timesteps; several make a curve
    #[arg(long, value_delimiter = ',', default_value = "500")]
    t: Vec<usize>,
    /// Evaluate also what denoising errors tell without an adapter, with so many draws of noise for each text
    #[arg(long, value_name = "DRAWS")]
    baselines: Option<usize>,
    /// Another seed, other scenes and noise
    #[arg(long, default_value_t = 1_000_000)]
    seed: u64,
    /// Write the numbers as JSON
    #[arg(long, value_name = "FILE.json")]
    json: Option<PathBuf>,
    /// Draw the shares over the timesteps
    #[arg(long, value_name = "FILE.png")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    judge: Judge,
}

impl Discriminate {
    pub(crate) fn run(&self) -> Result<()> {
        self.json.iter().chain(&self.plot).try_for_each(|path| host_demo::check_output(path))?;
        let Bench { discriminator, mut encoder, adapter_path, model_path, .. } = self.judge.load()?;
        let source: Box<dyn Source> = match self.data.as_str() {
            "shapes" => Box::new(ShapesSource { seed: self.seed, split: Some(self.split), len: self.examples }),
            folder => Box::new(Manifest::open(Path::new(folder))?),
        };
        let last = discriminator.timesteps() - 1;
        if let Some(t) = self.t.iter().find(|t| **t > last) {
            return Err(Error::Request(format!("timestep {t}: the last is {last}")));
        }
        let examples = self.examples.min(source.len());
        let bar = |what: String| {
            let template = "{msg} {bar:32} {pos}/{len}, {elapsed} of {duration}";
            let style = ProgressStyle::with_template(template).expect("the template is valid");
            ProgressBar::new(examples as u64).with_style(style).with_message(what)
        };
        println!("| | image to text | text to image | overall | boxes |\n|---|---|---|---|---|");
        let (mut by_timestep, mut points) = (Vec::new(), Vec::new());
        for t in &self.t {
            let bar = bar(format!("t = {t}"));
            let step = &mut |done: usize| bar.set_position(done as u64);
            let found = discriminative(&discriminator, &mut encoder, source.as_ref(), (examples, *t), self.seed, step)?;
            bar.finish_and_clear();
            row(&format!("t = {t}"), [found.image_to_text, found.text_to_image, found.overall, found.boxes]);
            by_timestep.push(json!({"t": t, "result": found}));
            points.push((*t, found));
        }
        let mut zero_shot = Value::Null;
        if let Some(draws) = self.baselines {
            let bar = bar("denoising".into());
            let step = &mut |done: usize| bar.set_position(done as u64);
            let found =
                baselines(&discriminator, &mut encoder, source.as_ref(), (examples, draws.max(1)), self.seed, step)?;
            bar.finish_and_clear();
            row("denoising error", [found.image_to_text, found.text_to_image, found.overall, found.boxes]);
            zero_shot = json!({"draws": draws, "result": found});
        }
        by_category(&points);
        if let Some(path) = &self.plot {
            figure(&points).draw()?.save_png(path, &[])?;
        }
        if let Some(path) = &self.json {
            let all = json!({
                "model": model_path,
                "adapter": adapter_path,
                "data": source.describe(),
                "examples": examples,
                "by_timestep": by_timestep,
                "denoising": zero_shot,
            });
            host_demo::write_whole(path, serde_json::to_string_pretty(&all).expect("plain data").as_bytes())?;
        }
        Ok(())
    }
}

fn row(name: &str, shares: [Share; 4]) {
    println!("| {name} | {} |", shares.map(cell).join(" | "));
}

fn cell(share: Share) -> String {
    match share.trials {
        0 => "none".to_owned(),
        trials => format!("{:.1} % of {trials}", share.percent()),
    }
}

/// Matching by category, where the examples have any.
fn by_category(points: &[(usize, Discriminative)]) {
    let Some((_, first)) = points.first().filter(|(_, found)| !found.by_category.is_empty()) else { return };
    let names: Vec<&str> = first.by_category.keys().map(String::as_str).collect();
    println!("\n| overall, by category | {} |\n|{}", names.join(" | "), "---|".repeat(1 + names.len()));
    for (t, found) in points {
        let cells: Vec<String> = found.by_category.values().map(|share| cell(*share)).collect();
        println!("| t = {t} | {} |", cells.join(" | "));
    }
}

fn figure(points: &[(usize, Discriminative)]) -> Figure {
    let curve = |label: &str, of: fn(&Discriminative) -> Share| {
        let mut points: Vec<_> = points.iter().map(|(t, found)| (*t as f64, of(found).percent())).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Curve { label: label.into(), points }
    };
    let curves = vec![
        curve("image to text", |found| found.image_to_text),
        curve("text to image", |found| found.text_to_image),
        curve("boxes", |found| found.boxes),
    ];
    Figure { columns: Vec::new(), rows: Vec::new(), curves, axes: ("timestep".into(), "right, %".into()) }
}
