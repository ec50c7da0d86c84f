//! The forms in which a host may give its text, and text that changes with the steps.

use host_api::{Status, Step, Text, View};
use serde_json::json;
use tests::dpt::{
    Texts, correct, corrected, create, difference, float_bits, latents, model, norm, own_config, prepared, run,
    running, step, unet_config,
};
use tests::hosts::plain;

#[test]
fn every_form_of_text_gives_the_same() {
    let texts = Texts::of(&[0, 2]);
    let of = |text: Text<'_>| {
        let mut instance = prepared(plain(), &own_config(json!({})));
        instance.begin(&run(2, text)).unwrap();
        corrected(&mut instance, 0)
    };
    let (context, pooled) = (texts.context(), texts.pooled());
    let expected = of(texts.text());
    let positions = Some(&texts.end_of_text[..]);
    let start = latents(1, 2);
    let change = norm(&difference(&expected, &start));
    let close = |found: Vec<f32>| {
        let error = norm(&difference(&found, &expected)) / change;
        assert!(error < 1e-3, "relative error {error}");
    };
    close(of(Text { context, end_of_text: positions, ..Text::default() }));
    let prompts = Some(&texts.prompts[..]);
    close(of(Text { prompts, ..Text::default() }));
    // What the host has of its own comes first; what is missing for the plugin's U-Net is encoded.
    close(of(Text { prompts, pooled, ..Text::default() }));
    close(of(Text { prompts, context, ..Text::default() }));
    let wrong = vec![String::new(); 2];
    assert_eq!(float_bits(&of(Text { prompts: Some(&wrong), ..texts.text() })), float_bits(&expected));
}

#[test]
fn prompts_alone_are_enough_on_the_shipped_model() {
    let folder = host_demo::default_model().unwrap();
    let settings = json!({"adapter": host_demo::default_adapter().unwrap(), "base_model": folder, "eta": 4.});
    let prompts = ["a red circle above a blue square".to_owned()];
    let encoder = diffusion::TextModel::load(&folder, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
    let encoded = encoder.encode(&[&prompts[0]]).unwrap();
    let flat = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (context, pooled) = (flat(&encoded.hidden), flat(&encoded.pooled));
    let config = unet_config(&folder);
    let [by_prompt, by_numbers] = [true, false].map(|alone| {
        let mut instance = create(plain(), &settings).unwrap();
        instance.prepare(&model(&config), host_api::Device::Cpu).unwrap();
        let numbers = Text {
            context: View::new(&context, encoded.hidden.dims()).ok(),
            pooled: View::new(&pooled, encoded.pooled.dims()).ok(),
            ..Text::default()
        };
        let text = if alone { Text { prompts: Some(&prompts), ..Text::default() } } else { numbers };
        instance.begin(&run(1, text)).unwrap();
        let mut numbers = latents(1, 1);
        correct(&mut instance, &step(0), &mut numbers).unwrap();
        numbers
    });
    assert_eq!(float_bits(&by_prompt), float_bits(&by_numbers));
    assert_ne!(float_bits(&by_prompt), float_bits(&latents(1, 1)));
}

#[test]
fn a_text_of_one_step_replaces_the_runs() {
    let (first, other) = (Texts::of(&[0, 2]), Texts::of(&[2, 1]));
    let settings = own_config(json!({}));
    let mut instance = running(plain(), &settings, &first);
    let before = corrected(&mut instance, 0);
    let replaced = Step { text: Some(other.text()), ..step(0) };
    let mut numbers = latents(1, 2);
    correct(&mut instance, &replaced, &mut numbers).unwrap();
    assert_eq!(float_bits(&numbers), float_bits(&corrected(&mut running(plain(), &settings, &other), 0)));
    assert_ne!(float_bits(&numbers), float_bits(&before));
    // For that step alone.
    assert_eq!(float_bits(&corrected(&mut instance, 0)), float_bits(&before));
    let short = Texts::of(&[0]);
    let wrong = Step { text: Some(short.text()), ..step(0) };
    let mut numbers = latents(1, 2);
    assert_eq!(correct(&mut instance, &wrong, &mut numbers).unwrap_err().status, Status::ShapeMismatch);
    assert_eq!(float_bits(&numbers), float_bits(&latents(1, 2)));
}
