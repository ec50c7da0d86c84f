use std::collections::BTreeMap;

use candle_core::{DType, Tensor, Var};
use diffusion::Tape;
use dpt_plugin::loss::{GroundingLoss, in_batch_loss, pair_scores, scores_of_texts, triplet_loss};

use super::{Batch, Model};
use crate::Result;
use crate::discriminator::as_f64;

/// Whom a picture and its caption are held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Contrast {
    /// One hard and one random negative of each (release): five passes to the tap per item.
    Triplets,
    /// Every other caption of the batch (Eq. 3-4): one pass per item.
    InBatch,
}

/// Weights of the losses (Eq. 8); one that is 0 is not computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossWeights {
    /// L_T2I + L_I2T.
    pub matching: f64,
    /// L_ground.
    pub grounding: f64,
    /// Mean squared error of the predicted noise, or v.
    pub denoising: f64,
}

/// What is minimised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    /// Weights of its parts.
    pub weights: LossWeights,
    /// The matching loss.
    pub contrast: Contrast,
    /// The grounding loss.
    pub grounding: GroundingLoss,
}

/// The losses by name, unweighted, and their weighted sum as `loss`.
pub type Losses = BTreeMap<&'static str, f64>;

/// Gradients by parameter.
pub type Gradients = BTreeMap<String, Tensor>;

/// 1 / tau is kept below this, as CLIP does.
const MOST_SCALE: f32 = 100.;

/// Rows of one run to the tap: latents at the items' timesteps with texts.
struct Rows {
    latents: Vec<Tensor>,
    texts: Vec<Tensor>,
    timesteps: Vec<f64>,
}

impl Rows {
    fn add(&mut self, latents: &Tensor, text: &Tensor, timesteps: &[f64]) {
        self.latents.push(latents.clone());
        self.texts.push(text.clone());
        self.timesteps.extend(timesteps);
    }
}

impl Objective {
    /// The losses of a batch, and their weighted sum's gradients for every parameter that it depends on.
    pub fn evaluate(&self, model: &Model, batch: &Batch) -> Result<(Losses, Gradients)> {
        let (mut losses, mut gradients) = (Losses::new(), Gradients::new());
        self.discriminate(model, batch, &mut losses, &mut gradients)?;
        if self.weights.denoising != 0. {
            self.denoise(model, batch, &mut losses, &mut gradients)?;
        }
        Ok((losses, gradients))
    }

    /// The losses on the adapter's answers.
    fn discriminate(&self, model: &Model, batch: &Batch, losses: &mut Losses, gradients: &mut Gradients) -> Result<()> {
        let LossWeights { matching, grounding, .. } = self.weights;
        let grounded = batch.grounding.as_ref().filter(|_| grounding != 0.);
        let b = batch.timesteps.len();
        let (discriminator, timesteps) = (model.discriminator(), as_f64(&batch.timesteps));
        let wide = |t: &Tensor| t.to_dtype(model.dtype());
        let noise = wide(&batch.noise)?;
        let noised = |i: usize| discriminator.noised(&wide(&batch.latents[i])?, &noise, &batch.timesteps);
        let (own, captions) = (noised(0)?, &batch.captions);
        let mut rows = Rows { latents: Vec::new(), texts: Vec::new(), timesteps: Vec::new() };
        if matching != 0. {
            rows.add(&own, &captions[0].hidden, &timesteps);
            if self.contrast == Contrast::Triplets {
                rows.add(&own, &captions[1].hidden, &timesteps);
                rows.add(&own, &captions[2].hidden, &timesteps);
                rows.add(&noised(1)?, &captions[0].hidden, &timesteps);
                rows.add(&noised(2)?, &captions[0].hidden, &timesteps);
            }
        }
        let pairs = rows.timesteps.len();
        if let Some((items, phrases, _)) = grounded {
            let index = Tensor::new(&items[..], own.device())?;
            let at: Vec<f64> = items.iter().map(|i| timesteps[*i as usize]).collect();
            rows.add(&own.index_select(&index, 0)?, &phrases.hidden, &at);
        }
        if rows.timesteps.is_empty() {
            return Ok(());
        }
        let adapter = discriminator.adapter();
        let features = Features::compute(model, &rows)?;
        let queries = adapter.queries(features.tensor(), &rows.timesteps)?;
        let queries = queries.get(queries.dim(0)? - 1)?;

        let mut total: Option<Tensor> = None;
        let mut add = |loss: Tensor, weight: f64| -> Result<()> {
            let weighted = (loss * weight)?;
            total = Some(match total.take() {
                None => weighted,
                Some(sum) => (sum + weighted)?,
            });
            Ok(())
        };
        if matching != 0. {
            let h = adapter.matching(&queries.narrow(0, 0, pairs)?)?;
            let scale = adapter.logit_scale().exp()?.minimum(MOST_SCALE)?;
            let (t2i, i2t, right) = match self.contrast {
                Contrast::InBatch => {
                    let scores = scores_of_texts(&h, &wide(&captions[0].pooled)?)?;
                    let (t2i, i2t) = in_batch_loss(&scores, &scale)?;
                    let own = scores.mul(&Tensor::eye(b, scores.dtype(), scores.device())?)?.sum(1)?;
                    (t2i, i2t, own)
                }
                Contrast::Triplets => {
                    let [own, hard, random] = captions;
                    let texts = [&own.pooled, &hard.pooled, &random.pooled, &own.pooled, &own.pooled];
                    let scores = pair_scores(&h, &wide(&Tensor::cat(&texts, 0)?)?)?.reshape((5, b))?;
                    let others = |i: usize| scores.narrow(0, i, 2)?.t()?.contiguous();
                    let positive = scores.get(0)?;
                    let (t2i, i2t) = triplet_loss(&positive, &others(3)?, &others(1)?, &scale)?;
                    (t2i, i2t, positive)
                }
            };
            losses.insert("text_to_image", scalar(&t2i)?);
            losses.insert("image_to_text", scalar(&i2t)?);
            losses.insert("score", scalar(&right.mean_all()?)?);
            add((t2i + i2t)?, matching)?;
        }
        if let Some((items, phrases, boxes)) = grounded {
            let found = adapter.grounding(&queries.narrow(0, pairs, items.len())?)?;
            let terms = self.grounding.terms(&found, &wide(boxes)?, &phrases.pooled)?;
            losses.insert("presence", scalar(&terms.presence)?);
            losses.insert("box_l1", scalar(&terms.l1)?);
            losses.insert("box_giou", scalar(&terms.giou)?);
            if let Some(contrast) = &terms.contrast {
                losses.insert("text_to_object", scalar(contrast)?);
            }
            add(self.grounding.total(&terms)?, grounding)?;
        }
        let total = total.expect("there are rows");
        *losses.entry("loss").or_default() += scalar(&total)?;
        let mut store = total.backward()?;
        for (name, variable) in model.parameters() {
            if let Some(gradient) = store.remove(variable) {
                gradients.insert(name.clone(), gradient);
            }
        }
        if let Features::Recorded(variable, tape) = features {
            let cotangent = store.remove(&variable).expect("the losses depend on the features");
            let (_, lora) = discriminator.unet().vjp_lora(tape, &cotangent, model.lora())?;
            add_gradients(gradients, model.lora_gradients(lora))?;
        }
        Ok(())
    }

