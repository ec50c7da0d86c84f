//! The tests that compare numbers, as one program that computes on the device of `TEST_DEVICE`: `gpu/build.sh` makes it for
//! machines with a GPU, and `gpu/check.sh` runs it there.

macro_rules! run_on_the_device {
    ($($file:ident)*) => { $(mod $file;)* };
}

run_on_the_device! {
    parity_unet parity_vae parity_text parity_adapter parity_losses parity_runs parity_lora
    gradient_sources unet_precision unet_lora plugin_correction plugin_lora sampling training
}

#[path = "cuda/graphs.rs"]
mod graphs;
#[path = "cuda/memory.rs"]
mod memory;
#[path = "cuda/several.rs"]
mod several;
#[path = "cuda/views.rs"]
mod views;

mod room {
    use candle_core::cuda::cudarc::driver::result::mem_get_info;
    use candle_core::{DType, Device, Tensor};
    use serde_json::json;
    use tests::dpt::{Texts, corrected, own_config, prepared, run, running};
    use tests::hosts::plain;
    use tests::{device, tiny_unet};

    fn free(device: &Device) -> usize {
        assert!(!device.is_cpu(), "TEST_DEVICE names no GPU");
        device.synchronize().unwrap();
        // The current context is this thread's, which `synchronize` made the device's.
        mem_get_info().unwrap().0
    }

    #[test]
    fn two_hundred_corrected_steps_take_no_more_than_the_first_ones() {
        let mut instance = running(plain(), &own_config(json!({})), &Texts::of(&[0, 2]));
        let mut after = |steps: usize| {
            (0..steps).for_each(|_| drop(corrected(&mut instance, 1)));
            free(device())
        };
        let first = after(5);
        let last = after(200);
        // What the driver says moves by whole pieces of its pool, and by other processes.
        assert!(last + (256 << 20) > first, "{} MB more", (first - last) >> 20);
    }

    /// Each has a graph, and memory for it.
    #[test]
    fn twenty_runs_take_no_more_than_the_first_ones() {
        let texts = Texts::of(&[0, 2]);
        let mut instance = prepared(plain(), &own_config(json!({})));
        let mut after = |runs: usize| {
            for _ in 0..runs {
                instance.begin(&run(2, texts.text())).unwrap();
                (0..3).for_each(|index| drop(corrected(&mut instance, index)));
                instance.end().unwrap();
            }
            free(device())
        };
        let first = after(2);
        let last = after(20);
        assert!(last + (32 << 20) > first, "{} MB more", (first - last) >> 20);
    }

    /// Takes nearly all there is: nothing else can run at the time.
    #[test]
    fn too_little_memory_is_an_error_and_work_goes_on() {
        let unet = tiny_unet("sd1", DType::F32);
        let text = unet.text(&Tensor::zeros((1, 7, 32), DType::F32, device()).unwrap()).unwrap();
        // Latents of a quarter of it; what the first convolution makes of them is all of it.
        let side = ((free(device()) / 64) as f64).sqrt() as usize / 8 * 8;
        let error = Tensor::zeros((1, 4, side, side), DType::F32, device())
            .map_err(diffusion::Error::from)
            .and_then(|latents| unet.forward(&latents, &[500.], &text))
            .unwrap_err();
        assert!(error.to_string().to_lowercase().contains("memory"), "{error}");
        let latents = Tensor::ones((1, 4, 8, 8), DType::F32, device()).unwrap();
        let noise = unet.forward(&latents, &[500.], &text).unwrap();
        assert!(noise.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|v| v.is_finite()));
    }
}
