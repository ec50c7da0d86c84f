//! `weights ground`: where in a picture a phrase's object is.

use std::path::PathBuf;

use candle_core::Tensor;
use clap::Args;
use host_demo::Rgb;
use serde_json::json;
use weights::data::{Picture, read_picture};
use weights::evaluate::agreed;
use weights::world::Random;
use weights::{Error, Result, Rows};

use crate::judge::{Bench, Judge};

/// Draws the box that the grounding heads find for a phrase, and prints it as JSON.
#[derive(Args)]
pub(crate) struct Ground {
    /// The picture (PNG or JPEG)
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// What to look for, such as "the red circle"
    #[arg(long)]
    phrase: String,
    /// The picture with the box
    #[arg(long, default_value = "ground.png", value_name = "FILE.png")]
    out: PathBuf,
    /// How much noise the U-Net sees the picture in
    #[arg(long, default_value_t = 200)]
    timestep: usize,
    /// Draws of noise; the box that agrees best with those of the others is taken
    #[arg(long, default_value_t = 16)]
    draws: usize,
    /// Another seed, other noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    judge: Judge,
}

impl Ground {
    pub(crate) fn run(&self) -> Result<()> {
        host_demo::check_output(&self.out)?;
        let Bench { discriminator, mut encoder, device, .. } = self.judge.load()?;
        if self.draws == 0 || self.timestep >= discriminator.timesteps() {
            let last = discriminator.timesteps() - 1;
            return Err(Error::Request(format!("--draws starts at 1, --timestep is at most {last}")));
        }
        let picture = read_picture(&self.image)?;
        let latents = encoder.latents(&[&Picture::File(self.image.clone())])?;
        let text = encoder.texts(&[&self.phrase])?;
        let n = self.draws;
        let every = |t: &Tensor| -> Result<Tensor> {
            Ok(t.index_select(&Tensor::zeros(n, candle_core::DType::U32, &device)?, 0)?)
        };
        let latents = every(&latents)?;
        let noise = Random::new(self.seed, 0).normals(latents.elem_count());
        let noise = Tensor::from_vec(noise, latents.shape(), &device)?;
        let timesteps = vec![self.timestep; n];
        let noisy = discriminator.noised(&latents, &noise, &timesteps)?;
        let rows = Rows { noisy, timesteps, hidden: every(&text.hidden)?, pooled: every(&text.pooled)? };
        let found = agreed(&discriminator.find(&rows)?);
        let (width, height) = (f64::from(picture.width), f64::from(picture.height));
        let [cx, cy, w, h] = found.bounding_box.map(f64::from);
        // Of a box that reaches over the border, what is in the picture.
        let [left, right] = [cx - w / 2., cx + w / 2.].map(|x| x.clamp(0., 1.) * width);
        let [top, bottom] = [cy - h / 2., cy + h / 2.].map(|y| y.clamp(0., 1.) * height);
        let pixels = [left, top, right - left, bottom - top].map(|v| (v * 10.).round() / 10.);
        frame(picture, pixels)?.save_png(&self.out, &[("phrase", self.phrase.clone())])?;
        let answer = json!({
            "image": self.image,
            "phrase": self.phrase,
            "box": pixels,
            "probability": found.probability,
            "picture": self.out,
        });
        println!("{}", serde_json::to_string_pretty(&answer).expect("plain data"));
        Ok(())
    }
}

/// The picture, enlarged where it is small, with the box's outline.
fn frame(picture: Rgb, [x, y, w, h]: [f64; 4]) -> Result<Rgb> {
    const CLEAR: u32 = 384;
    const COLOUR: [u8; 3] = [255, 0, 160];
    let scale = (CLEAR / picture.width.max(picture.height)).max(1);
    let mut drawn = Rgb::filled(picture.width * scale, picture.height * scale, [0; 3])?;
    drawn.paste(&picture, (0, 0), scale);
    let at = |v: f64, most: u32| ((v * f64::from(scale)).round().max(0.) as u32).min(most - 1);
    let (left, right) = (at(x, drawn.width), at(x + w, drawn.width));
    let (top, bottom) = (at(y, drawn.height), at(y + h, drawn.height));
    for thickness in 0..(scale / 2).clamp(2, 3) {
        let inner =
            |low: u32, high: u32| (low.saturating_add(thickness).min(high), high.saturating_sub(thickness).max(low));
        let ((l, r), (t, b)) = (inner(left, right), inner(top, bottom));
        (l..=r).for_each(|x| [t, b].into_iter().for_each(|y| drawn.set(x, y, COLOUR)));
        (t..=b).for_each(|y| [l, r].into_iter().for_each(|x| drawn.set(x, y, COLOUR)));
    }
    Ok(drawn)
}
