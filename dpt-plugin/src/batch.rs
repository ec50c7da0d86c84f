//! The items of one step: what is evaluated, what is reported, and what is written. An item with numbers that are not finite
//! is left as it was and does not disturb the others.

use candle_core::Tensor;
use host_api::plugin::Latents;
use host_api::{Report, Status};

use crate::params::Strength;
use crate::{Error, Result, correction, norm};

/// A step's latents `[B, C, h, w]` in VP space, fit to be evaluated: those of spoilt items are zero.
pub(crate) struct Batch {
    values: Vec<f32>,
    /// Items whose latents, text or features are not finite.
    spoilt: Vec<bool>,
}

impl Batch {
    /// `scale` brings the host's latents to VP space. Fails when no item is finite; an empty batch never comes here.
    pub(crate) fn read(latents: &Latents, scale: f64, report: &mut Report) -> Result<Self> {
        let mut batch = Self { values: latents.read(), spoilt: vec![false; latents.shape()[0]] };
        for (index, item) in batch.values.chunks_mut(latents.item_len()).enumerate() {
            let finite = item.iter().all(|v| v.is_finite());
            item.iter_mut().for_each(|v| *v = if finite { (f64::from(*v) * scale) as f32 } else { 0. });
            if !finite {
                batch.spoilt[index] = true;
                report.items[index].status = Status::NonFinite;
            }
        }
        batch.check("the latents hold NaN or infinity in every item")?;
        Ok(batch)
    }

    /// A batch of which only rows of features and text are looked at.
    pub(crate) fn without_latents(items: usize) -> Self {
        Self { values: Vec::new(), spoilt: vec![false; items] }
    }

    /// All items in row-major order.
    pub(crate) fn values(&self) -> &[f32] {
        &self.values
    }

    /// Fails when nothing is left to correct.
    fn check(&self, message: &str) -> Result<()> {
        if self.spoilt.contains(&false) { Ok(()) } else { Err(Error::NonFinite(message.into())) }
    }

    /// Takes out the items whose row of `numbers` `[B, ..]` is not finite. Asked of features and text themselves, because
    /// the adapter's ReLU makes 0 of NaN and a score that looks like any other.
    pub(crate) fn check_rows(&mut self, what: &str, numbers: &Tensor, report: &mut Report) -> Result<()> {
        // 0 for finite rows, NaN for others.
        let sums = (numbers.flatten_from(1)? * 0.)?.sum(1)?.to_vec1::<f32>()?;
        for (index, _) in sums.iter().enumerate().filter(|(_, sum)| sum.is_nan()) {
            self.spoilt[index] = true;
            report.items[index].status = Status::NonFinite;
        }
        self.check(&format!("{what} hold NaN or infinity for every item"))
    }

    pub(crate) fn report_scores(&self, scores: &[f32], report: &mut Report) {
        for ((score, spoilt), item) in scores.iter().zip(&self.spoilt).zip(&mut report.items) {
            if !spoilt {
                item.score = *score;
            }
        }
    }

    /// A cotangent `[B, ..]` with zeros for spoilt items, so that theirs cannot reach the others in the backward pass.
    pub(crate) fn without_spoilt(&self, cotangent: &Tensor) -> Result<Tensor> {
        if !self.spoilt.contains(&true) {
            return Ok(cotangent.clone());
        }
        let row = |(index, spoilt): (usize, &bool)| {
            let row = cotangent.get(index)?;
            if *spoilt { row.zeros_like() } else { Ok(row) }
        };
        let rows = self.spoilt.iter().enumerate().map(row).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Tensor::stack(&rows, 0)?)
    }

    /// Writes `x + eta ds/dz / scale`: the VP correction in the host's space.
    pub(crate) fn write(
        &self,
        gradient: &[f32],
        strength: &Strength,
        scale: f64,
        latents: &mut Latents,
        report: &mut Report,
    ) -> Result<()> {
        let length = latents.item_len();
        let mut failed = None;
        for (item, (z, gradient)) in self.values.chunks(length).zip(gradient.chunks(length)).enumerate() {
            if self.spoilt[item] {
                continue;
            }
            let entry = &mut report.items[item];
            let added = correction(z, gradient, strength.eta, strength.bound);
            let size = norm(gradient);
            entry.gradient_norm = size as f32;
            let written = if size.is_finite() {
                let add = |(x, added): (&f32, &f32)| (f64::from(*x) + f64::from(*added) / scale) as f32;
                let corrected: Vec<f32> = latents.read_item(item).iter().zip(&added).map(add).collect();
                latents.write_item(item, &corrected).map_err(Error::from)
            } else {
                Err(Error::NonFinite(format!("item {item}: the score's gradient holds NaN or infinity")))
            };
            match written {
                Ok(()) => entry.correction_norm = norm(&added) as f32,
                Err(error) => {
                    entry.status = error.status();
                    failed = Some(error);
                }
            }
        }
        match failed {
            Some(error) if report.items.iter().all(|item| item.status != Status::Ok) => Err(error),
            _ => Ok(()),
        }
    }
}
