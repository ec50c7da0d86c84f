use candle_core::{D, DType, Tensor};
use candle_nn::ops::{log_softmax, sigmoid};

use super::generalized_iou;
use crate::score::normalize;
use crate::{Grounding, Result};

/// Whether a query holds the object, `[B, K]`.
pub struct Presence {
    /// p.
    pub probability: Tensor,
    /// ln p and ln (1 - p).
    log: (Tensor, Tensor),
}

impl Presence {
    /// Of the class head's logits `[B, K, classes]`: the sigmoid of one, or `1 - p_last` where the last of many means no
    /// object.
    pub fn of_logits(logits: &Tensor) -> Result<Self> {
        let classes = logits.dim(D::Minus1)?;
        if classes == 1 {
            let x = logits.squeeze(D::Minus1)?;
            // softplus(x) = max(x, 0) + ln(1 + exp(-|x|)); ln p = x - softplus(x), ln(1 - p) = -softplus(x).
            let softplus = (x.relu()? + (x.abs()?.neg()?.exp()? + 1.)?.log()?)?;
            return Ok(Self { probability: sigmoid(&x)?, log: ((&x - &softplus)?, softplus.neg()?) });
        }
        let log = log_softmax(logits, D::Minus1)?;
        let absent = log.narrow(D::Minus1, classes - 1, 1)?.squeeze(D::Minus1)?;
        let present = log.narrow(D::Minus1, 0, classes - 1)?.log_sum_exp(D::Minus1)?;
        Ok(Self { probability: present.exp()?, log: (present, absent) })
    }

    /// Of p itself.
    pub fn of_probability(probability: &Tensor) -> Result<Self> {
        const LEAST: f64 = 1e-7;
        let p = probability.clamp(LEAST, 1. - LEAST)?;
        Ok(Self { probability: probability.clone(), log: (p.log()?, p.affine(-1., 1.)?.log()?) })
    }
}

/// What teaches p.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PresenceLoss {
    /// -p of the matched query (Eq. 7), which never lowers that of the others.
    Paper,
    /// Binary cross-entropy, in which a query that was not matched counts for `others` of one that was.
    CrossEntropy {
        /// The release's no-object weight is 0.1.
        others: f64,
    },
}

/// Weights of presence, L1, generalised IoU and contrast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroundingWeights {
    /// In the loss (Eq. 7): l0 to l3.
    pub loss: [f64; 4],
    /// Of presence, L1 and generalised IoU in the choice of the query (Eq. 5).
    pub cost: [f64; 3],
}

impl GroundingWeights {
    /// The release's loss weights and the paper's unit costs.
    pub const DEFAULT: Self = Self { loss: [1., 5., 2., 1.], cost: [1., 1., 1.] };
}

/// The grounding loss (Eq. 5-7).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroundingLoss {
    /// Weights of its terms.
    pub weights: GroundingWeights,
    /// What teaches p.
    pub presence: PresenceLoss,
    /// tau of the contrast between the expression and the queries (Eq. 6).
    pub temperature: f64,
}

/// The terms of the loss, unweighted means over the items.
pub struct GroundingTerms {
    /// psi, the matched query of each item, `[B]` of u32.
    pub matched: Tensor,
    /// Presence.
    pub presence: Tensor,
    /// L1 distance of the boxes.
    pub l1: Tensor,
    /// 1 - generalised IoU.
    pub giou: Tensor,
    /// Eq. 6; none without the semantic head.
    pub contrast: Option<Tensor>,
}

impl GroundingLoss {
    /// The paper's losses, weights of the release, binary cross-entropy for p, temperature 0.07.
    pub const DEFAULT: Self = Self {
        weights: GroundingWeights::DEFAULT,
        presence: PresenceLoss::CrossEntropy { others: 0.1 },
        temperature: 0.07,
    };

    /// What the queries `[B, K, ..]` say against the true boxes `[B, 4]` (cx, cy, w, h) and the expressions' pooled
    /// embeddings `[B, p]`.
    pub fn terms(&self, found: &Grounding, boxes: &Tensor, expressions: &Tensor) -> Result<GroundingTerms> {
        self.terms_of(&Presence::of_logits(&found.class_logits)?, found, boxes, expressions)
    }

