//! Times what a corrected step is made of, one piece at a time as its input asks: `benches/against_pytorch.py` has it take turns
//! with PyTorch.
//!
//! `stopwatch UNET_FOLDER DEVICE DTYPE [TAP]` reads lines `WHAT SIZE BATCH` and answers each with seconds. WHAT is `guided` (the
//! noise of two times BATCH latents of SIZE x SIZE), `features TAP` (the U-Net up to a tap), `adapter TAP` (the score of a
//! tap's features and its gradient), `correct TAP` (features, the adapter's score, its gradient down to the latents, and Eq. 9), or
//! `plain TAP` (the same without CUDA graphs). With a TAP of its own the U-Net is loaded up to there only, as a plugin loads it.
//!
//! The adapter is untrained and of the released sizes; the text's keys and values are ready before, as in a run, which makes them
//! once. On CUDA the third time of one thing is the first of those that follow: a plugin's first step is done as it is, and its second
//! captured as a graph.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use diffusion::{Checkpoint, Replay, TextKeys, UNet};
use dpt_plugin::{Adapter, AdapterSizes, correction, score_and_gradient};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[global_allocator]
static ALLOCATOR: diffusion::TensorAllocator = diffusion::TensorAllocator::new();

const TIMESTEP: f64 = 500.;
const TOKENS: usize = 77;

/// Numbers of no pattern, the same in every run.
struct Noise(u64);

impl Noise {
    fn unit(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1 << 24) as f32
    }

    /// Of mean 0 and deviation 1.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.unit()).sum::<f32>() - 6.
    }

    fn tensor(&mut self, shape: &[usize], device: &Device) -> Result<Tensor> {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| self.normal()).collect();
        Ok(Tensor::from_vec(values, shape, device)?)
    }
}

struct Stopwatch {
    unet: UNet,
    adapters: HashMap<String, Adapter>,
    /// By what is timed.
    runs: HashMap<String, Run>,
    noise: Noise,
}

/// What stays from one time to the next, as from one step to the next.
struct Run {
    text: TextKeys,
    pooled: Tensor,
    replay: Replay,
}

impl Stopwatch {
    fn open(folder: &str, device: &str, dtype: &str, tap: Option<&str>) -> Result<Self> {
        let (folder, dtype, device) = (Path::new(folder), diffusion::dtype(dtype)?, diffusion::device(device)?);
        let unet = match tap {
            Some(tap) => UNet::load_to(folder, tap, dtype, &device)?,
            None => UNet::load(folder, dtype, &device)?,
        };
        Ok(Self { unet, adapters: HashMap::new(), runs: HashMap::new(), noise: Noise(1) })
    }

    fn adapter(&mut self, tap: &str) -> Result<&Adapter> {
        if !self.adapters.contains_key(tap) {
            let config = self.unet.config();
            let sizes = AdapterSizes {
                tap: tap.into(),
                channels: config.tap_channels(config.tap(tap)?),
                d_model: 256,
                heads: 8,
                feedforward: 2048,
                encoder_layers: 1,
                decoder_layers: 1,
                matching_queries: 10,
                grounding_queries: 100,
                clip_dim: config.cross_attention_dim,
                classes: 256,
            };
            let device = self.unet.device().clone();
            let noise = &mut self.noise;
            let tensors = sizes.initial(
                &mut |kind| match kind {
                    dpt_plugin::Draw::Uniform => noise.unit(),
                    dpt_plugin::Draw::Normal => noise.normal(),
                },
                &device,
            )?;
            let file = Checkpoint::from_tensors(Path::new("untrained"), tensors, DType::F32, &device);
            self.adapters.insert(tap.into(), Adapter::load(&file.root(), sizes)?);
        }
        Ok(&self.adapters[tap])
    }

