use candle_core::Tensor;

use super::{Conv2d, GroupNorm, Linear};
use crate::{Result, Scope};

/// The sizes of a [`ResnetBlock`].
#[derive(Clone, Copy)]
pub(crate) struct ResnetSizes {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) groups: usize,
    pub(crate) eps: f64,
    /// Width of the timestep embedding; `None` in the VAE.
    pub(crate) time: Option<usize>,
}

/// `shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time)))`.
pub(crate) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Linear>,
}

/// What the input gradient of one [`ResnetBlock`] needs.
pub(crate) struct ResnetTape {
    x: Tensor,
    hidden: Tensor,
}

impl ResnetBlock {
    pub(crate) fn load(scope: &Scope, sizes: ResnetSizes) -> Result<Self> {
        let ResnetSizes { inputs, outputs, groups, eps, time } = sizes;
        let time = time.map(|width| Linear::load(&scope.enter("time_emb_proj"), width, outputs)).transpose()?;
        let shortcut = (inputs != outputs)
            .then(|| Linear::load_conv1x1(&scope.enter("conv_shortcut"), inputs, outputs))
            .transpose()?;
        Ok(Self {
            norm1: GroupNorm::load(&scope.enter("norm1"), inputs, groups, eps)?,
            conv1: Conv2d::load(&scope.enter("conv1"), inputs, outputs, 1)?,
            time,
            norm2: GroupNorm::load(&scope.enter("norm2"), outputs, groups, eps)?,
            conv2: Conv2d::load(&scope.enter("conv2"), outputs, outputs, 1)?,
            shortcut,
        })
    }

    /// `time` is the SiLU of the timestep embedding, `[B, width]`, where the block takes one.
    pub(crate) fn record(&self, x: &Tensor, time: Option<&Tensor>) -> Result<(Tensor, ResnetTape)> {
        let normal = self.norm1.forward_silu(x)?;
        let hidden = match (&self.time, time) {
            (Some(projection), Some(time)) => self.conv1.forward_shifted(&normal, &projection.forward(time)?)?,
            _ => self.conv1.forward(&normal)?,
        };
        let normal = self.norm2.forward_silu(&hidden)?;
        let y = match &self.shortcut {
            Some(shortcut) => self.conv2.forward_onto(&shortcut.forward_channels(x)?, &normal)?,
            None => self.conv2.forward_onto(x, &normal)?,
        };
        Ok((y, ResnetTape { x: x.clone(), hidden }))
    }

    pub(crate) fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        Ok(self.record(x, time)?.0)
    }

    pub(crate) fn vjp(&self, tape: ResnetTape, dy: &Tensor) -> Result<Tensor> {
        let ResnetTape { x, hidden } = tape;
        let size = (x.dim(2)?, x.dim(3)?);
        let d = self.norm2.vjp_silu(&hidden, &self.conv2.vjp(dy, size)?)?;
        let d = self.conv1.vjp(&d, size)?;
        match &self.shortcut {
            Some(shortcut) => self.norm1.vjp_silu_onto(&shortcut.vjp_channels(dy)?, &x, &d),
            None => self.norm1.vjp_silu_onto(dy, &x, &d),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::finite_difference::{assert_vjp, numbers, values, weights};

    fn block(inputs: usize, outputs: usize, time: Option<usize>) -> ResnetBlock {
        let file = weights(&[
            ("norm1.weight", &[inputs]),
            ("norm1.bias", &[inputs]),
            ("conv1.weight", &[outputs, inputs, 3, 3]),
            ("conv1.bias", &[outputs]),
            ("time_emb_proj.weight", &[outputs, 5]),
            ("time_emb_proj.bias", &[outputs]),
            ("norm2.weight", &[outputs]),
            ("norm2.bias", &[outputs]),
            ("conv2.weight", &[outputs, outputs, 3, 3]),
            ("conv2.bias", &[outputs]),
            ("conv_shortcut.weight", &[outputs, inputs, 1, 1]),
            ("conv_shortcut.bias", &[outputs]),
        ]);
        ResnetBlock::load(&file.root(), ResnetSizes { inputs, outputs, groups: 2, eps: 1e-5, time }).unwrap()
    }

    #[test]
    fn gradient_with_and_without_shortcut_and_time() {
        let (x, time) = (values(0, (2, 4, 3, 5)), values(7, (2, 5)));
        for (outputs, width) in [(4, None), (4, Some(5)), (6, None), (6, Some(5))] {
            let block = block(4, outputs, width);
            let time = width.map(|_| &time);
            let vjp = |dy: &Tensor| block.vjp(block.record(&x, time)?.1, dy);
            assert_vjp(&format!("4 to {outputs}, time {width:?}"), &x, |x| block.forward(x, time), vjp);
        }
    }

    /// Each item of the batch is moved by its own timestep.
    #[test]
    fn time_is_per_item() {
        let (block, x, time) = (block(4, 6, Some(5)), values(0, (2, 4, 3, 5)), values(7, (2, 5)));
        let both = block.forward(&x, Some(&time)).unwrap();
        for item in 0..2 {
            let row = |t: &Tensor| t.narrow(0, item, 1).unwrap();
            let alone = block.forward(&row(&x), Some(&row(&time))).unwrap();
            let other = block.forward(&row(&x), Some(&time.narrow(0, 1 - item, 1).unwrap())).unwrap();
            let distance = |a: &Tensor, b: &Tensor| {
                numbers(a).iter().zip(numbers(b)).map(|(a, b)| (a - b).abs()).fold(0., f64::max)
            };
            assert!(distance(&row(&both), &alone) < 1e-13);
            assert!(distance(&row(&both), &other) > 1e-2);
        }
    }
}
