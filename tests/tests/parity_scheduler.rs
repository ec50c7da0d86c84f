//! The samplers against diffusers: a fixed sequence of model outputs, the latents after every step.

use candle_core::{DType, Tensor};
use diffusion::scheduler::{Ddim, Prediction, SchedulerConfig};
use tests::{assert_close, case, parity};

/// The configuration of the cases, that of the tiny pipelines; what the model predicts is the case's.
fn config(prediction: Prediction) -> SchedulerConfig {
    SchedulerConfig { prediction, ..SchedulerConfig::load(&parity("sd1-tiny/scheduler")).unwrap() }
}

#[test]
fn parity_ddim() {
    let case = case("schedulers.safetensors");
    for (name, prediction) in [("ddim", Prediction::Epsilon), ("ddim_v", Prediction::Velocity)] {
        let expected = &case[&format!("{name}.latents")];
        let ddim = Ddim::new(&config(prediction), expected.dim(0).unwrap()).unwrap();
        let timesteps: Vec<f64> = case[&format!("{name}.timesteps")].to_dtype(DType::F64).unwrap().to_vec1().unwrap();
        assert_eq!(ddim.timesteps(), timesteps);
        let sigma = case[&format!("{name}.init_noise_sigma")].to_scalar::<f32>().unwrap();
        assert_eq!(ddim.init_noise_sigma(), f64::from(sigma));

        let mut z = (&case["start"] * ddim.init_noise_sigma()).unwrap();
        for i in 0..timesteps.len() {
            // DDIM gives the model its latents as they are.
            let input = case[&format!("{name}.scaled_input")].get(i).unwrap();
            assert_close(&format!("{name} input {i}"), &z, &input, 1e-4);
            z = ddim.step(i, &case["outputs"].get(i).unwrap(), &z).unwrap();
            assert_close(&format!("{name} step {i}"), &z, &expected.get(i).unwrap(), 1e-4);
        }
    }
}

#[test]
fn parity_ddim_keeps_the_latents_precision() {
    let case = case("schedulers.safetensors");
    let ddim = Ddim::new(&config(Prediction::Epsilon), 10).unwrap();
    let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let z = ddim.step(0, &case["outputs"].get(0).unwrap(), &wide(&case["start"])).unwrap();
    assert_eq!(z.dtype(), DType::F64);
    assert_close("first step in f64", &z, &wide(&case["ddim.latents"].get(0).unwrap()), 1e-4);
}