    /// The mean squared error of the prediction at the items' own pictures and captions.
    fn denoise(&self, model: &Model, batch: &Batch, losses: &mut Losses, gradients: &mut Gradients) -> Result<()> {
        let discriminator = model.discriminator();
        let wide = |t: &Tensor| t.to_dtype(model.dtype());
        let (clean, noise) = (wide(&batch.latents[0])?, wide(&batch.noise)?);
        let latents = discriminator.noised(&clean, &noise, &batch.timesteps)?;
        let target = discriminator.target(&clean, &noise, &batch.timesteps)?;
        let unet = discriminator.unet();
        let text = unet.text(&batch.captions[0].hidden)?;
        let (output, tape) = unet.forward_recorded(&latents, &as_f64(&batch.timesteps), &text)?;
        let error = (output.to_dtype(target.dtype())? - target)?;
        let loss = scalar(&error.sqr()?.mean_all()?)?;
        losses.insert("denoising", loss);
        *losses.entry("loss").or_default() += self.weights.denoising * loss;
        let cotangent = (&error * (2. * self.weights.denoising / error.elem_count() as f64))?;
        let (_, lora) = unet.vjp_lora(tape, &cotangent, model.lora())?;
        add_gradients(gradients, model.lora_gradients(lora))
    }
}

/// The tapped features: followed into the U-Net when its factors are trained.
enum Features {
    Fixed(Tensor),
    Recorded(Var, Tape),
}

impl Features {
    fn compute(model: &Model, rows: &Rows) -> Result<Self> {
        let (latents, text) = (Tensor::cat(&rows.latents, 0)?, Tensor::cat(&rows.texts, 0)?);
        let (unet, tap) = (model.discriminator().unet(), model.discriminator().tap());
        let text = unet.text(&text)?;
        if model.lora().is_empty() {
            return Ok(Self::Fixed(unet.features(&latents, &rows.timesteps, &text, tap)?));
        }
        let (features, tape) = unet.forward_to(&latents, &rows.timesteps, &text, tap)?;
        Ok(Self::Recorded(Var::from_tensor(&features)?, tape))
    }

    fn tensor(&self) -> &Tensor {
        match self {
            Self::Fixed(features) => features,
            Self::Recorded(features, _) => features,
        }
    }
}

fn add_gradients(gradients: &mut Gradients, more: impl Iterator<Item = (String, Tensor)>) -> Result<()> {
    for (name, gradient) in more {
        let sum = match gradients.remove(&name) {
            None => gradient,
            Some(before) => (before + gradient)?,
        };
        gradients.insert(name, sum);
    }
    Ok(())
}

fn scalar(loss: &Tensor) -> Result<f64> {
    Ok(loss.to_dtype(DType::F64)?.to_scalar()?)
}
