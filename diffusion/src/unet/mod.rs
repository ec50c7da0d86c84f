//! The U-Net of Stable Diffusion 1.x and 2.x with hand-written input gradients.
//!
//! [`UNet::forward`] predicts noise. [`UNet::forward_to`] stops at a [`Tap`] and returns its activation with a [`Tape`];
//! [`UNet::vjp`] turns a cotangent of that activation into the gradient for the latents. The weights are frozen, so the tape
//! keeps only what the input gradient needs, and nothing is computed for blocks beyond the tap. For training,
//! [`UNet::vjp_lora`] gives the gradients of low-rank factors instead, which need no more of the tape.

mod attention;
mod blocks;
mod config;
mod lora;
mod lora_gradients;
mod tap;
#[cfg(test)]
mod tests;
mod text;
mod transformer;
mod weights;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Tensor};

pub use config::UNetConfig;
pub use lora_gradients::LoraGradient;
pub use tap::Tap;
pub use text::TextKeys;
pub use weights::Weight;

use crate::config::weights_file;
use crate::layers::{Conv2d, GradientScale, GroupNorm, TimestepEmbedding, silu};
use crate::lora::LoraEntry;
use crate::{Checkpoint, Error, Result, Scope};
use attention::Attention;
use blocks::{Condition, DownBlock, DownTape, Layer, MidBlock, MidTape, UpBlock, UpTape, add_skip};
use lora_gradients::LoraGradients;
use text::TextSlot;

/// A loaded U-Net, whole or up to a tap.
pub struct UNet {
    config: UNetConfig,
    dtype: DType,
    device: Device,
    time_embedding: TimestepEmbedding,
    conv_in: Conv2d,
    down: Vec<DownBlock>,
    mid: Option<MidBlock>,
    up: Vec<UpBlock>,
    out: Option<(GroupNorm, Conv2d)>,
    weight_bytes: u64,
    /// By name, as they are now.
    weights: BTreeMap<String, Weight>,
    lora: lora::Merged,
    /// Stands for these weights as they are now, so that text keys and tapes made with others are recognised.
    revision: u64,
}

/// A number that no U-Net in this process had before.
fn new_revision() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// What the input gradient of one evaluation needs, up to a tap or to the predicted noise. Each block's part is freed as the backward pass passes it.
pub struct Tape {
    revision: u64,
    tap: Option<Tap>,
    activation: Vec<usize>,
    size: (usize, usize),
    down: Vec<DownTape>,
    mid: Option<MidTape>,
    up: Vec<UpTape>,
    /// What the last norm and convolution were given, where the evaluation predicted noise.
    out: Option<Tensor>,
}

impl Tape {
    /// The tap that this evaluation stopped at; `None` when it predicted noise.
    pub fn tap(&self) -> Option<Tap> {
        self.tap
    }

    /// The shape `[B, C, h, w]` of its activation (or noise), and of the cotangent that [`UNet::vjp`] takes.
    pub fn activation_shape(&self) -> &[usize] {
        &self.activation
    }
}

impl UNet {
    /// Loads the `unet` folder of a diffusers pipeline.
    pub fn load(folder: &Path, dtype: DType, device: &Device) -> Result<Self> {
        Self::load_blocks(folder, None, dtype, device)
    }

    /// Loads no more than [`Self::forward_to`] that tap needs.
    pub fn load_to(folder: &Path, tap: &str, dtype: DType, device: &Device) -> Result<Self> {
        Self::load_blocks(folder, Some(tap), dtype, device)
    }

    fn load_blocks(folder: &Path, tap: Option<&str>, dtype: DType, device: &Device) -> Result<Self> {
        let config = UNetConfig::load(&folder.join("config.json"))?;
        let checkpoint = Checkpoint::open(&weights_file(folder, "diffusion_pytorch_model")?, dtype, device)?;
        Self::from_checkpoint(checkpoint, config, tap)
    }

    /// Every tensor of the checkpoint has to be the U-Net's; those beyond the tap are passed over.
    pub(crate) fn from_checkpoint(checkpoint: Checkpoint, config: UNetConfig, tap: Option<&str>) -> Result<Self> {
        let tap = tap.map(|name| config.tap(name)).transpose()?;
        let unet = Self::build(&checkpoint.root(), config, tap)?;
        for prefix in unet.absent_prefixes() {
            checkpoint.ignore_below(&prefix);
        }
        checkpoint.finish()?;
        Ok(unet)
    }

