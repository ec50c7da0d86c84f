//! The texts of a run: which prompt holds at which step, encoded for the U-Net and for the plugin.

use candle_core::{DType, Device, Tensor};
use diffusion::{TextKeys, TextModel, UNet};
use host_api::{Lent, Text};

use crate::{Error, Request, Result};

/// What the steps from `from` on are conditioned on.
pub(crate) struct Phase {
    /// The first step that it holds for.
    from: usize,
    prompts: Vec<String>,
    /// Both halves of the guidance, the unconditional one first; or the conditional one alone.
    pub(crate) keys: TextKeys,
    /// The conditional half alone.
    pub(crate) conditional: TextKeys,
    context: Lent,
    pooled: Lent,
}

/// The phases of a run, at least one, in the order of their steps.
pub(crate) struct Conditioning {
    phases: Vec<Phase>,
}

impl Conditioning {
    /// Encodes every prompt of the request for the U-Net as it is now, and for a plugin that takes tensors on `lent_on`.
    pub(crate) fn new(request: &Request, text: &TextModel, unet: &UNet, lent_on: &Device) -> Result<Self> {
        let batch = request.batch()?;
        let negative = match request.guidance == 1. {
            true => None,
            false => Some(text.encode(&vec![&*request.negative; batch])?.hidden),
        };
        let phase = |from: usize, prompts: Vec<String>| -> Result<Phase> {
            let encoded = text.encode(&prompts.iter().map(String::as_str).collect::<Vec<_>>())?;
            let both = match &negative {
                None => encoded.hidden.clone(),
                Some(negative) => Tensor::cat(&[negative, &encoded.hidden], 0)?,
            };
            let keys = unet.text(&both)?;
            let conditional = keys.rows(keys.batch() - batch, batch)?;
            let lend = |t: &Tensor| -> Result<Lent> {
                let numbers = t.to_dtype(DType::F32)?.to_device(lent_on)?;
                tensor_views::lend(&numbers).map_err(Error::plugin("text"))
            };
            let (context, pooled) = (lend(&encoded.hidden)?, lend(&encoded.pooled)?);
            Ok(Phase { from, prompts, keys, conditional, context, pooled })
        };
        let mut phases = vec![phase(0, request.prompts.clone())?];
        let mut switches: Vec<_> = request.switches.iter().collect();
        switches.sort_by(|a, b| a.from.total_cmp(&b.from));
        for switch in switches {
            let from = (switch.from * request.steps as f64).ceil() as usize;
            phases.push(phase(from, vec![switch.prompt.clone(); batch])?);
        }
        Ok(Self { phases })
    }

    /// What holds at that step.
    pub(crate) fn at(&self, step: usize) -> &Phase {
        self.phases.iter().rev().find(|phase| phase.from <= step).unwrap_or(&self.phases[0])
    }

    /// What a run is begun with.
    pub(crate) fn first(&self) -> &Phase {
        &self.phases[0]
    }
}

impl Phase {
    /// The text as the plugin sees it.
    pub(crate) fn text(&self) -> Text<'_> {
        Text {
            context: Some(self.context.view()),
            pooled: Some(self.pooled.view()),
            end_of_text: None,
            prompts: Some(&self.prompts),
        }
    }
}