    /// The same where p is known.
    pub fn terms_of(
        &self,
        presence: &Presence,
        found: &Grounding,
        boxes: &Tensor,
        expressions: &Tensor,
    ) -> Result<GroundingTerms> {
        let (b, k, _) = found.boxes.dims3()?;
        let truth = boxes.unsqueeze(1)?.broadcast_as((b, k, 4))?.contiguous()?;
        let l1 = (&found.boxes - &truth)?.abs()?.sum(D::Minus1)?;
        let giou = generalized_iou(&found.boxes, &truth)?.affine(-1., 1.)?;

        let [c0, c1, c2] = self.weights.cost;
        let cost = ((&presence.probability * -c0)? + ((&l1 * c1)? + (&giou * c2)?)?)?.detach();
        let matched = cost.argmin(1)?;
        let queries = Tensor::arange(0u32, k as u32, cost.device())?.unsqueeze(0)?.broadcast_as((b, k))?;
        let chosen = queries.eq(&matched.unsqueeze(1)?.broadcast_as((b, k))?)?.to_dtype(cost.dtype())?;
        let mean_chosen = |values: &Tensor| -> Result<Tensor> { Ok(((values * &chosen)?.sum_all()? / b as f64)?) };

        let presence = match self.presence {
            PresenceLoss::Paper => mean_chosen(&presence.probability)?.neg()?,
            PresenceLoss::CrossEntropy { others: weight } => {
                let others = (chosen.affine(-1., 1.)? * weight)?;
                let (present, absent) = &presence.log;
                let sum = ((present * &chosen)? + (absent * others)?)?.sum_all()?;
                (sum.neg()? / (b as f64 * (1. + weight * (k as f64 - 1.))))?
            }
        };
        let contrast = found.semantic.as_ref().map(|semantic| -> Result<Tensor> {
            let expression = normalize(&expressions.to_dtype(semantic.dtype())?)?.unsqueeze(1)?;
            let cosines = normalize(semantic)?.broadcast_mul(&expression)?.sum(D::Minus1)?;
            let log = log_softmax(&(cosines / self.temperature)?, D::Minus1)?;
            Ok(mean_chosen(&log)?.neg()?)
        });
        Ok(GroundingTerms {
            presence,
            l1: mean_chosen(&l1)?,
            giou: mean_chosen(&giou)?,
            contrast: contrast.transpose()?,
            matched: matched.to_dtype(DType::U32)?,
        })
    }

    /// The weighted sum (Eq. 7).
    pub fn total(&self, terms: &GroundingTerms) -> Result<Tensor> {
        let [l0, l1, l2, l3] = self.weights.loss;
        let sum = ((&terms.presence * l0)? + ((&terms.l1 * l1)? + (&terms.giou * l2)?)?)?;
        Ok(match &terms.contrast {
            Some(contrast) => (sum + (contrast * l3)?)?,
            None => sum,
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn presence_of_one_logit_and_of_many() {
        let logits = Tensor::new(&[[[-50f32], [0.], [50.]]], &Device::Cpu).unwrap();
        let one = Presence::of_logits(&logits).unwrap();
        assert_eq!(one.probability.to_vec2::<f32>().unwrap()[0][1], 0.5);
        // Far from zero the logarithms are exact where those of p itself would be infinite.
        assert_eq!(one.log.0.to_vec2::<f32>().unwrap()[0][0], -50.);
        assert_eq!(one.log.1.to_vec2::<f32>().unwrap()[0][2], -50.);
        // ln 3 for an object of two tokens against 0 for none: p = (3 + 3) / 7.
        let three = (3f32).ln();
        let many = Presence::of_logits(&Tensor::new(&[[[three, three, 0.]]], &Device::Cpu).unwrap()).unwrap();
        assert!((many.probability.to_vec2::<f32>().unwrap()[0][0] - 6. / 7.).abs() < 1e-6);
        assert!((many.log.1.to_vec2::<f32>().unwrap()[0][0] - (1f32 / 7.).ln()).abs() < 1e-6);
    }

    /// torch's `binary_cross_entropy_with_logits(logits, chosen, weight, reduction="sum") / weight.sum()`, weight 1 for the
    /// chosen query and 0.1 for others.
    #[test]
    fn cross_entropy_as_in_pytorch() {
        let logits = Tensor::new(&[[[0.3f32], [-1.2], [2.]], [[-0.5], [0.7], [0.1]]], &Device::Cpu).unwrap();
        let (near, far) = ([0.5f32, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]);
        let boxes = Tensor::new(&[[far, far, near], [near, far, far]], &Device::Cpu).unwrap();
        let truth = Tensor::new(&[near, near], &Device::Cpu).unwrap();
        let pooled = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        let found = Grounding { class_logits: logits, boxes, semantic: None };
        let terms = GroundingLoss::DEFAULT.terms(&found, &truth, &pooled).unwrap();
        assert_eq!(terms.matched.to_vec1::<u32>().unwrap(), [2, 0]);
        assert!((terms.presence.to_scalar::<f32>().unwrap() - 0.582_302_9).abs() < 1e-6);
    }

    /// With the paper's term the queries that were not matched feel nothing, with cross-entropy theirs fall.
    #[test]
    fn cross_entropy_lowers_the_others() {
        let boxes = Tensor::new(&[[[0.5f32, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]], &Device::Cpu).unwrap();
        let truth = boxes.get(0).unwrap().narrow(0, 0, 1).unwrap();
        let pooled = Tensor::zeros((1, 3), DType::F32, &Device::Cpu).unwrap();
        for (presence, pushed) in [(PresenceLoss::Paper, false), (PresenceLoss::CrossEntropy { others: 0.1 }, true)] {
            let logits = Var::zeros((1, 2, 1), DType::F32, &Device::Cpu).unwrap();
            let found = Grounding { class_logits: logits.as_tensor().clone(), boxes: boxes.clone(), semantic: None };
            let loss = GroundingLoss { presence, ..GroundingLoss::DEFAULT };
            let terms = loss.terms(&found, &truth, &pooled).unwrap();
            assert_eq!(terms.matched.to_vec1::<u32>().unwrap(), [0]);
            let gradients = loss.total(&terms).unwrap().backward().unwrap();
            let slope: Vec<f32> = gradients.get(&logits).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            assert!(slope[0] < 0., "the matched query's p rises: {slope:?}");
            assert_eq!(slope[1] > 0., pushed, "{presence:?}: {slope:?}");
        }
    }
}
