//! `weights shapes`: the shapes world as a folder that `--data` takes.

use std::path::{Path, PathBuf};

use clap::Args;
use host_demo::Rgb;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use weights::data::{Example, Manifest, Picture, ShapesSource, Source};
use weights::world::{Expression, SIDE, Split};
use weights::{Error, Result};

/// Draws scenes of the shapes world, with captions, hard negatives and expressions.
#[derive(Args)]
pub(crate) struct Shapes {
    /// The folder to write
    folder: PathBuf,
    /// Scenes
    #[arg(long, default_value_t = 256)]
    examples: usize,
    /// Which captions [default: those of both splits, in the proportion that they have]
    #[arg(long, value_enum)]
    split: Option<Split>,
    /// Another seed, other scenes
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl Shapes {
    pub(crate) fn run(&self) -> Result<()> {
        let manifest = self.folder.join(Manifest::FILE);
        if manifest.exists() {
            return Err(Error::file(&manifest, "exists; choose another folder"));
        }
        std::fs::create_dir_all(&self.folder).map_err(|e| Error::file(&self.folder, e))?;
        let source = ShapesSource { seed: self.seed, split: self.split, len: self.examples };
        let template = "{bar:32} {pos}/{len} scenes, {elapsed} of {duration}";
        let style = ProgressStyle::with_template(template).expect("the template is valid");
        let bar = ProgressBar::new(self.examples as u64).with_style(style);
        let mut lines = String::new();
        for index in 0..source.len() {
            lines.push_str(&self.write(index, &source.example(index)?)?);
            lines.push('\n');
            bar.inc(1);
        }
        bar.finish_and_clear();
        host_demo::write_whole(&manifest, lines.as_bytes())?;
        println!("{}", manifest.display());
        Ok(())
    }

    /// Draws an example's pictures; its line of the manifest.
    fn write(&self, index: usize, example: &Example) -> Result<String> {
        let save = |name: String, picture: &Picture| -> Result<String> {
            let pixels: Rgb = picture.pixels(SIDE as u32, SIDE as u32)?;
            pixels.save_png(&self.folder.join(Path::new(&name)), &[])?;
            Ok(name)
        };
        let image = save(format!("{index:06}.png"), &example.picture)?;
        let hard = example.hard_pictures.iter().enumerate();
        let hard =
            hard.map(|(n, picture)| save(format!("{index:06}-hard{n}.png"), picture)).collect::<Result<Vec<_>>>()?;
        let line = json!({
            "image": image,
            "caption": example.caption,
            "category": example.category,
            "hard_captions": example.hard_captions,
            "hard_images": hard,
            "expressions": example.expressions.iter().map(expression).collect::<Vec<_>>(),
        });
        Ok(line.to_string())
    }
}

fn expression(expression: &Expression) -> serde_json::Value {
    let [cx, cy, w, h] = expression.bounding_box.map(|v| f64::from(v) * SIDE as f64);
    let tenth = |v: f64| (v * 10.).round() / 10.;
    let coco = [cx - w / 2., cy - h / 2., w, h].map(tenth);
    json!({"text": expression.text, "box": coco})
}
