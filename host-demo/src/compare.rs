//! `host-demo compare`: the same prompts and seeds without the plugin, with its LoRA, and corrected at several strengths.

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Tensor;
use clap::Args;
use host_demo::{Curve, Error, Figure, Request, Result, Rgb, Row, Session, StepRecord, check_output, seeded_noise};
use indicatif::{MultiProgress, ProgressBar};
use serde::Serialize;
use serde_json::{Value, json};

use crate::options::{Loaded, ModelOptions, SamplingOptions, bar_style, write_json};

#[derive(Args)]
pub(crate) struct Compare {
    /// A prompt; may be given several times
    #[arg(long, required_unless_present = "prompts")]
    prompt: Vec<String>,
    /// File with a prompt on every line
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    sampling: SamplingOptions,
    /// Strengths of the correction, a column each
    #[arg(long, value_name = "F,F,..", value_delimiter = ',', default_values_t = [1., 8.])]
    eta: Vec<f64>,
    /// The first seed of every prompt
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Seeds of every prompt
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// Pictures that are sampled together
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Write all numbers as JSON
    #[arg(long, value_name = "FILE.json")]
    json: Option<PathBuf>,
    /// The picture
    #[arg(long, value_name = "FILE.png", default_value = "compare.png")]
    out: PathBuf,
}

/// A row: where every variant starts.
struct Start {
    prompt: String,
    seed: u64,
}

/// A column: what is done to the same starts.
struct Variant {
    label: String,
    /// 0 corrects nothing and leaves the latents bit for bit; the score is computed all the same.
    eta: f64,
    lora: bool,
}

/// Everything that was measured.
#[derive(Serialize)]
struct Comparison {
    settings: Value,
    variants: Vec<VariantRecord>,
    picture: String,
}

#[derive(Serialize)]
struct VariantRecord {
    label: String,
    eta: f64,
    lora: bool,
    /// Wall-clock time of sampling, without decoding.
    seconds: f64,
    /// The scored steps, counted from the schedule's beginning.
    steps: Vec<usize>,
    /// Mean over the rows at each of them.
    mean_scores: Vec<f64>,
    rows: Vec<RowRecord>,
}

/// One picture. The lists have an entry for every scored step; null where a number is not finite.
#[derive(Serialize)]
struct RowRecord {
    prompt: String,
    seed: u64,
    scores: Vec<Option<f32>>,
    correction_norms: Vec<f32>,
}

impl Compare {
    pub(crate) fn run(&self, bars: &MultiProgress) -> Result<()> {
        let starts = self.starts()?;
        [&self.out].into_iter().chain(&self.json).try_for_each(|path| check_output(path))?;
        let mut loaded = self.model.load(true, bars)?;
        loaded.session.set_param("monitor", 1.)?;
        let variants = self.variants(&loaded.session)?;
        let batches = starts.chunks(self.batch.into());
        let steps = (variants.len() * batches.len() * self.sampling.steps) as u64;
        let bar = bars.add(ProgressBar::new(steps).with_style(bar_style()));
        let (mut records, mut columns) = (Vec::new(), Vec::new());
        for variant in &variants {
            bar.set_message(variant.label.clone());
            let (record, pictures) = self.column(&mut loaded, variant, &starts, &bar)?;
            records.push(record);
            columns.push(pictures.into_iter());
        }
        bar.finish();
        let row = |start: &Start| Row {
            label: format!("{}, seed {}", start.prompt, start.seed),
            pictures: columns.iter_mut().filter_map(Iterator::next).collect(),
        };
        let figure = Figure {
            columns: variants.iter().map(|variant| variant.label.clone()).collect(),
            rows: starts.iter().map(row).collect(),
            curves: records.iter().map(VariantRecord::curve).collect(),
            axes: ("step".into(), "mean matching score".into()),
        };
        let settings = self.settings(&loaded)?;
        figure.draw()?.save_png(&self.out, &[("host-demo", settings.to_string())])?;
        eprintln!("{}", self.out.display());
        let Some(path) = &self.json else { return Ok(()) };
        write_json(path, &Comparison { settings, variants: records, picture: self.out.display().to_string() })
    }

    /// Every prompt with every seed.
    fn starts(&self) -> Result<Vec<Start>> {
        let prompts = match &self.prompts {
            None => self.prompt.clone(),
            Some(path) => lines(path)?,
        };
        let seeds = || (0..self.seeds).map(|i| self.seed.wrapping_add(i));
        let starts = prompts.iter().flat_map(|prompt| seeds().map(|seed| Start { prompt: prompt.clone(), seed }));
        Ok(starts.collect())
    }