    /// Seconds of one piece, from latents in main memory to numbers there.
    fn time(&mut self, line: &str) -> Result<f64> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (what, tap, size, batch) = match words[..] {
            ["guided", size, batch] => ("guided", None, size, batch),
            [what @ ("features" | "adapter" | "correct" | "plain"), tap, size, batch] => (what, Some(tap), size, batch),
            _ => {
                return Err(format!(
                    "`{line}`: expected `guided SIZE BATCH` or `features|adapter|correct|plain TAP SIZE BATCH`"
                )
                .into());
            }
        };
        let (size, batch): (usize, usize) = (size.parse()?, batch.parse()?);
        let rows = if what == "guided" { 2 * batch } else { batch };
        if let Some(tap) = tap {
            self.adapter(tap)?;
        }
        let (device, channels) = (self.unet.device().clone(), self.unet.config().in_channels);
        let latents = self.noise.tensor(&[rows, channels, size, size], &Device::Cpu)?;
        let times = vec![TIMESTEP; rows];
        let key = format!("{what} {tap:?} {rows}");
        if !self.runs.contains_key(&key) {
            let run = self.run(rows, what != "plain")?;
            self.runs.insert(key.clone(), run);
        }
        let (unet, run) = (&self.unet, self.runs.get_mut(&key).expect("it was made"));
        device.synchronize()?;

        let started = Instant::now();
        let z = latents.to_device(&device)?;
        let Some(tap) = tap else {
            numbers(&unet.forward(&z, &times, &run.text)?)?;
            return Ok(started.elapsed().as_secs_f64());
        };
        let (block, adapter) = (unet.config().tap(tap)?, &self.adapters[tap]);
        if what == "features" {
            unet.features(&z, &times, &run.text, block)?;
            device.synchronize()?;
            return Ok(started.elapsed().as_secs_f64());
        }
        if what == "adapter" {
            let features = unet.features(&z, &times, &run.text, block)?.to_dtype(DType::F32)?;
            device.synchronize()?;
            let started = Instant::now();
            let [gradient] = run.replay.run([&features, &adapter.sinusoids(&times)?], |[features, sinusoids], _| {
                Ok::<_, dpt_plugin::Error>([score_and_gradient(adapter, features, sinusoids, &run.pooled)?.1])
            })?;
            numbers(&gradient)?;
            let seconds = started.elapsed().as_secs_f64();
            run.replay.outcome().transpose()?;
            return Ok(seconds);
        }
        let z = z.to_dtype(DType::F32)?;
        let inputs = [&z, &unet.sinusoids(&times)?, &adapter.sinusoids(&times)?];
        let [gradient] = run.replay.run(inputs, |[z, own_times, adapters_times], _| {
            let (features, tape) = unet.forward_to_at(z, own_times, &run.text, block)?;
            let features = features.to_dtype(DType::F32)?;
            let (_, cotangent) = score_and_gradient(adapter, &features, adapters_times, &run.pooled)?;
            Ok::<_, dpt_plugin::Error>([unet.vjp(tape, &cotangent)?.to_dtype(DType::F32)?])
        })?;
        (&z + correction(&z, &gradient, 0.5, None)?)?;
        device.synchronize()?;
        let seconds = started.elapsed().as_secs_f64();
        run.replay.outcome().transpose()?;
        Ok(seconds)
    }

    /// A run of `rows` texts, its steps launched as graphs or not.
    fn run(&mut self, rows: usize, graphs: bool) -> Result<Run> {
        let (device, width) = (self.unet.device().clone(), self.unet.config().cross_attention_dim);
        let context = self.noise.tensor(&[rows, TOKENS, width], &device)?;
        let pooled = self.noise.tensor(&[rows, width], &device)?;
        Ok(Run { text: self.unet.text(&context)?, pooled, replay: Replay::new(graphs) })
    }
}

fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (folder, device, dtype, tap) = match &arguments[..] {
        [folder, device, dtype] => (folder, device, dtype, None),
        [folder, device, dtype, tap] => (folder, device, dtype, Some(tap.as_str())),
        _ => return Err("usage: stopwatch UNET_FOLDER DEVICE DTYPE [TAP]".into()),
    };
    let mut stopwatch = Stopwatch::open(folder, device, dtype, tap)?;
    for line in std::io::stdin().lines() {
        let line = line?;
        // On a thread of the pool, as `host-demo` and the plugin compute.
        println!("{}", rayon::scope(|_| stopwatch.time(&line))?);
        std::io::stdout().flush()?;
    }
    Ok(())
}
