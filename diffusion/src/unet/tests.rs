//! The whole U-Net's input gradients by finite differences, on the tiny pipelines of the parity cases in f64.

use super::*;
use crate::layers::finite_difference::{assert_values, disagreement, numbers, values};

/// The U-Net of a family's tiny pipeline in f64.
pub(super) fn tiny(family: &str) -> UNet {
    let folder = format!("{}/../tests/parity/{family}-tiny/unet", env!("CARGO_MANIFEST_DIR"));
    UNet::load(Path::new(&folder), DType::F64, &Device::Cpu).unwrap()
}

/// Text embeddings `[batch, 5, 32]` as that U-Net's keys and values.
pub(super) fn text(unet: &UNet, batch: usize) -> TextKeys {
    unet.text(&values(90, (batch, 5, unet.config.cross_attention_dim))).unwrap()
}

fn check_every_tap(family: &str, (height, width): (usize, usize), tolerance: f64) {
    let unet = tiny(family);
    let (text, timesteps) = (text(&unet, 2), [981., 20.5]);
    let x = values(0, (2, unet.config.in_channels, height, width));
    for tap in unet.config.taps() {
        let run = |x: &Tensor| unet.forward_to(x, &timesteps, &text, tap);
        let error = disagreement(2, &x, |x| Ok(run(x)?.0), |cotangent| unet.vjp(run(&x)?.1, cotangent));
        assert!(error < tolerance, "{family} {tap} at {height}x{width}: the gradient is off by {error:.1e}");
    }
}

/// 13 is odd on two levels (13, 7, 4, 2), 10 on one (10, 5, 3, 2).
#[test]
fn gradients_from_every_tap_at_odd_sizes() {
    check_every_tap("sd1", (13, 10), 1e-8);
    check_every_tap("sd2", (10, 13), 1e-8);
}

#[test]
fn gradients_from_every_tap_at_even_sizes() {
    check_every_tap("sd1", (8, 16), 1e-8);
    check_every_tap("sd2", (16, 8), 1e-8);
}

/// Every level below the first is a single pixel. Groups of two values have almost no variance there, so the norms bend
/// within one step: the difference falls with the step's square.
#[test]
fn gradients_from_every_tap_of_the_smallest_latents() {
    check_every_tap("sd2", (1, 2), 1e-6);
}

/// Every projection's factors in one row, `down` then `up`, and entries made of such a row.
struct Factors(Vec<(String, usize, usize)>);

impl Factors {
    const RANK: usize = 2;

    fn of(unet: &UNet) -> Self {
        Self(unet.projections().map(|(name, w)| (name, w.dims()[1], w.dims()[0])).collect())
    }

    fn len(&self) -> usize {
        self.0.iter().map(|(_, i, o)| Self::RANK * (i + o)).sum()
    }

    fn entries(&self, row: &Tensor) -> Vec<LoraEntry> {
        let mut start = 0;
        let mut take = |rows: usize, columns: usize| {
            let part = row.narrow(0, start, rows * columns).unwrap().reshape((rows, columns)).unwrap();
            start += rows * columns;
            part
        };
        let entry = |(module, inputs, outputs): &(String, usize, usize)| LoraEntry {
            module: module.clone(),
            down: take(Self::RANK, *inputs),
            up: take(*outputs, Self::RANK),
            scale: 0.7,
        };
        self.0.iter().map(entry).collect()
    }

    /// The gradients in the order of the row; zeros where a projection has none.
    fn row(&self, gradients: &BTreeMap<String, LoraGradient>) -> Tensor {
        let zeros = |shape| Tensor::zeros(shape, DType::F64, &Device::Cpu).unwrap();
        let part = |(module, inputs, outputs): &(String, usize, usize)| match gradients.get(module) {
            Some(LoraGradient { down, up }) => [down.clone(), up.clone()],
            None => [zeros((Self::RANK, *inputs)), zeros((*outputs, Self::RANK))],
        };
        let flat = self.0.iter().flat_map(part).map(|t| t.flatten_all().unwrap()).collect::<Vec<_>>();
        Tensor::cat(&flat, 0).unwrap()
    }
}

