//! The U-Net's output, every tap and every input gradient against PyTorch, for both families.

use candle_core::DType;
use diffusion::UNet;
use tests::{FAMILIES, assert_close, case, device, parity};

const TOLERANCE: f64 = 1e-4;

#[test]
fn parity_unet_output() {
    for family in FAMILIES {
        let case = case(&format!("{family}-cases/unet.safetensors"));
        let unet = UNet::load(&parity(&format!("{family}-tiny/unet")), DType::F32, device()).unwrap();
        let timesteps = timesteps(&case["timesteps"]);
        let noise = unet.forward(&case["latents"], &timesteps, &unet.text(&case["context"]).unwrap()).unwrap();
        assert_close(&format!("{family} noise"), &noise, &case["noise"], TOLERANCE);
    }
}

#[test]
fn parity_unet_taps_and_input_gradients() {
    for family in FAMILIES {
        let case = case(&format!("{family}-cases/unet.safetensors"));
        let folder = parity(&format!("{family}-tiny/unet"));
        let whole = UNet::load(&folder, DType::F32, device()).unwrap();
        let timesteps = timesteps(&case["timesteps"]);
        let taps = whole.config().taps();
        assert_eq!(taps.len(), 9);
        for tap in taps {
            // Both the whole model stopped at the tap and a model that holds no more than the tap needs.
            let partial = UNet::load_to(&folder, &tap.to_string(), DType::F32, device()).unwrap();
            for unet in [&whole, &partial] {
                let text = unet.text(&case["context"]).unwrap();
                let (activation, tape) = unet.forward_to(&case["latents"], &timesteps, &text, tap).unwrap();
                assert_close(&format!("{family} {tap}"), &activation, &case[&format!("{tap}.activation")], TOLERANCE);
                assert_eq!(activation.dim(1).unwrap(), unet.config().tap_channels(tap));
                let gradient = unet.vjp(tape, &case[&format!("{tap}.cotangent")]).unwrap();
                let expected = &case[&format!("{tap}.latents_grad")];
                assert_close(&format!("{family} {tap} gradient"), &gradient, expected, TOLERANCE);
            }
        }
    }
}

fn timesteps(tensor: &candle_core::Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}
