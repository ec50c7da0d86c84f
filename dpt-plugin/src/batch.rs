//! The items of one step: what is evaluated, what is reported, and what is written. An item with numbers that are not finite
//! is left as it was and does not disturb the others.
//!
//! All of it is computed where the model computes. What the report says of the items is fetched from there once, at the end.

use candle_core::{DType, Device, Tensor};
use host_api::plugin::Latents;
use host_api::{Report, Status};

use crate::params::Strength;
use crate::{Error, Result, correction, norms};

/// A step's latents `[B, C, h, w]`, fit to be evaluated: those of spoilt items are zero.
pub(crate) struct Batch {
    /// As the host passed them, in f64.
    latents: Tensor,
    /// In VP space, in f32.
    values: Tensor,
    /// c in `x = z / c`, `[1]`: latents in the host's space times it are in VP space.
    scale: Tensor,
    /// NaN for items whose latents, text or features are not finite, 0 for the others: `[B]`.
    spoilt: Tensor,
    /// The same for each that was looked at, with what is wrong when no item is left.
    checks: Vec<(String, Tensor)>,
    /// `[B]`.
    scores: Option<Tensor>,
}

/// 0 for the rows of `[B, ..]` that are finite and NaN for others, `[B]`, in f64.
pub(crate) fn rows(numbers: &Tensor) -> Result<Tensor> {
    Ok((numbers.flatten_from(1)? * 0.)?.sum(1)?.to_dtype(DType::F64)?)
}

/// `numbers` `[B, ..]` with zeros for the items that are NaN in `spoilt` `[B]`, so that theirs cannot reach the others.
pub(crate) fn without_spoilt(spoilt: &Tensor, numbers: &Tensor) -> Result<Tensor> {
    let mut rows = vec![1; numbers.rank()];
    rows[0] = numbers.dim(0)?;
    let fine = spoilt.eq(spoilt)?.reshape(rows)?.broadcast_as(numbers.shape())?;
    Ok(fine.where_cond(numbers, &numbers.zeros_like()?)?)
}

impl Batch {
    /// `scale` brings the host's latents to VP space. An empty batch never comes here.
    pub(crate) fn read(latents: &Latents, scale: f64, device: &Device) -> Result<Self> {
        let latents = tensor_views::read(&latents.view(), device)?.to_dtype(DType::F64)?;
        let scale = Tensor::new(&[scale], device)?;
        let spoilt = rows(&latents)?.zeros_like()?;
        let values = latents.broadcast_mul(&scale)?.to_dtype(DType::F32)?;
        let mut batch = Self { latents, values, scale, spoilt, checks: Vec::new(), scores: None };
        batch.check("the latents hold NaN or infinity in every item".into(), rows(&batch.latents)?)?;
        batch.values = batch.without_spoilt(&batch.values)?;
        Ok(batch)
    }

    /// A batch of which only rows of features and text are looked at.
    pub(crate) fn without_latents(items: usize, device: &Device) -> Result<Self> {
        let none = Tensor::zeros(items, DType::F64, device)?;
        let (latents, values, scale) = (none.clone(), none.clone(), none.clone());
        Ok(Self { latents, values, scale, spoilt: none, checks: Vec::new(), scores: None })
    }

    /// All items, in VP space.
    pub(crate) fn values(&self) -> &Tensor {
        &self.values
    }

    /// How many there are.
    pub(crate) fn items(&self) -> Result<usize> {
        Ok(self.spoilt.dim(0)?)
    }

    /// NaN for items that were found spoilt so far, 0 for the others: `[B]`.
    pub(crate) fn spoilt(&self) -> &Tensor {
        &self.spoilt
    }

    /// Takes out the items that are NaN in `found`. Fails with `message` when nothing is left to correct: at once where looking
    /// costs nothing, else when the report is fetched.
    fn check(&mut self, message: String, found: Tensor) -> Result<()> {
        self.spoilt = (&self.spoilt + &found)?;
        let wrong = found.device().is_cpu() && self.spoilt.to_vec1::<f64>()?.iter().all(|item| item.is_nan());
        if wrong {
            return Err(Error::NonFinite(message));
        }
        self.checks.push((message, found));
        Ok(())
    }

    /// Takes out the items whose row of `numbers` `[B, ..]` is not finite. Asked of features and text themselves, because
    /// the adapter's ReLU makes 0 of NaN and a score that looks like any other.
    pub(crate) fn check_rows(&mut self, what: &str, numbers: &Tensor) -> Result<()> {
        self.check_found(what, &rows(numbers)?)
    }

    /// The same of numbers whose [`rows`] were looked at.
    pub(crate) fn check_found(&mut self, what: &str, found: &Tensor) -> Result<()> {
        self.check(format!("{what} hold NaN or infinity for every item"), found.clone())
    }

    /// [`without_spoilt`] of the items found so far.
    pub(crate) fn without_spoilt(&self, numbers: &Tensor) -> Result<Tensor> {
        without_spoilt(&self.spoilt, numbers)
    }

    /// The items' scores `[B]`, to be reported.
    pub(crate) fn set_scores(&mut self, scores: &Tensor) -> Result<()> {
        self.scores = Some(scores.to_dtype(DType::F64)?);
        Ok(())
    }

    /// Waits for the device, and reports spoilt items and scores. Returns `more`, `[B]` each, with the items that are not spoilt.
    fn settle(&self, more: &[Tensor], report: &mut Report) -> Result<(Vec<bool>, Vec<Vec<f64>>)> {
        let checks = self.checks.iter().map(|(_, found)| found);
        let all: Vec<&Tensor> = checks.chain(&self.scores).chain(more).collect();
        let mut all = Tensor::stack(&all, 0)?.to_vec2::<f64>()?.into_iter();
        let mut fine = vec![true; report.items.len()];
        for ((message, _), found) in self.checks.iter().zip(all.by_ref()) {
            for (index, _) in found.iter().enumerate().filter(|(_, found)| found.is_nan()) {
                fine[index] = false;
                report.items[index].status = Status::NonFinite;
            }
            if !fine.contains(&true) {
                return Err(Error::NonFinite(message.clone()));
            }
        }
        if self.scores.is_some() {
            let scores = all.next().expect("stacked above");
            for ((item, score), _) in report.items.iter_mut().zip(scores).zip(&fine).filter(|(_, fine)| **fine) {
                item.score = score as f32;
            }
        }
        Ok((fine, all.collect()))
    }

    /// Reports scores that no correction follows.
    pub(crate) fn report(&self, report: &mut Report) -> Result<()> {
        self.settle(&[], report).map(drop)
    }

    /// Writes `x + eta ds/dz / scale`: the VP correction in the host's space. `gradient` is ds/dz in f32.
    pub(crate) fn write(
        &self,
        gradient: &Tensor,
        strength: &Strength,
        latents: &mut Latents,
        report: &mut Report,
    ) -> Result<()> {
        let added = correction(&self.values, gradient, strength.eta, strength.bound)?;
        let corrected = (&self.latents + added.to_dtype(DType::F64)?.broadcast_div(&self.scale)?)?;
        let corrected = corrected.to_dtype(DType::F32)?.to_dtype(tensor_views::dtype(latents.dtype()))?;
        let finite = rows(&corrected.to_dtype(DType::F32)?)?;
        let (fine, more) = self.settle(&[norms(gradient)?, norms(&added)?, finite], report)?;
        let [sizes, lengths, finite] = &more[..] else { unreachable!("three were asked for") };
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
            _ => Ok(latents.write(tensor_views::lend(&corrected)?)?),
        }
    }
}
