//! The text that a run or a step is scored against.

use candle_core::{DType, Device, Tensor};
use diffusion::text::TextEmbedding;
use diffusion::{Replay, TextKeys, TextModel, UNet};
use host_api::plugin::HostHandle;
use host_api::{Text, View};

use crate::source::Source;
use crate::{Error, Result};

/// CLIP(y) of each item, and what the plugin's own U-Net needs of the text.
pub(crate) struct Conditioning {
    /// `[B, p]`, f32.
    pub(crate) pooled: Tensor,
    /// Keys and values, and the context that they were made from.
    keys: Option<(TextKeys, Tensor)>,
    /// Steps scored against it, and the bound that they were corrected by.
    pub(crate) replay: Replay,
    bound: Option<f64>,
}

/// What the text must fit.
pub(crate) struct TextRequirements<'a> {
    pub(crate) batch: usize,
    /// p: width of the adapter's matching embeddings.
    pub(crate) clip_dim: usize,
    pub(crate) device: &'a Device,
    /// Whether steps may be captured as CUDA graphs.
    pub(crate) graphs: bool,
}

impl Conditioning {
    /// Reads the pooled embedding, or takes it from the context at the end-of-text positions; what the host does not give is
    /// encoded from the prompts with the base model's own text encoder. Computes keys and values for the plugin's own U-Net.
    pub(crate) fn new(
        text: &Text,
        needs: &TextRequirements,
        source: &Source,
        encoder: Option<&TextModel>,
        host: &HostHandle,
    ) -> Result<Self> {
        let mut context = text.context.map(|view| tensor(&view, needs)).transpose()?;
        let mut pooled = match (text.pooled, &context, text.end_of_text) {
            (Some(pooled), ..) => Some(tensor(&pooled, needs)?),
            (None, Some(context), Some(positions)) => Some(pool(context, positions, needs.batch)?),
            _ => None,
        };
        if pooled.is_none() || (context.is_none() && matches!(source, Source::Own(_))) {
            let (Some(prompts), Some(encoder)) = (text.prompts, encoder) else {
                let message = "the text has neither a context with a pooled embedding or end-of-text positions, nor prompts \
                               that a `base_model` with a text encoder could encode";
                return Err(Error::Text(message.into()));
            };
            let encoded = encode(prompts, encoder, host)?;
            context = context.or(Some(encoded.hidden));
            pooled = pooled.or(Some(encoded.pooled.to_dtype(DType::F32)?.to_device(needs.device)?));
        }
        let pooled = pooled.expect("given or encoded");
        expect("pooled text", pooled.dims(), &[Some(needs.batch), Some(needs.clip_dim)])?;
        let keys = match source {
            Source::Host(_) | Source::Split => None,
            Source::Own(own) => {
                let context = context.expect("given or encoded");
                let width = own.unet.config().cross_attention_dim;
                expect("text context", context.dims(), &[Some(needs.batch), None, Some(width)])?;
                Some((own.unet.text(&context)?, context))
            }
        };
        Ok(Self { pooled, keys, replay: Replay::new(needs.graphs), bound: None })
    }

    /// Tells the host's user what became of capturing steps.
    pub(crate) fn tell(&mut self, host: &HostHandle) {
        match self.replay.outcome() {
            None => {}
            Some(Ok(())) => host.log(log::Level::Debug, "from now on a step's kernels are launched as one CUDA graph"),
            Some(Err(error)) => {
                let message = "a step's kernels are launched one by one, which takes longer: no CUDA graph was made";
                host.log(log::Level::Warn, &format!("{message}: {error}"));
            }
        }
    }

    /// Keys and values for the weights as they are now.
    pub(crate) fn keys(&mut self, unet: &UNet) -> Result<&TextKeys> {
        self.replayed(unet, self.bound).map(|(_, keys, _)| keys)
    }

    /// The pooled text, keys and values for the weights as they are now, and the steps scored against them and corrected by that bound.
    pub(crate) fn replayed(&mut self, unet: &UNet, of_bound: Option<f64>) -> Result<(&Tensor, &TextKeys, &mut Replay)> {
        let Self { pooled, keys, replay, bound } = self;
        if *bound != of_bound {
            replay.forget();
            *bound = of_bound;
        }
        let (keys, context) = keys.as_mut().ok_or_else(|| Error::Shape("the run brought no text context".into()))?;
        if !keys.is_of(unet) {
            // What was captured reads the old ones, and the old weights.
            replay.forget();
            *keys = unet.text(context)?;
        }
        Ok((pooled, keys, replay))
    }
}

/// Encodes prompts and tells the host's user when one is too long.
fn encode(prompts: &[String], encoder: &TextModel, host: &HostHandle) -> Result<TextEmbedding> {
    for prompt in prompts {
        let dropped = encoder.dropped(prompt)?;
        if dropped > 0 {
            host.log(log::Level::Warn, &format!("the last {dropped} tokens of a prompt do not fit and are cut"));
        }
    }
    Ok(encoder.encode(&prompts.iter().map(String::as_str).collect::<Vec<_>>())?)
}

fn tensor(view: &View, needs: &TextRequirements) -> Result<Tensor> {
    Ok(tensor_views::read(view, needs.device)?.to_dtype(DType::F32)?)
}

/// The context `[B, S, D]` at one position per item.
fn pool(context: &Tensor, positions: &[i64], batch: usize) -> Result<Tensor> {
    expect("text context", context.dims(), &[Some(batch), None, None])?;
    let tokens = context.dim(1)?;
    let rows = positions.iter().enumerate().map(|(item, &position)| {
        let position = usize::try_from(position).ok().filter(|p| *p < tokens);
        let position = position.ok_or_else(|| {
            Error::Shape(format!("item {item}: end-of-text position {} is not within {tokens} tokens", positions[item]))
        })?;
        Ok(context.get(item)?.get(position)?)
    });
    Ok(Tensor::stack(&rows.collect::<Result<Vec<_>>>()?, 0)?)
}

fn expect(what: &str, found: &[usize], expected: &[Option<usize>]) -> Result<()> {
    if found.len() == expected.len() && found.iter().zip(expected).all(|(f, e)| e.is_none_or(|e| e == *f)) {
        return Ok(());
    }
    let expected: Vec<_> = expected.iter().map(|e| e.map_or("any".into(), |e| e.to_string())).collect();
    Err(Error::Shape(format!("{what} has shape {found:?}, expected [{}]", expected.join(", "))))
}
