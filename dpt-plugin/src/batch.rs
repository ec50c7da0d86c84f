//! The items of one step: what is evaluated, what is reported, and what is written. An item with numbers that are not finite
//! is left as it was and does not disturb the others.
//!
//! All of it is computed where the model computes. What the report says of the items is fetched from there once, at the end.

use candle_core::{DType, Device, Tensor};
use host_api::plugin::Latents;
use host_api::{Report, Status};

use crate::correct::correction_by;
use crate::{Error, Result, norms};

/// What must be finite, in the order of the rows of [`Batch::scored`].
const LOOKED_AT: [&str; 3] = ["the latents", "pooled texts", "the U-Net's features"];

/// A step's latents `[B, C, h, w]`, fit to be evaluated: those of spoilt items are zero.
pub(crate) struct Batch {
    /// As the host passed them.
    latents: Tensor,
    /// In VP space, in f32.
    values: Tensor,
    /// c in `x = z / c`, `[1]`: latents in the host's space times it are in VP space.
    scale: Tensor,
    /// NaN for items that are not finite in anything that was looked at, 0 for the others: `[B]`.
    spoilt: Tensor,
    /// The same for each of [`LOOKED_AT`].
    found: [Tensor; LOOKED_AT.len()],
}

/// 0 for the rows of `[B, ..]` that are finite and NaN for others, `[B]`, in f64.
fn rows(numbers: &Tensor) -> Result<Tensor> {
    Ok((numbers.flatten_from(1)? * 0.)?.sum(1)?.to_dtype(DType::F64)?)
}

impl Batch {
    /// `scale` `[1]`, in f64, brings the host's latents to VP space. An empty batch never comes here.
    pub(crate) fn new(latents: &Tensor, scale: &Tensor) -> Result<Self> {
        let wide = latents.to_dtype(DType::F64)?;
        let spoilt = Tensor::zeros(latents.dim(0)?, DType::F64, latents.device())?;
        let found = [spoilt.clone(), spoilt.clone(), spoilt.clone()];
        let values = wide.broadcast_mul(scale)?.to_dtype(DType::F32)?;
        let mut batch = Self { latents: latents.clone(), values, scale: scale.clone(), spoilt, found };
        batch.check(0, &wide)?;
        batch.values = batch.without_spoilt(&batch.values)?;
        Ok(batch)
    }

    /// A batch of which only features and text are looked at.
    pub(crate) fn without_latents(items: usize, device: &Device) -> Result<Self> {
        let none = Tensor::zeros(items, DType::F64, device)?;
        let (latents, values, scale) = (none.clone(), none.clone(), none.clone());
        Ok(Self { latents, values, scale, spoilt: none.clone(), found: [none.clone(), none.clone(), none] })
    }

    /// All items, in VP space.
    pub(crate) fn values(&self) -> &Tensor {
        &self.values
    }

    /// How many there are.
    pub(crate) fn items(&self) -> Result<usize> {
        Ok(self.spoilt.dim(0)?)
    }

    /// Takes out the items whose row of `numbers` `[B, ..]` is not finite. Fails when nothing is left to correct: at once where looking
    /// costs nothing, else when the report is made.
    fn check(&mut self, which: usize, numbers: &Tensor) -> Result<()> {
        let found = rows(numbers)?;
        self.spoilt = (&self.spoilt + &found)?;
        if found.device().is_cpu() && self.spoilt.to_vec1::<f64>()?.iter().all(|item| item.is_nan()) {
            return Err(nothing_left(which));
        }
        self.found[which] = found;
        Ok(())
    }

    /// Takes out the items whose pooled text `[B, p]` is not finite: the adapter's ReLU makes 0 of NaN, and a score that looks like any
    /// other.
    pub(crate) fn check_texts(&mut self, pooled: &Tensor) -> Result<()> {
        self.check(1, pooled)
    }

    /// The same of features `[B, C, h, w]`.
    pub(crate) fn check_features(&mut self, features: &Tensor) -> Result<()> {
        self.check(2, features)
    }