/// Up to a tap, where later projections have no gradient, and to the predicted noise, where all have.
#[test]
fn gradients_of_lora_factors() {
    for family in ["sd1", "sd2"] {
        let unet = std::cell::RefCell::new(tiny(family));
        let factors = Factors::of(&unet.borrow());
        let channels = unet.borrow().config.in_channels;
        let (latents, context, timesteps) = (values(0, (2, channels, 8, 6)), values(90, (2, 5, 32)), [981., 20.5]);
        for tap in [Some(Tap::Mid), None] {
            let merged = |row: &Tensor| {
                let mut unet = unet.borrow_mut();
                unet.restore_lora();
                unet.merge_lora(&factors.entries(row), 1.).unwrap();
                let text = unet.text(&context).unwrap();
                match tap {
                    Some(tap) => unet.forward_to(&latents, &timesteps, &text, tap),
                    None => unet.forward_recorded(&latents, &timesteps, &text),
                }
            };
            let row = (values(3, factors.len()) * 0.3).unwrap();
            let vjp = |cotangent: &Tensor| {
                let tape = merged(&row)?.1;
                let entries = factors.entries(&row);
                let gradients = unet.borrow().vjp_lora(tape, cotangent, &entries)?;
                assert_eq!(gradients.len() == factors.0.len(), tap.is_none(), "all projections before the noise alone");
                Ok(factors.row(&gradients))
            };
            let error = disagreement(3, &row, |row| Ok(merged(row)?.0), vjp);
            assert!(error < 1e-8, "{family} LoRA to {tap:?}: the gradient is off by {error:.1e}");
        }
    }
}

/// The backward pass ends at the first layer with an entry: in a cross- or self-attention, on the way up, in the middle or down.
#[test]
fn some_factors_gradients_are_what_they_are_among_all() {
    let mut unet = tiny("sd1");
    let factors = Factors::of(&unet);
    let all = factors.entries(&(values(3, factors.len()) * 0.3).unwrap());
    unet.merge_lora(&all, 1.).unwrap();
    let text = text(&unet, 2);
    let run = || unet.forward_recorded(&values(0, (2, unet.config.in_channels, 8, 6)), &[981., 20.5], &text).unwrap();
    let cotangent = values(1, run().0.shape());
    let gradients = |entries: &[LoraEntry]| unet.vjp_lora(run().1, &cotangent, entries).unwrap();
    let expected = gradients(&all);
    for part in [".attn2.", "up_blocks.3", "mid_block", "down_blocks.1.attentions.1", "attn1.to_v", "nowhere"] {
        let some: Vec<_> = all.iter().filter(|entry| entry.module.contains(part)).cloned().collect();
        let mut lora = LoraGradients::of(&some, unet.attentions().map(|attention| attention.path.as_str())).unwrap();
        let (dx, _) = unet.pull_back(run().1, &cotangent, &mut lora).unwrap();
        assert!(dx.is_none(), "{part}: the pass goes on to the latents");
        let found = gradients(&some);
        assert_eq!(found.len(), some.len());
        for (module, LoraGradient { down, up }) in found {
            assert_values(&down, &numbers(&expected[&module].down), 0.);
            assert_values(&up, &numbers(&expected[&module].up), 0.);
        }
    }
}

/// The input gradient from the predicted noise, through the last norm and convolution.
#[test]
fn gradient_of_predicted_noise() {
    let unet = tiny("sd2");
    let (text, timesteps, x) = (text(&unet, 2), [981., 20.5], values(0, (2, unet.config.in_channels, 6, 5)));
    let run = |x: &Tensor| unet.forward_recorded(x, &timesteps, &text);
    let error = disagreement(2, &x, |x| Ok(run(x)?.0), |cotangent| unet.vjp(run(&x)?.1, cotangent));
    assert!(error < 1e-8, "off by {error:.1e}");
}
