//! The whole U-Net's input gradients by finite differences, on the tiny pipelines of the parity cases in f64.

use super::*;
use crate::layers::finite_difference::{disagreement, values};

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