    fn variants(&self, session: &Session) -> Result<Vec<Variant>> {
        let brings_lora = session.plugin_lora_count()? > 0;
        let mut variants = vec![Variant { label: "without plugin".into(), eta: 0., lora: false }];
        if brings_lora {
            variants.push(Variant { label: "LoRA".into(), eta: 0., lora: true });
        }
        let of_eta = |eta: &f64| {
            let label = if brings_lora { format!("LoRA, eta {eta}") } else { format!("eta {eta}") };
            Variant { label, eta: *eta, lora: true }
        };
        variants.extend(self.eta.iter().map(of_eta));
        Ok(variants)
    }

    /// Samples every row of a variant.
    fn column(
        &self,
        loaded: &mut Loaded,
        variant: &Variant,
        starts: &[Start],
        bar: &ProgressBar,
    ) -> Result<(VariantRecord, Vec<Rgb>)> {
        loaded.session.set_param("eta", variant.eta)?;
        let mut record = VariantRecord {
            label: variant.label.clone(),
            eta: variant.eta,
            lora: variant.lora,
            seconds: 0.,
            steps: Vec::new(),
            mean_scores: Vec::new(),
            rows: Vec::new(),
        };
        let mut pictures = Vec::new();
        for starts in starts.chunks(self.batch.into()) {
            let request = self.request(loaded, starts, variant)?;
            let started = Instant::now();
            let outcome = loaded.session.run(&request, &mut |_, done| {
                // Evaluations that a sampler adds are no steps.
                bar.inc(u64::from(done.is_none_or(|done| done.sub_evaluation == 0)));
            })?;
            record.seconds += started.elapsed().as_secs_f64();
            record.add(starts, &outcome.steps);
            let images = loaded.session.decode(&outcome.latents)?;
            for item in 0..starts.len() {
                pictures.push(Rgb::from_tensor(&images.get(item)?)?);
            }
        }
        record.mean();
        Ok((record, pictures))
    }

    fn request(&self, loaded: &Loaded, starts: &[Start], variant: &Variant) -> Result<Request> {
        let [channels, height, width] = self.sampling.latents_shape(&loaded.session)?;
        let noise = |start: &Start| seeded_noise(start.seed, [1, channels, height, width], &loaded.device);
        let noise = Tensor::cat(&starts.iter().map(noise).collect::<Result<Vec<_>>>()?, 0)?;
        let prompts = starts.iter().map(|start| start.prompt.clone()).collect();
        Ok(Request { plugin_lora: variant.lora, ..self.sampling.request(loaded, prompts, noise)? })
    }

    fn settings(&self, loaded: &Loaded) -> Result<Value> {
        let [_, height, width] = self.sampling.latents_shape(&loaded.session)?;
        let scale = loaded.session.latent_scale();
        let noise = seeded_noise(0, [1, 1, 1, 1], &loaded.device)?;
        let request = self.sampling.request(loaded, vec![String::new()], noise)?;
        Ok(json!({
            "model": loaded.folder, "plugin": loaded.plugin.as_ref().map(|choice| &choice.library),
            "config": loaded.plugin.as_ref().map(|choice| &choice.config), "negative": request.negative,
            "scheduler": request.scheduler.name(), "mode": request.mode.name(), "steps": request.steps,
            "guidance": request.guidance, "lora": loaded.lora, "width": width * scale, "height": height * scale,
            "device": self.model.device, "dtype": self.model.dtype,
        }))
    }
}

impl VariantRecord {
    /// Takes in a batch.
    fn add(&mut self, starts: &[Start], steps: &[StepRecord]) {
        let scored: Vec<_> = steps.iter().filter(|step| step.sub_evaluation == 0).collect();
        self.steps = scored.iter().map(|step| step.index).collect();
        for (item, start) in starts.iter().enumerate() {
            self.rows.push(RowRecord {
                prompt: start.prompt.clone(),
                seed: start.seed,
                scores: scored.iter().map(|step| step.items[item].score).collect(),
                correction_norms: scored.iter().map(|step| step.items[item].correction_norm).collect(),
            });
        }
    }

    /// Means over the rows that have a score.
    fn mean(&mut self) {
        let mean = |step: usize| {
            let scores: Vec<f64> = self.rows.iter().filter_map(|row| row.scores[step]).map(f64::from).collect();
            scores.iter().sum::<f64>() / scores.len().max(1) as f64
        };
        self.mean_scores = (0..self.steps.len()).map(mean).collect();
    }

    fn curve(&self) -> Curve {
        let points = self.steps.iter().zip(&self.mean_scores).map(|(step, score)| (*step as f64, *score));
        Curve { label: self.label.clone(), points: points.collect() }
    }
}

/// The lines of a file that are not empty.
fn lines(path: &Path) -> Result<Vec<String>> {
    let failed = |message: String| Error::File { path: path.to_owned(), message };
    let text = std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
    let lines: Vec<String> = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
    if lines.is_empty() {
        return Err(failed("holds no prompts; expected one a line".into()));
    }
    Ok(lines)
}
