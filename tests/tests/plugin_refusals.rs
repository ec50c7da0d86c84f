//! What the plugin refuses before a step: configurations, files, models and texts, each with a status and a message that
//! says what was expected and what was found.

use std::path::PathBuf;
use std::sync::Arc;

use host_api::{Device, Model, Prediction, Status, Text, View};
use serde_json::{Value, json};
use tests::dpt::{
    Texts, adapter, base_model, create, float_bits, host_config, latents, library, model, own_config, prepared, run,
    running, scratch, step, unet_config, with,
};
use tests::hosts::{Lender, plain};
use tests::{committed, dpt};

/// `status`, and every one of `words` in the message.
#[track_caller]
fn refused<T>(result: host_api::Result<T>, status: Status, words: &[&str]) {
    let Err(error) = result else { panic!("not refused; expected {status:?} {words:?}") };
    assert_eq!(error.status, status, "{error}");
    assert!(words.iter().all(|word| error.message.contains(word)), "{words:?} in: {error}");
    assert!(error.message.len() < 511, "cut short: {error}");
}

fn lender() -> Arc<Lender> {
    Arc::new(Lender::new(&Texts::of(&[0])))
}

#[test]
fn configurations() {
    use Status::{InvalidConfig, Unsupported};
    let refused_text =
        |text: &str, words: &[&str]| refused(library().create("dpt", plain(), text), InvalidConfig, words);
    refused_text("", &["empty", "`adapter`"]);
    refused_text("{\"adapter\"", &["EOF"]);
    refused_text("[1]", &["configuration"]);
    refused_text("{}", &["missing field `adapter`"]);
    let refused_config =
        |more: Value, status, words: &[&str]| refused(create(plain(), &host_config(more)), status, words);
    refused_config(json!({"etta": 1}), InvalidConfig, &["unknown field `etta`", "`eta`", "`monitor`"]);
    refused_config(json!({"eta": -1}), InvalidConfig, &["eta = -1", "between 0 and 100"]);
    refused_config(json!({"eta": "1"}), InvalidConfig, &["string", "expected f64"]);
    refused_config(json!({"start": 1.5}), InvalidConfig, &["start = 1.5", "between 0 and 1"]);
    refused_config(json!({"every": 0}), InvalidConfig, &["every = 0", "between 1 and 1000"]);
    refused_config(json!({"gradient": "both"}), InvalidConfig, &["`both`", "`host`, `plugin`, `weights`, `split`"]);
    refused_config(json!({"gradient": "plugin"}), InvalidConfig, &["\"plugin\"", "`base_model`"]);
    refused_config(json!({"device": "gpu"}), InvalidConfig, &["`gpu`", "`cpu`, `cuda` or `cuda:N`"]);
    refused_config(json!({"dtype": "f64"}), InvalidConfig, &["`f64`", "`f32`, `f16` or `bf16`"]);
    // The library under test is built without CUDA.
    refused_config(json!({"device": "cuda:1"}), Unsupported, &["`cuda:1`", "no CUDA"]);
}