    /// `numbers` `[B, ..]` with zeros for spoilt items, so that theirs cannot reach the others.
    pub(crate) fn without_spoilt(&self, numbers: &Tensor) -> Result<Tensor> {
        let mut rows = vec![1; numbers.rank()];
        rows[0] = numbers.dim(0)?;
        let fine = self.spoilt.eq(&self.spoilt)?.reshape(rows)?.broadcast_as(numbers.shape())?;
        Ok(fine.where_cond(numbers, &numbers.zeros_like()?)?)
    }

    /// What a report says of scores `[B]`, for [`settle`].
    pub(crate) fn scored(&self, scores: &Tensor) -> Result<Tensor> {
        self.reported(scores, [])
    }

    /// `x + eta ds/dz / scale`, the VP correction in the host's space and dtype, and what a report says of it, for [`write`]. `gradient`
    /// is ds/dz in f32, `eta` `[1]` in f64.
    pub(crate) fn corrected(
        &self,
        scores: &Tensor,
        gradient: &Tensor,
        eta: &Tensor,
        bound: Option<f64>,
    ) -> Result<(Tensor, Tensor)> {
        let added = correction_by(&self.values, gradient, eta, bound)?;
        let corrected = added.to_dtype(DType::F64)?.broadcast_div(&self.scale)?;
        let corrected = (self.latents.to_dtype(DType::F64)? + corrected)?.to_dtype(DType::F32)?;
        let corrected = corrected.to_dtype(self.latents.dtype())?;
        let finite = rows(&corrected.to_dtype(DType::F32)?)?;
        let report = self.reported(scores, [norms(gradient)?, norms(&added)?, finite])?;
        Ok((corrected, report))
    }

    /// Rows `[.., B]` in f64: what was looked at, the scores, and more.
    fn reported<const N: usize>(&self, scores: &Tensor, more: [Tensor; N]) -> Result<Tensor> {
        let scores = scores.to_dtype(DType::F64)?;
        let all: Vec<&Tensor> = self.found.iter().chain([&scores]).chain(&more).collect();
        Ok(Tensor::stack(&all, 0)?)
    }
}

fn nothing_left(which: usize) -> Error {
    Error::NonFinite(format!("{} hold NaN or infinity for every item", LOOKED_AT[which]))
}

/// Waits for the device, and reports spoilt items and scores. Returns the items that are not spoilt, and the rows that follow.
pub(crate) fn settle(numbers: &Tensor, report: &mut Report) -> Result<(Vec<bool>, Vec<Vec<f64>>)> {
    let mut numbers = numbers.to_vec2::<f64>()?.into_iter();
    let mut fine = vec![true; report.items.len()];
    for (which, found) in numbers.by_ref().take(LOOKED_AT.len()).enumerate() {
        for (index, _) in found.iter().enumerate().filter(|(_, found)| found.is_nan()) {
            fine[index] = false;
            report.items[index].status = Status::NonFinite;
        }
        if !fine.contains(&true) {
            return Err(nothing_left(which));
        }
    }
    let scores = numbers.next().expect("after what was looked at");
    for ((item, score), _) in report.items.iter_mut().zip(scores).zip(&fine).filter(|(_, fine)| **fine) {
        item.score = score as f32;
    }
    Ok((fine, numbers.collect()))
}

/// Reports on what [`Batch::corrected`] made, and writes it.
pub(crate) fn write((corrected, numbers): &(Tensor, Tensor), latents: &mut Latents, report: &mut Report) -> Result<()> {
    let (fine, more) = settle(numbers, report)?;
    let [sizes, lengths, finite] = &more[..] else { unreachable!("three follow the scores") };
    let mut failed = None;
    for index in (0..fine.len()).filter(|index| fine[*index]) {
        let entry = &mut report.items[index];
        entry.gradient_norm = sizes[index] as f32;
        let wrong = if !sizes[index].is_finite() {
            format!("item {index}: the score's gradient holds NaN or infinity")
        } else if finite[index].is_nan() {
            format!("item {index} would hold numbers that are not finite in {:?}", latents.dtype())
        } else {
            entry.correction_norm = lengths[index] as f32;
            continue;
        };
        entry.status = Status::NonFinite;
        failed = Some(Error::NonFinite(wrong));
    }
    match failed {
        Some(error) if report.items.iter().all(|item| item.status != Status::Ok) => Err(error),
        _ => Ok(latents.write(tensor_views::lend(corrected)?)?),
    }
}
