//! The texts of a run: which prompt holds at which step, encoded for the U-Net and for the plugin.

use candle_core::{DType, Tensor};
use diffusion::{TextKeys, TextModel, UNet};
use host_api::{Text, View};

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
    context: (Vec<f32>, Vec<usize>),
    pooled: (Vec<f32>, Vec<usize>),
}

/// The phases of a run, at least one, in the order of their steps.
pub(crate) struct Conditioning {
    phases: Vec<Phase>,
}

impl Conditioning {
    /// Encodes every prompt of the request for the U-Net as it is now.
    pub(crate) fn new(request: &Request, text: &TextModel, unet: &UNet) -> Result<Self> {
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
            let flat = |t: &Tensor| -> Result<(Vec<f32>, Vec<usize>)> {
                Ok((t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?, t.dims().to_vec()))
            };
            let (context, pooled) = (flat(&encoded.hidden)?, flat(&encoded.pooled)?);
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
    pub(crate) fn text(&self) -> Result<Text<'_>> {
        Ok(Text {
            context: Some(view(&self.context)?),
            pooled: Some(view(&self.pooled)?),
            end_of_text: None,
            prompts: Some(&self.prompts),
        })
    }
}

fn view((values, shape): &(Vec<f32>, Vec<usize>)) -> Result<View<'_>> {
    View::new(values, shape).map_err(Error::plugin("text"))
}