#[test]
fn files_of_weights() {
    use Status::{InvalidData, NotFound};
    let folder = scratch("plugin_refusals_files");
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let adapter_is = |path: PathBuf, status, words: &[&str]| {
        refused(create(plain(), &host_config(json!({"adapter": path}))), status, words);
        // The same file as LoRA weights: no other complaint than that of the file.
        let lora = create(plain(), &host_config(json!({"lora": path})));
        refused(lora, status, &[path.file_name().unwrap().to_str().unwrap()]);
    };
    adapter_is(folder.join("absent.safetensors"), NotFound, &["absent.safetensors", "No such file"]);
    adapter_is(base_model().join("unet"), InvalidData, &["unet"]);
    adapter_is(write("empty", b""), InvalidData, &["empty", "shorter"]);
    adapter_is(write("text", b"not weights at all, but a line of text"), InvalidData, &["text", "safetensors"]);
    adapter_is(write("zip", b"PK\x03\x04 and nothing more"), InvalidData, &["zip", "pickle"]);
    adapter_is(write("old.bin", b"\x80\x02\x8a\nl\xfc\x9cF"), InvalidData, &["old.bin", "1.6"]);
    let whole = std::fs::read(adapter()).unwrap();
    adapter_is(write("half", &whole[..whole.len() / 2]), InvalidData, &["half", "safetensors"]);
    let unet = base_model().join("unet/diffusion_pytorch_model.safetensors");
    adapter_is(unet, InvalidData, &["no `query_embed.weight`", "not a DPT adapter"]);

    // One number that is not finite would spoil every picture.
    for name in
        ["map_to_clip.0.bias", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight"]
    {
        let mut tensors = candle_core::safetensors::load(adapter(), &candle_core::Device::Cpu).unwrap();
        let nan = (&tensors[name] * f64::NAN).unwrap();
        tensors.insert(name.into(), nan);
        let path = folder.join("nan.safetensors");
        candle_core::safetensors::save(&tensors, &path).unwrap();
        let spoilt = create(plain(), &host_config(json!({"adapter": path})));
        refused(spoilt, InvalidData, &["nan.safetensors", name, "NaN or infinity"]);
    }

    let adapter_with = |more: Value, words: &[&str]| refused(create(plain(), &host_config(more)), InvalidData, words);
    adapter_with(json!({"tap": null}), &["release_mid", "`tap`"]);
    adapter_with(json!({"heads": null}), &["width 32", "12 queries", "`heads`"]);
    adapter_with(json!({"heads": 5}), &["width 32", "5 heads"]);
    adapter_with(json!({"matching_queries": 13}), &["13 matching queries of 12"]);
}

#[test]
fn models() {
    use Status::{NotFound, ShapeMismatch, Unsupported};
    let config = unet_config(&base_model());
    let tiny = model(&config);
    let prepare = |settings: &Value, model: Model<'_>| create(lender(), settings).unwrap().prepare(&model, Device::Cpu);
    for settings in [host_config(json!({})), own_config(json!({}))] {
        let with_key = |more| with(settings.clone(), more);
        prepare(&settings, tiny).unwrap();
        let taps = ["`up9`", "down0, down1, down2, down3, mid, up0, up1, up2, up3"];
        refused(prepare(&with_key(json!({"tap": "up9"})), tiny), NotFound, &taps);
        let channels = ["32 channels at down0", "has 16"];
        refused(prepare(&with_key(json!({"tap": "down0"})), tiny), ShapeMismatch, &channels);
        let flow = Model { prediction: Prediction::Flow, ..tiny };
        refused(prepare(&settings, flow), Unsupported, &["flow"]);
        let inpainting = Model { unet_in_channels: 9, ..tiny };
        refused(prepare(&settings, inpainting), Unsupported, &["9 channels", "latents of 4"]);
        let wide = config.replace("\"cross_attention_dim\": 32", "\"cross_attention_dim\": 48");
        let words = ["width 32", "has 48"];
        refused(prepare(&settings, Model { unet_config: Some(&wide), ..tiny }), ShapeMismatch, &words);
        let nonsense = Model { unet_config: Some("{}"), ..tiny };
        refused(prepare(&settings, nonsense), Unsupported, &["the model's U-Net"]);
    }
    let cuda = create(lender(), &host_config(json!({}))).unwrap().prepare(&tiny, Device::Cuda(0));
    refused(cuda, Unsupported, &["cuda:0", "main memory"]);
    let no_gradient = create(plain(), &host_config(json!({}))).unwrap().prepare(&tiny, Device::Cpu);
    refused(no_gradient, Unsupported, &["plain", "sampler-hook.gradient/1", "`base_model`"]);
}

#[test]
fn base_models() {
    use Status::{InvalidData, NotFound, ShapeMismatch};
    let config = unet_config(&base_model());
    let prepare = |base: PathBuf, unet_config| {
        let settings = own_config(json!({"base_model": base}));
        let model = Model { unet_config, ..model(&config) };
        create(plain(), &settings).unwrap().prepare(&model, Device::Cpu)
    };
    let shapes = host_demo::default_model().unwrap();
    refused(prepare(shapes, Some(&config)), ShapeMismatch, &["reads 32 channels at mid", "has 128"]);
    refused(prepare(committed("nowhere"), Some(&config)), NotFound, &["nowhere", "No such file"]);

    // The adapter fits it, but it is not the model that is sampled.
    let other = config.replace("16,\n    16,\n    32,\n    32", "24,\n    24,\n    32,\n    32");
    assert_ne!(other, config);
    refused(
        prepare(base_model(), Some(&other)),
        ShapeMismatch,
        &["base model", "[16, 16, 32, 32]", "[24, 24, 32, 32]"],
    );
    prepare(base_model(), None).unwrap();

    let bare = scratch("plugin_refusals_bare_model");
    std::fs::create_dir(bare.join("unet")).unwrap();
    std::fs::write(bare.join("unet/config.json"), &config).unwrap();
    refused(prepare(bare, Some(&config)), InvalidData, &["unet", "no weights here"]);
}

#[test]
fn a_refused_model_leaves_the_one_before() {
    let config = unet_config(&base_model());
    let texts = Texts::of(&[0]);
    let mut instance = prepared(plain(), &own_config(json!({})));
    let flow = Model { prediction: Prediction::Flow, ..model(&config) };
    refused(instance.prepare(&flow, Device::Cpu), Status::Unsupported, &["flow"]);
    instance.begin(&run(1, texts.text())).unwrap();
    dpt::correct(&mut instance, &step(0), &mut latents(1, 1)).unwrap();
}

#[test]
fn texts_of_a_run() {
    use Status::{InvalidArgument, ShapeMismatch};
    let texts = Texts::of(&[0, 1]);
    let (context, pooled) = (texts.context(), texts.pooled());
    let numbers = vec![0.1f32; 4096];
    let view = |shape: &[usize]| View::new(&numbers[..shape.iter().product()], shape).ok();
    let sources: [(Arc<dyn host_api::host::Host>, Value); 2] =
        [(lender(), host_config(json!({}))), (plain(), own_config(json!({})))];
    for (index, (host, settings)) in sources.into_iter().enumerate() {
        let own = index == 1;
        let mut instance = prepared(host, &settings);
        let mut begin = |text, status, words: &[&str]| {
            refused(instance.begin(&run(2, text)), status, words);
        };
        let none = Text::default();
        let words: &[&str] = if own { &["pooled", "end-of-text", "prompts"] } else { &["pooled", "end_of_text"] };
        begin(none, InvalidArgument, words);
        begin(Text { context, ..none }, InvalidArgument, words);
        begin(Text { context, pooled: view(&[2, 24]), ..none }, ShapeMismatch, &["pooled", "[2, 24]", "[2, 32]"]);
        begin(Text { context, pooled: view(&[1, 32]), ..none }, ShapeMismatch, &["pooled", "[1, 32]", "B = 2"]);
        begin(Text { context: view(&[2, 7, 24]), end_of_text: Some(&[2, 3]), ..none }, ShapeMismatch, &["[2, 24]"]);
        begin(Text { context, end_of_text: Some(&[2, 77]), ..none }, InvalidArgument, &["77"]);
        begin(Text { context, end_of_text: Some(&[2]), ..none }, ShapeMismatch, &["1 texts", "2"]);
        begin(Text { context: view(&[1, 77, 32]), pooled, ..none }, ShapeMismatch, &["[1, 77, 32]", "B = 2"]);
        if own {
            let words = ["context", "[2, 7, 24]", "32"];
            begin(Text { context: view(&[2, 7, 24]), pooled, ..none }, ShapeMismatch, &words);
            begin(Text { context: view(&[2, 0, 32]), pooled, ..none }, ShapeMismatch, &["[2, 0, 32]"]);
            begin(Text { pooled, ..none }, InvalidArgument, &["context", "prompts"]);
        } else {
            let prompts = Some(&texts.prompts[..]);
            begin(Text { prompts, ..none }, InvalidArgument, &["pooled"]);
        }
        // None of this has harmed the instance.
        instance.begin(&run(2, texts.text())).unwrap();
    }
}

#[test]
fn latents_and_steps() {
    use Status::{InvalidArgument, ShapeMismatch, Unsupported};
    let texts = Texts::of(&[0]);
    let mut instance = running(plain(), &own_config(json!({})), &texts);
    let start = latents(3, 1);
    let mut check = |step: &host_api::Step, shape: &[usize], status, words: &[&str]| {
        let mut numbers = start.clone();
        let mut view = host_api::ViewMut::new(&mut numbers, shape).unwrap();
        refused(instance.step_in_place(step, &mut view), status, words);
        assert_eq!(float_bits(&numbers), float_bits(&start));
    };
    check(&step(0), &[1, 8, 8, 16], ShapeMismatch, &["[1, 8, 8, 16]", "[1, 4, h, w]"]);
    check(&step(0), &[2, 4, 8, 16], ShapeMismatch, &["[2, 4, 8, 16]", "[1, 4, h, w]"]);
    check(&step(0), &[4, 256], ShapeMismatch, &["[4, 256]", "[1, 4, h, w]"]);
    let counted = host_api::Step { count: 9, ..step(0) };
    check(&counted, &[1, 4, 16, 16], InvalidArgument, &["9", "4 steps"]);
    let beyond = host_api::Step { alpha_bar: 1.5, ..step(0) };
    check(&beyond, &[1, 4, 16, 16], InvalidArgument, &["alpha_bar"]);
    let no_sigma = host_api::Step { alpha_bar: 0., space: host_api::Space::Ve, ..step(0) };
    check(&no_sigma, &[1, 4, 16, 16], InvalidArgument, &["alpha_bar", "(0, 1]"]);
    let extra = host_api::Step { extra_inputs: true, ..step(0) };
    check(&extra, &[1, 4, 16, 16], Unsupported, &["own U-Net", "`ignore_extra_inputs`"]);

    // Nothing of this spoils the instance, neither do latents without rows; and a schedule may start at pure noise.
    let mut nothing: [f32; 0] = [];
    let mut empty = host_api::ViewMut::new(&mut nothing, &[1, 4, 0, 16]).unwrap();
    refused(instance.step_in_place(&step(0), &mut empty), ShapeMismatch, &["[1, 4, 0, 16]", "at least 1"]);
    let pure_noise = host_api::Step { alpha_bar: 0., ..step(0) };
    let mut numbers = start.clone();
    dpt::correct(&mut instance, &pure_noise, &mut numbers).unwrap();
    assert_ne!(float_bits(&numbers), float_bits(&start));

    // Told to, or where it sees them, the plugin corrects all the same.
    let told = own_config(json!({"ignore_extra_inputs": true}));
    for (host, settings) in [(plain(), told), (lender() as Arc<dyn host_api::host::Host>, host_config(json!({})))] {
        let mut numbers = start.clone();
        dpt::correct(&mut running(host, &settings, &texts), &extra, &mut numbers).unwrap();
        assert_ne!(float_bits(&numbers), float_bits(&start));
    }
}
