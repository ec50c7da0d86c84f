use std::collections::BTreeMap;

use candle_core::{DType, Tensor, Var};
use diffusion::Tape;
use dpt_plugin::loss::{GroundingLoss, in_batch_loss, pair_scores, scores_of_texts, triplet_loss};
use dpt_plugin::{Dropout, Graph, Value};

use super::{Batch, Model, Negatives};
use crate::discriminator::as_f64;
use crate::world::Random;
use crate::{Error, Result};

/// Whom a picture and its caption are held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Contrast {
    /// One hard and one random negative of each (release): five passes to the tap per item.
    Triplets,
    /// Every other caption of the batch (Eq. 3-4): one pass per item. Items with the same caption are held against each other
    /// too, as in the paper.
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
    /// Probability that the adapter drops a value.
    pub dropout: f64,
}

/// The losses by name, unweighted, and their weighted sum as `loss`.
pub type Losses = BTreeMap<&'static str, f64>;

/// Gradients by parameter.
pub type Gradients = BTreeMap<String, Tensor>;

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
        let rows = self.rows(model, batch)?;
        if rows.timesteps.is_empty() {
            return Ok(());
        }
        let (discriminator, adapter) = (model.discriminator(), model.discriminator().adapter());
        let mut graph = Graph::default();
        let (features, tape) = features(model, &rows, &mut graph)?;
        let mut random = Random::new(batch.dropout_seed, 0);
        let mut bits = || random.bits();
        let mut dropout = Dropout::new(self.dropout, &mut bits);
        let queries =
            adapter.last_queries(&mut graph, &features, &adapter.sinusoids(&rows.timesteps)?, &mut dropout)?;
        // The rows of the grounding loss are the last.
        let pairs = rows.timesteps.len() - grounded.map_or(0, |(items, _, _)| items.len());

        // The losses are candle's to differentiate, down to the adapter's answers.
        let mut answers: Vec<(Value, Var)> = Vec::new();
        let mut answer = |value: Value| -> Result<Tensor> {
            let variable = Var::from_tensor(value.tensor())?;
            let tensor = variable.as_tensor().clone();
            answers.push((value, variable));
            Ok(tensor)
        };
        let mut total = Tensor::zeros((), model.dtype(), adapter.device())?;
        if matching != 0. {
            let queries = graph.narrow(&queries, 0, 0, pairs)?;
            let h = answer(adapter.matching_of(&mut graph, &queries)?)?;
            let loss = self.matching_loss(model, batch, &h, losses)?;
            total = (total + (loss * matching)?)?;
        }
        if let Some((items, phrases, boxes)) = grounded {
            let queries = graph.narrow(&queries, 0, pairs, items.len())?;
            let found = adapter.grounding_of(&mut graph, &queries)?.try_map(&mut answer)?;
            let terms = self.grounding.terms(&found, &boxes.to_dtype(model.dtype())?, &phrases.pooled)?;
            losses.insert("presence", scalar(&terms.presence)?);
            losses.insert("box_l1", scalar(&terms.l1)?);
            losses.insert("box_giou", scalar(&terms.giou)?);
            if let Some(contrast) = &terms.contrast {
                losses.insert("text_to_object", scalar(contrast)?);
            }
            total = (total + (self.grounding.total(&terms)? * grounding)?)?;
        }
        *losses.entry("loss").or_default() += scalar(&total)?;
        let mut store = total.backward()?;
        let answers = answers.into_iter().filter_map(|(value, variable)| Some((value, store.remove(&variable)?)));
        let mut found = graph.backward(answers.collect::<Vec<_>>())?;
        for (name, variable) in model.parameters() {
            // The temperature is the losses' own.
            if let Some(gradient) = found.take_variable(variable)?.or_else(|| store.remove(variable)) {
                gradients.insert(name.clone(), gradient);
            }
        }
        if let Some(tape) = tape {
            let cotangent = found.take(&features).expect("the losses depend on the features");
            let lora = discriminator.unet().vjp_lora(tape, &cotangent, model.lora())?;
            add_gradients(gradients, model.lora_gradients(lora))?;
        }
        Ok(())
    }

    /// What the losses with a weight ask the adapter about: for matching, every item's picture with its caption, and for
    /// triplets with the negative captions, and the negative pictures with its caption; for grounding, the pictures of items
    /// that have an expression, with that.
    fn rows(&self, model: &Model, batch: &Batch) -> Result<Rows> {
        let (discriminator, timesteps) = (model.discriminator(), as_f64(&batch.timesteps));
        let noise = batch.noise.to_dtype(model.dtype())?;
        let noised =
            |latents: &Tensor| discriminator.noised(&latents.to_dtype(model.dtype())?, &noise, &batch.timesteps);
        let (own, caption) = (noised(&batch.latents)?, &batch.captions.hidden);
        let mut rows = Rows { latents: Vec::new(), texts: Vec::new(), timesteps: Vec::new() };
        if self.weights.matching != 0. {
            rows.add(&own, caption, &timesteps);
            if let Some(negatives) = self.negatives(batch)? {
                negatives.captions.iter().for_each(|text| rows.add(&own, &text.hidden, &timesteps));
                for latents in &negatives.latents {
                    rows.add(&noised(latents)?, caption, &timesteps);
                }
            }
        }
        if let Some((items, phrases, _)) = batch.grounding.as_ref().filter(|_| self.weights.grounding != 0.) {
            let index = Tensor::new(&items[..], own.device())?;
            let at: Vec<f64> = items.iter().map(|i| timesteps[*i as usize]).collect();
            rows.add(&own.index_select(&index, 0)?, &phrases.hidden, &at);
        }
        Ok(rows)
    }

    /// The batch's negatives, where the contrast is with them.
    fn negatives<'a>(&self, batch: &'a Batch) -> Result<Option<&'a Negatives>> {
        match (self.contrast, &batch.negatives) {
            (Contrast::InBatch, _) => Ok(None),
            (Contrast::Triplets, Some(negatives)) => Ok(Some(negatives)),
            (Contrast::Triplets, None) => Err(Error::Request("triplets need batches with negatives".into())),
        }
    }

    /// Whether batches need negatives.
    pub fn needs_negatives(&self) -> bool {
        self.weights.matching != 0. && self.contrast == Contrast::Triplets
    }

    /// L_T2I + L_I2T of h `[R, M, p]` of the rows for matching.
    fn matching_loss(&self, model: &Model, batch: &Batch, h: &Tensor, losses: &mut Losses) -> Result<Tensor> {
        let b = batch.timesteps.len();
        let scale = model.discriminator().adapter().logit_scale().exp()?;
        let own = &batch.captions.pooled;
        let (t2i, i2t, right) = match self.negatives(batch)? {
            None => {
                let scores = scores_of_texts(h, &own.to_dtype(h.dtype())?)?;
                let (t2i, i2t) = in_batch_loss(&scores, &scale)?;
                let diagonal = scores.mul(&Tensor::eye(b, scores.dtype(), scores.device())?)?.sum(1)?;
                (t2i, i2t, diagonal)
            }
            Some(Negatives { captions: [hard, random], .. }) => {
                let texts = [own, &hard.pooled, &random.pooled, own, own];
                let texts = Tensor::cat(&texts, 0)?.to_dtype(h.dtype())?;
                let scores = pair_scores(h, &texts)?.reshape((5, b))?;
                let others = |i: usize| scores.narrow(0, i, 2)?.t()?.contiguous();
                let positive = scores.get(0)?;
                let (t2i, i2t) = triplet_loss(&positive, &others(3)?, &others(1)?, &scale)?;
                (t2i, i2t, positive)
            }
        };
        losses.insert("text_to_image", scalar(&t2i)?);
        losses.insert("image_to_text", scalar(&i2t)?);
        losses.insert("score", scalar(&right.mean_all()?)?);
        Ok((t2i + i2t)?)
    }

    /// The mean squared error of the prediction at the items' own pictures and captions.
    fn denoise(&self, model: &Model, batch: &Batch, losses: &mut Losses, gradients: &mut Gradients) -> Result<()> {
        let discriminator = model.discriminator();
        let wide = |t: &Tensor| t.to_dtype(model.dtype());
        let (clean, noise) = (wide(&batch.latents)?, wide(&batch.noise)?);
        let latents = discriminator.noised(&clean, &noise, &batch.timesteps)?;
        let target = discriminator.target(&clean, &noise, &batch.timesteps)?;
        let unet = discriminator.unet();
        let text = unet.text(&batch.captions.hidden)?;
        let (output, tape) = unet.forward_recorded(&latents, &as_f64(&batch.timesteps), &text)?;
        let error = (output.to_dtype(target.dtype())? - target)?;
        let loss = scalar(&error.sqr()?.mean_all()?)?;
        losses.insert("denoising", loss);
        *losses.entry("loss").or_default() += self.weights.denoising * loss;
        let cotangent = (&error * (2. * self.weights.denoising / error.elem_count() as f64))?;
        let lora = unet.vjp_lora(tape, &cotangent, model.lora())?;
        add_gradients(gradients, model.lora_gradients(lora))
    }
}

/// The tapped features, followed into the U-Net when its factors are trained.
fn features(model: &Model, rows: &Rows, graph: &mut Graph) -> Result<(Value, Option<Tape>)> {
    let (latents, text) = (Tensor::cat(&rows.latents, 0)?, Tensor::cat(&rows.texts, 0)?);
    let (unet, tap) = (model.discriminator().unet(), model.discriminator().tap());
    let (text, dtype) = (unet.text(&text)?, model.dtype());
    if model.lora().is_empty() {
        let features = unet.features(&latents, &rows.timesteps, &text, tap)?;
        return Ok((Value::constant(features.to_dtype(dtype)?), None));
    }
    let (features, tape) = unet.forward_to(&latents, &rows.timesteps, &text, tap)?;
    Ok((graph.input(features.to_dtype(dtype)?), Some(tape)))
}

/// Adds gradients to those of the same parameters.
pub(super) fn add_gradients(gradients: &mut Gradients, more: impl Iterator<Item = (String, Tensor)>) -> Result<()> {
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
