//! `weights score`: how well texts fit pictures.

use std::path::PathBuf;

use candle_core::Tensor;
use clap::Args;
use host_demo::{Curve, Figure, Row};
use serde_json::json;
use weights::data::Picture;
use weights::world::Random;
use weights::{Error, Result, Rows};

use crate::judge::{Bench, Judge};

/// Ranks prompts for a picture, and pictures for a prompt, by the matching score averaged over timesteps.
#[derive(Args)]
pub(crate) struct Score {
    /// A picture (PNG or JPEG); may be given several times
    #[arg(long, required = true, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// A prompt; may be given several times
    #[arg(long, required = true)]
    prompt: Vec<String>,
    /// Timesteps, spread evenly over the schedule
    #[arg(long, default_value_t = 10)]
    timesteps: usize,
    /// Draws of noise at every timestep
    #[arg(long, default_value_t = 4)]
    draws: usize,
    /// Another seed, other noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Draw the pictures, and the scores over the timesteps
    #[arg(long, value_name = "FILE.png")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    judge: Judge,
}

/// Rows of a run to the tap.
const BATCH: usize = 64;

impl Score {
    pub(crate) fn run(&self) -> Result<()> {
        if self.timesteps == 0 || self.draws == 0 {
            return Err(Error::Request("--timesteps and --draws start at 1".into()));
        }
        self.plot.iter().try_for_each(|path| host_demo::check_output(path))?;
        let mut bench = self.judge.load()?;
        let total = bench.discriminator.timesteps();
        let timesteps: Vec<usize> = (0..self.timesteps).map(|i| (2 * i + 1) * total / (2 * self.timesteps)).collect();
        let scores = self.measure(&mut bench, &timesteps)?;
        if let Some(path) = &self.plot {
            self.figure(&bench, &timesteps, &scores)?.draw()?.save_png(path, &[])?;
        }
        match self.json {
            true => println!("{}", self.to_json(&bench, &timesteps, &scores)),
            false => self.print(&scores),
        }
        Ok(())
    }

    /// Every picture and prompt is seen at the same timesteps in the same noise, so that their scores differ by what they are
    /// alone.
    fn measure(&self, bench: &mut Bench, timesteps: &[usize]) -> Result<Scores> {
        let Bench { discriminator, encoder, device, .. } = bench;
        let pictures: Vec<Picture> = self.image.iter().cloned().map(Picture::File).collect();
        let latents = encoder.latents(&pictures.iter().collect::<Vec<_>>())?;
        let texts = encoder.texts(&self.prompt.iter().map(String::as_str).collect::<Vec<_>>())?;
        let shape = latents.get(0)?.shape().clone();
        let mut random = Random::new(self.seed, 0);
        let draws = (0..self.timesteps * self.draws).map(|i| {
            let noise = Tensor::from_vec(random.normals(shape.elem_count()), shape.clone(), device)?;
            Ok((timesteps[i / self.draws], noise))
        });
        let draws = draws.collect::<Result<Vec<_>>>()?;
        let mut scores = vec![vec![vec![0f64; self.timesteps]; self.prompt.len()]; self.image.len()];
        let all: Vec<_> =
            self.pairs().flat_map(|(image, prompt)| (0..draws.len()).map(move |draw| (image, prompt, draw))).collect();
        for chunk in all.chunks(BATCH) {
            let rows = |t: &Tensor, row: fn(&(usize, usize, usize)) -> usize| -> Result<Tensor> {
                let index: Vec<u32> = chunk.iter().map(|entry| row(entry) as u32).collect();
                Ok(t.index_select(&Tensor::new(index, device)?, 0)?)
            };
            let noise = Tensor::stack(&chunk.iter().map(|(_, _, draw)| &draws[*draw].1).collect::<Vec<_>>(), 0)?;
            let timesteps: Vec<usize> = chunk.iter().map(|(_, _, draw)| draws[*draw].0).collect();
            let noisy = discriminator.noised(&rows(&latents, |e| e.0)?, &noise, &timesteps)?;
            let (hidden, pooled) = (rows(&texts.hidden, |e| e.1)?, rows(&texts.pooled, |e| e.1)?);
            let found = discriminator.scores(&Rows { noisy, timesteps, hidden, pooled })?;
            for ((image, prompt, draw), score) in chunk.iter().zip(found) {
                scores[*image][*prompt][draw / self.draws] += f64::from(score) / self.draws as f64;
            }
        }
        Ok(scores)
    }

    /// Every picture with every prompt.
    fn pairs(&self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.image.len()).flat_map(|image| (0..self.prompt.len()).map(move |prompt| (image, prompt)))
    }

    fn to_json(&self, bench: &Bench, timesteps: &[usize], scores: &Scores) -> String {
        let pair = |(image, prompt): (usize, usize)| {
            json!({
                "image": self.image[image],
                "prompt": self.prompt[prompt],
                "score": mean(&scores[image][prompt]),
                "by_timestep": scores[image][prompt],
            })
        };
        let pairs: Vec<_> = self.pairs().map(pair).collect();
        let all = json!({"adapter": bench.adapter_path, "timesteps": timesteps, "draws": self.draws, "scores": pairs});
        serde_json::to_string_pretty(&all).expect("plain data")
    }

    fn print(&self, scores: &Scores) {
        let print = |heading: String, mut ranked: Vec<(f64, String)>| {
            println!("{heading}");
            ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
            ranked.iter().for_each(|(score, name)| println!("  {score:7.4}  {name}"));
        };
        if self.prompt.len() > 1 || self.image.len() == 1 {
            for (image, rows) in self.image.iter().zip(scores) {
                let ranked = rows.iter().zip(&self.prompt).map(|(values, prompt)| (mean(values), prompt.clone()));
                print(image.display().to_string(), ranked.collect());
            }
        } else {
            let ranked =
                scores.iter().zip(&self.image).map(|(rows, image)| (mean(&rows[0]), image.display().to_string()));
            print(self.prompt[0].clone(), ranked.collect());
        }
    }

    /// The pictures, as the model sees them, and each pair's score over the timesteps.
    fn figure(&self, bench: &Bench, timesteps: &[usize], scores: &Scores) -> Result<Figure> {
        let name = |path: &PathBuf| path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let columns: Vec<String> = self.image.iter().map(name).collect();
        let (width, height) = bench.encoder.size();
        let pictures = self.image.iter().map(|path| Picture::File(path.clone()).pixels(width, height));
        let pictures = pictures.collect::<Result<_>>()?;
        let curve = |(image, prompt): (usize, usize)| {
            let score = mean(&scores[image][prompt]);
            let of = if self.image.len() > 1 { format!("{}: ", columns[image]) } else { String::new() };
            let values = timesteps.iter().zip(&scores[image][prompt]);
            Curve {
                label: format!("{of}{} ({score:.3})", self.prompt[prompt]),
                points: values.map(|(t, score)| (*t as f64, *score)).collect(),
            }
        };
        let curves = self.pairs().map(curve).collect();
        let rows = vec![Row { label: String::new(), pictures }];
        Ok(Figure { columns, rows, curves, axes: ("timestep".into(), "score".into()) })
    }
}

/// By picture, prompt and timestep.
type Scores = Vec<Vec<Vec<f64>>>;

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}
