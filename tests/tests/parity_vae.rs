//! The autoencoder against PyTorch: one family has the old tensor names, the other today's.

use candle_core::DType;
use diffusion::Vae;
use tests::{FAMILIES, assert_close, case, device, parity};

#[test]
fn parity_vae_encode_and_decode() {
    for family in FAMILIES {
        let case = case(&format!("{family}-cases/vae.safetensors"));
        let vae = Vae::load(&parity(&format!("{family}-tiny/vae")), DType::F32, device()).unwrap();
        let latents = vae.encode(&case["image"]).unwrap();
        assert_close(&format!("{family} mean"), &latents.mean, &case["mean"], 1e-4);
        assert_close(&format!("{family} logvar"), &latents.logvar, &case["logvar"], 1e-4);
        let image = vae.decode(&case["latents"]).unwrap();
        assert_close(&format!("{family} decoded"), &image, &case["decoded"], 1e-4);
    }
}