    fn build(root: &Scope, config: UNetConfig, end: Option<Tap>) -> Result<Self> {
        let widths = &config.block_out_channels;
        let reached = |tap: Tap| end.is_none_or(|end| tap <= end);
        let mut slot = TextSlot::default();
        let mut down = Vec::new();
        for level in (0..config.levels()).filter(|i| reached(Tap::Down(*i))) {
            down.push(DownBlock::load(&root.enter(format_args!("down_blocks.{level}")), &config, level, &mut slot)?);
        }
        let mid =
            reached(Tap::Mid).then(|| MidBlock::load(&root.enter("mid_block"), &config, &mut slot)).transpose()?;
        let mut up = Vec::new();
        for index in (0..config.levels()).filter(|i| reached(Tap::Up(*i))) {
            up.push(UpBlock::load(&root.enter(format_args!("up_blocks.{index}")), &config, index, &mut slot)?);
        }
        let out = || -> Result<_> {
            let norm =
                GroupNorm::load(&root.enter("conv_norm_out"), widths[0], config.norm_num_groups, config.norm_eps)?;
            Ok((norm, Conv2d::load(&root.enter("conv_out"), widths[0], config.out_channels, 1)?))
        };
        Ok(Self {
            dtype: root.dtype(),
            device: root.device().clone(),
            time_embedding: TimestepEmbedding::load(
                &root.enter("time_embedding"),
                widths[0],
                config.time_width(),
                config.flip_sin_to_cos,
                config.freq_shift,
            )?,
            conv_in: Conv2d::load(&root.enter("conv_in"), config.in_channels, widths[0], 1)?,
            out: end.is_none().then(out).transpose()?,
            down,
            mid,
            up,
            weight_bytes: root.taken_bytes(),
            weights: weights::loaded(root.taken()),
            lora: lora::Merged::default(),
            revision: new_revision(),
            config,
        })
    }

