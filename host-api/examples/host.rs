//! A host in a few lines: corrects one batch of noise with the plugin's own U-Net.
//!
//! `cargo run -p host-api --example host -- target/release/libdpt.so weights/shapes`

use std::sync::Arc;

use host_api::host::{Host, Library};
use host_api::{Device, Model, Prediction, Run, Space, Step, Text, View, ViewMut};

struct MyHost;

impl Host for MyHost {
    fn name(&self) -> &str {
        "my-host"
    }
    fn version(&self) -> &str {
        "1.0"
    }
    fn log(&self, level: log::Level, message: &str) {
        eprintln!("{level}: {message}");
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, library, base] = &arguments[..] else { return Err("usage: host LIBRARY MODEL_FOLDER".into()) };

    let config = format!(r#"{{"adapter": "{base}/dpt.safetensors", "base_model": "{base}", "eta": 4}}"#);
    let library = Library::open(library)?;
    let mut plugin = library.create(library.descriptors()[0].id, Arc::new(MyHost), &config)?;
    let model = Model {
        family: "sd1",
        prediction: Prediction::Epsilon,
        unet_in_channels: 4,
        latent_channels: 4,
        alphas_cumprod: &[],
        unet_config: None,
    };
    plugin.prepare(&model, Device::Cpu)?;

    // One item. This plugin encodes prompts itself when it has a base model; hosts usually pass context and pooled text.
    let prompts = ["a red circle to the left of a blue square".to_owned()];
    let text = Text { prompts: Some(&prompts), ..Text::default() };
    let mut latents: Vec<f32> = (0..4 * 16 * 16).map(|i| (i as f32 * 12.9898).sin()).collect();
    plugin.begin(&Run { batch: 1, steps: 3, guidance_scale: 4., text })?;
    for index in 0..3 {
        let step = Step {
            index,
            count: 3,
            sub_evaluation: 0,
            timestep: 900.,
            alpha_bar: 0.014,
            space: Space::Vp,
            extra_inputs: false,
            text: None,
        };
        let report = plugin.step_in_place(&step, &mut ViewMut::new(&mut latents, &[1, 4, 16, 16])?)?;
        println!("score {:.4}, corrected by {:.4}", report.items[0].score, report.items[0].correction_norm);
        // Here a host predicts the noise in `latents` and steps its sampler.
    }
    plugin.end()?;
    assert!(View::new(&latents, &[1, 4, 16, 16])?.to_vec().iter().all(|value| value.is_finite()));
    Ok(())
}