    /// Sizes of the model.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// The dtype that the model computes in; inputs are converted to it.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of the weights, with the originals that are kept while LoRA is merged.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes + self.lora.bytes()
    }

    /// The device that the model is on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Predicts the noise (or v) in latents `[B, in_channels, h, w]` at one timestep per item: `[B, out_channels, h, w]`.
    pub fn forward(&self, latents: &Tensor, timesteps: &[f64], text: &TextKeys) -> Result<Tensor> {
        let (norm, conv) = self.output_layers()?;
        let (x, _) = self.run(latents, &self.sinusoids(timesteps)?, text, None, false)?;
        conv.forward(&norm.forward_silu(&x)?)
    }

    /// [`Self::forward`] with what its gradient needs.
    pub fn forward_recorded(&self, latents: &Tensor, timesteps: &[f64], text: &TextKeys) -> Result<(Tensor, Tape)> {
        let (norm, conv) = self.output_layers()?;
        let (x, tape) = self.run(latents, &self.sinusoids(timesteps)?, text, None, true)?;
        let noise = conv.forward(&norm.forward_silu(&x)?)?;
        let tape = tape.expect("recorded");
        Ok((noise.clone(), Tape { activation: noise.dims().to_vec(), out: Some(x), ..tape }))
    }

    fn output_layers(&self) -> Result<&(GroupNorm, Conv2d)> {
        let message = "this U-Net was loaded up to a tap only and cannot predict noise";
        self.out.as_ref().ok_or_else(|| Error::Input(message.into()))
    }

    /// The activation `[B, C, h, w]` of a tap and what its gradient needs.
    pub fn forward_to(&self, latents: &Tensor, timesteps: &[f64], text: &TextKeys, tap: Tap) -> Result<(Tensor, Tape)> {
        self.forward_to_at(latents, &self.sinusoids(timesteps)?, text, tap)
    }

    /// [`Self::forward_to`] at timesteps that are on the device already, as [`Self::sinusoids`]: work for [`crate::Replay`].
    pub fn forward_to_at(
        &self,
        latents: &Tensor,
        sinusoids: &Tensor,
        text: &TextKeys,
        tap: Tap,
    ) -> Result<(Tensor, Tape)> {
        self.check_loaded(tap)?;
        let (activation, tape) = self.run(latents, sinusoids, text, Some(tap), true)?;
        Ok((activation, tape.expect("recorded")))
    }

    /// What the model is told of timesteps, one per item: `[B, C]` in f32.
    pub fn sinusoids(&self, timesteps: &[f64]) -> Result<Tensor> {
        self.time_embedding.sinusoids(timesteps)
    }

    /// The activation alone, where no gradient follows: each layer's intermediate results are freed at once.
    pub fn features(&self, latents: &Tensor, timesteps: &[f64], text: &TextKeys, tap: Tap) -> Result<Tensor> {
        self.check_loaded(tap)?;
        Ok(self.run(latents, &self.sinusoids(timesteps)?, text, Some(tap), false)?.0)
    }

    fn check_loaded(&self, tap: Tap) -> Result<()> {
        if self.is_loaded(tap) { Ok(()) } else { Err(Error::Input(format!("tap {tap} is not loaded"))) }
    }

    /// The gradient of `sum(cotangent * activation)` for the latents, in their shape `[B, in_channels, h, w]` and the
    /// cotangent's dtype.
    pub fn vjp(&self, tape: Tape, cotangent: &Tensor) -> Result<Tensor> {
        let (gradient, scale) = self.pull_back(tape, cotangent, &mut LoraGradients::default())?;
        let gradient = gradient.expect("a pass without LoRA goes on to the latents");
        scale.unscaled(&gradient, cotangent.dtype())
    }

    /// The gradients of `sum(cotangent * activation)` for the factors of `entries`, which are merged at strength 1, by module.
    /// An entry of a block that the tape did not pass has none. The pass ends at the entry that is first in the order of
    /// computation.
    pub fn vjp_lora(
        &self,
        tape: Tape,
        cotangent: &Tensor,
        entries: &[LoraEntry],
    ) -> Result<BTreeMap<String, LoraGradient>> {
        let mut lora = LoraGradients::of(entries, self.attentions().map(|attention| attention.path.as_str()))?;
        let (_, scale) = self.pull_back(tape, cotangent, &mut lora)?;
        lora.finish(scale.value()?)
    }

    /// A multiple of the gradient for the latents, `None` where the pass ended before, and what it and the factors' gradients were
    /// multiplied by.
    fn pull_back(
        &self,
        tape: Tape,
        cotangent: &Tensor,
        lora: &mut LoraGradients,
    ) -> Result<(Option<Tensor>, GradientScale)> {
        if tape.revision != self.revision {
            return Err(Error::Input("the tape was recorded with other weights; evaluate again".into()));
        }
        if cotangent.dims() != tape.activation {
            let (found, expected) = (cotangent.dims(), &tape.activation);
            return Err(Error::Input(format!("cotangent has shape {found:?}, the activation {expected:?}")));
        }
        if lora.are_all_found() {
            return Ok((None, GradientScale::One));
        }
        let scale = GradientScale::of(cotangent, self.dtype)?;
        let mut d = scale.scaled(cotangent, self.dtype)?.to_device(&self.device)?.contiguous()?;
        if let (Some((norm, conv)), Some(x)) = (&self.out, &tape.out) {
            d = norm.vjp_silu(x, &conv.vjp(&d, tape.size)?)?;
        }
        let mut skips = Vec::new();
        for (block, tape) in self.up.iter().zip(tape.up).rev() {
            let Some(dx) = block.vjp(tape, d, &mut skips, lora)? else { return Ok((None, scale)) };
            d = dx;
        }
        if let (Some(block), Some(tape)) = (&self.mid, tape.mid) {
            let Some(dx) = block.vjp(tape, &d, lora)? else { return Ok((None, scale)) };
            d = dx;
        }
        for (block, tape) in self.down.iter().zip(tape.down).rev() {
            let Some(dx) = block.vjp(tape, d, &mut skips, lora)? else { return Ok((None, scale)) };
            d = dx;
        }
        Ok((Some(self.conv_in.vjp(&add_skip(d, &mut skips)?, tape.size)?), scale))
    }

    /// Runs to the tap, or to the last block.
    fn run(
        &self,
        latents: &Tensor,
        sinusoids: &Tensor,
        text: &TextKeys,
        end: Option<Tap>,
        recording: bool,
    ) -> Result<(Tensor, Option<Tape>)> {
        self.check_inputs(latents, sinusoids, text)?;
        let time = silu(&self.time_embedding.forward(sinusoids)?)?;
        let condition = Condition { time: &time, text, recording };
        let reached = |tap: Tap| end.is_none_or(|end| tap <= end);
        let size = (latents.dim(2)?, latents.dim(3)?);
        let (mut down_tapes, mut mid_tape, mut up_tapes) = (Vec::new(), None, Vec::new());

        let mut x = self.conv_in.forward(&latents.to_dtype(self.dtype)?.to_device(&self.device)?)?;
        let mut skips = vec![x.clone()];
        for (_, block) in self.down.iter().enumerate().take_while(|(i, _)| reached(Tap::Down(*i))) {
            let (y, tape) = block.record(&x, condition, &mut skips)?;
            x = y;
            down_tapes.extend(recording.then_some(tape));
        }
        if let Some(block) = self.mid.as_ref().filter(|_| reached(Tap::Mid)) {
            let (y, tape) = block.record(&x, condition)?;
            x = y;
            mid_tape = recording.then_some(tape);
        }
        for (_, block) in self.up.iter().enumerate().take_while(|(i, _)| reached(Tap::Up(*i))) {
            let (y, tape) = block.record(&x, condition, &mut skips)?;
            x = y;
            up_tapes.extend(recording.then_some(tape));
        }
        let activation = x.dims().to_vec();
        let revision = self.revision;
        let (down, mid, up) = (down_tapes, mid_tape, up_tapes);
        let tape = recording.then_some(Tape { revision, tap: end, activation, size, down, mid, up, out: None });
        Ok((x, tape))
    }

    fn check_inputs(&self, latents: &Tensor, sinusoids: &Tensor, text: &TextKeys) -> Result<()> {
        let channels = self.config.in_channels;
        let batch = match latents.dims() {
            [batch, found, h, w] if *found == channels && [batch, h, w].iter().all(|size| **size > 0) => *batch,
            found => {
                return Err(Error::Input(format!("latents have shape {found:?}, expected [batch, {channels}, h, w]")));
            }
        };
        let (timesteps, width) = sinusoids.dims2()?;
        if timesteps != batch {
            return Err(Error::Input(format!("{timesteps} timesteps for a batch of {batch}")));
        }
        if width != self.config.block_out_channels[0] {
            let expected = self.config.block_out_channels[0];
            return Err(Error::Input(format!("sinusoids of timesteps are {width} wide, expected {expected}")));
        }
        if text.batch() != batch {
            return Err(Error::Input(format!("{} texts for a batch of {batch}", text.batch())));
        }
        if text.revision != self.revision {
            return Err(Error::Input("text keys were computed with other weights; compute them again".into()));
        }
        Ok(())
    }

    fn layers(&self) -> impl Iterator<Item = &Layer> {
        let (down, mid) = (self.down.iter().flat_map(|b| &b.layers), self.mid.iter().flat_map(|b| &b.layers));
        down.chain(mid).chain(self.up.iter().flat_map(|b| &b.layers))
    }

    /// Every attention that is loaded, in the order of computation: self, cross, self, cross, ...
    fn attentions(&self) -> impl Iterator<Item = &Attention> {
        self.layers().filter_map(|layer| layer.attention.as_ref()).flat_map(|transformer| transformer.attentions())
    }

    fn attentions_mut(&mut self) -> impl Iterator<Item = &mut Attention> {
        let down = self.down.iter_mut().flat_map(|b| &mut b.layers);
        let layers = down.chain(self.mid.iter_mut().flat_map(|b| &mut b.layers));
        let layers = layers.chain(self.up.iter_mut().flat_map(|b| &mut b.layers));
        layers.filter_map(|layer| layer.attention.as_mut()).flat_map(|transformer| transformer.attentions_mut())
    }

    /// Path prefixes of the blocks that the configuration has but that were not loaded.
    fn absent_prefixes(&self) -> Vec<String> {
        if self.out.is_some() {
            return Vec::new();
        }
        let last = self.config.taps().into_iter().rfind(|tap| self.is_loaded(*tap));
        last.map_or_else(Vec::new, |last| self.config.prefixes_beyond(last))
    }

    fn is_loaded(&self, tap: Tap) -> bool {
        match tap {
            Tap::Down(i) => i < self.down.len(),
            Tap::Mid => self.mid.is_some(),
            Tap::Up(i) => i < self.up.len(),
        }
    }
}
