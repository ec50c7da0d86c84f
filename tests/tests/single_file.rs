//! Single files under LDM's names against diffusers' own tools (`tests/single_file`) and against the folders they were made of.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use diffusion::scheduler::Prediction;
use diffusion::{
    LoadOptions, Pipeline, SingleFileOptions, UNetConfig, VaeConfig, describe_single_file, load_unet_to,
    write_single_file,
};
use serde::Deserialize;
use serde_json::{Value, json};
use tests::dpt::{Texts, corrected, float_bits, own_config, running, scratch};
use tests::hosts::plain;
use tests::pickle::crc32;
use tests::{FAMILIES, bits, committed, values};

fn made_by_diffusers<T: serde::de::DeserializeOwned>(name: &str) -> BTreeMap<String, T> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("single_file").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn tiny(family: &str) -> PathBuf {
    committed(&format!("{family}-tiny"))
}

/// The tiny pipeline as a single file of ours.
fn written(test: &str, family: &str) -> PathBuf {
    let file = scratch(test).join(format!("{family}.safetensors"));
    write_single_file(&tiny(family), &file, &mut |_, _| {}).unwrap();
    file
}

fn with_configs(family: &str) -> LoadOptions {
    LoadOptions { configs: Some(tiny(family)), ..LoadOptions::default() }
}

#[derive(Debug, Deserialize, PartialEq)]
struct Stored {
    shape: Vec<usize>,
    crc: u32,
}

/// Names, shapes and bytes of every tensor are those that diffusers' script writes.
#[test]
fn ours_is_what_diffusers_writes() {
    for family in FAMILIES {
        let bytes = std::fs::read(written("single_file_writes", family)).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let found: BTreeMap<String, Stored> = file
            .tensors()
            .into_iter()
            .map(|(name, view)| (name, Stored { shape: view.shape().to_vec(), crc: crc32(view.data()) }))
            .collect();
        let expected = made_by_diffusers::<Stored>(&format!("{family}.json"));
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{family}");
        for (name, expected) in &expected {
            assert_eq!(&found[name], expected, "{family} {name}");
        }
        // Whole or not at all: nothing else is left in the folder.
        assert_eq!(std::fs::read_dir(scratch_of("single_file_writes")).unwrap().count(), 1);
    }
}

fn scratch_of(test: &str) -> PathBuf {
    tests::plugin_library().ancestors().nth(2).unwrap().join("tmp").join(test)
}

#[test]
fn a_single_file_is_the_folders_model() {
    for family in FAMILIES {
        let file = written(&format!("single_file_reads_{family}"), family);
        let folder = Pipeline::load(&tiny(family), DType::F32, &Device::Cpu).unwrap();
        let single = Pipeline::load_with(&file, &with_configs(family), DType::F32, &Device::Cpu).unwrap();
        assert_eq!((single.family(), &single.scheduler), (family, &folder.scheduler));
        let texts = [&folder, &single].map(|p| p.text.encode(&["a red circle!", "naïve café"]).unwrap());
        assert_eq!(bits(&texts[0].hidden), bits(&texts[1].hidden));
        assert_eq!(bits(&texts[0].pooled), bits(&texts[1].pooled));
        let noise = |p: &Pipeline| {
            let text = p.unet.text(&texts[0].hidden).unwrap();
            bits(&p.unet.forward(&values(1, (2, 4, 8, 8)), &[981., 20.5], &text).unwrap())
        };
        assert_eq!(noise(&folder), noise(&single));
        let image = values(2, (1, 3, 32, 32));
        assert_eq!(bits(&folder.vae.encode(&image).unwrap().mean), bits(&single.vae.encode(&image).unwrap().mean));
        let latents = values(3, (1, 4, 4, 4));
        assert_eq!(bits(&folder.vae.decode(&latents).unwrap()), bits(&single.vae.decode(&latents).unwrap()));
    }
}

/// The plugin's own U-Net from a file.
#[test]
fn a_single_file_serves_as_the_plugins_base_model() {
    let file = written("single_file_base_model", "sd1");
    let texts = Texts::of(&[0, 2]);
    let step = |more: Value| corrected(&mut running(plain(), &own_config(more), &texts), 0);
    let from_file = json!({"base_model": file, "base_configs": tiny("sd1")});
    assert_eq!(float_bits(&step(from_file)), float_bits(&step(json!({}))));
    let (unet, text) = load_unet_to(&file, &with_configs("sd1"), "down1", DType::F32, &Device::Cpu).unwrap();
    assert!(text.is_some() && unet.weights().keys().all(|name| !name.starts_with("up_blocks")));
}

/// Shapes by name.
type Shapes = BTreeMap<String, Vec<usize>>;

/// A safetensors file with these shapes in f16 and a hole for the numbers: as large as the real ones, but not on the disk.
fn sparse(path: &Path, shapes: &Shapes, metadata: Value) {
    let mut end = 0;
    let mut header = serde_json::Map::from_iter([("__metadata__".to_owned(), metadata)]);
    for (name, shape) in shapes {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "F16", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = Value::Object(header).to_string();
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();
}

fn describe(path: &Path) -> diffusion::Result<diffusion::SingleFileSummary> {
    describe_single_file(path, &SingleFileOptions::default())
}

/// What files of the released models' sizes hold is read off their shapes, with every tensor accounted for.
#[test]
fn the_released_models_are_told_apart_by_their_shapes() {
    let file = scratch("single_file_full").join("model.safetensors");
    let sd1 = made_by_diffusers::<Vec<usize>>("sd1_full.json");
    sparse(&file, &sd1, json!({}));
    let summary = describe(&file).unwrap();
    assert_eq!(summary.unet, UNetConfig::stable_diffusion_1());
    assert_eq!(summary.vae, VaeConfig::stable_diffusion());
    assert_eq!((summary.text, summary.open_clip, summary.prediction), ((12, 768), false, Prediction::Epsilon));

    let mut sd2 = made_by_diffusers::<Vec<usize>>("sd2_full.json");
    sparse(&file, &sd2, json!({}));
    let base = describe(&file).unwrap();
    assert_eq!(base.unet, UNetConfig::stable_diffusion_2());
    assert_eq!((base.text, base.open_clip, base.prediction), ((23, 1024), true, Prediction::Epsilon));
    // SD 2.1 at 768 pixels has the same shapes: a flag tells, or the header.
    let velocity = SingleFileOptions { prediction: Some(Prediction::Velocity), ..SingleFileOptions::default() };
    let flagged = describe_single_file(&file, &velocity).unwrap();
    assert_eq!((flagged.prediction, flagged.unet.sample_size), (Prediction::Velocity, Some(96)));
    // The released files have the layer that is not run, and training's leftovers.
    let layer = "cond_stage_model.model.transformer.resblocks.22.";
    let last: Vec<_> = sd2
        .iter()
        .filter(|(name, _)| name.starts_with(layer))
        .map(|(n, s)| (n.replace(".22.", ".23."), s.clone()))
        .collect();
    assert_eq!(last.len(), 12);
    sd2.extend(last);
    for (name, shape) in [
        ("cond_stage_model.model.text_projection", vec![1024, 1024]),
        ("cond_stage_model.model.logit_scale", vec![]),
        ("alphas_cumprod", vec![1000]),
        ("model_ema.diffusion_modelinput_blocks00weight", vec![320, 4, 3, 3]),
        ("first_stage_model.loss.logvar", vec![]),
    ] {
        sd2.insert(name.into(), shape);
    }
    sparse(&file, &sd2, json!({"modelspec.prediction_type": "v"}));
    let released = describe(&file).unwrap();
    assert_eq!((released.text, released.prediction), ((23, 1024), Prediction::Velocity));
    sparse(&file, &sd2, json!({"modelspec.prediction_type": "sample"}));
    assert!(describe(&file).unwrap_err().to_string().contains("`sample`; expected `epsilon` or `v`"));
}

#[test]
fn what_is_no_such_model_is_named() {
    let file = scratch("single_file_refusals").join("model.safetensors");
    let whole = made_by_diffusers::<Vec<usize>>("sd1_full.json");
    let refused = |change: &dyn Fn(&mut Shapes), named: &[&str]| {
        let mut shapes = whole.clone();
        change(&mut shapes);
        sparse(&file, &shapes, json!({}));
        let message = describe(&file).unwrap_err().to_string();
        assert!(named.iter().all(|part| message.contains(part)), "{message}");
    };
    let unet = |name: &str| format!("model.diffusion_model.{name}");
    refused(&|s| s.retain(|name, _| name.starts_with("first_stage_model.")), &["no U-Net in it"]);
    refused(&|s| s.retain(|name, _| !name.starts_with("cond_stage_model.")), &["no text encoder in it"]);
    refused(&|s| drop(s.insert(unet("input_blocks.0.0.weight"), vec![320, 9, 3, 3])), &["9 channels", "inpainting"]);
    refused(&|s| drop(s.insert("conditioner.embedders.0.a".into(), vec![1])), &["Stable Diffusion XL"]);
    refused(&|s| drop(s.insert(unet("joint_blocks.0.a"), vec![1])), &["Stable Diffusion 3"]);
    refused(&|s| drop(s.insert(unet("double_blocks.0.a"), vec![1])), &["Flux"]);
    refused(&|s| drop(s.insert("lora_unet_a.alpha".into(), vec![])), &["LoRA weights"]);
    refused(&|s| drop(s.insert("control_model.a".into(), vec![1])), &["ControlNet"]);
    refused(&|s| drop(s.insert("strange.weight".into(), vec![3])), &["unexpected", "`strange.weight`", "[3]"]);
    // Not of Stable Diffusion's sizes.
    let tiny_file = written("single_file_tiny_refused", "sd1");
    assert!(describe(&tiny_file).unwrap_err().to_string().contains("folder with configurations"));

    // What only loading finds: a tensor that lacks, of another shape, or not finite; a vocabulary without a tokenizer.
    let bytes = std::fs::read(&tiny_file).unwrap();
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap();
    let load = |change: &dyn Fn(&mut std::collections::HashMap<String, Tensor>)| {
        let mut tensors = tensors.clone();
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, &file).unwrap();
        Pipeline::load_with(&file, &with_configs("sd1"), DType::F32, &Device::Cpu).err().unwrap().to_string()
    };
    let message = load(&|t| drop(t.remove(&unet("middle_block.0.in_layers.2.weight"))));
    assert!(message.contains("`mid_block.resnets.0.conv1.weight` is missing"), "{message}");
    let message = load(&|t| drop(t.insert(unet("time_embed.0.bias"), values(1, 7))));
    assert!(message.contains("`time_embedding.linear_1.bias` has shape [7]"), "{message}");
    let message =
        load(&|t| drop(t.insert(unet("out.2.bias"), Tensor::new(&[0f32, f32::NAN, 0., 0.], &Device::Cpu).unwrap())));
    assert!(message.contains("`conv_out.bias` holds NaN"), "{message}");
    let message = load(&|t| drop(t.insert(unet("output_blocks.0.0.strange"), values(1, 3))));
    assert!(message.contains("unexpected") && message.contains("`up_blocks.0.resnets.0.strange`"), "{message}");
    // Configurations without a tokenizer: CLIP's does not fit a vocabulary of 1024.
    let configs = scratch("single_file_configs");
    for part in ["unet", "vae", "text_encoder"] {
        std::fs::create_dir(configs.join(part)).unwrap();
        std::fs::copy(tiny("sd1").join(part).join("config.json"), configs.join(part).join("config.json")).unwrap();
    }
    let options = LoadOptions { configs: Some(configs), ..LoadOptions::default() };
    let message = Pipeline::load_with(&tiny_file, &options, DType::F32, &Device::Cpu).err().unwrap().to_string();
    assert!(message.contains("1024 tokens") && message.contains("49408"), "{message}");
    // A folder needs no configurations, and a pickle under `state_dict` is not read.
    let message = Pipeline::load_with(&tiny("sd1"), &options, DType::F32, &Device::Cpu).err().unwrap().to_string();
    assert!(message.contains("configurations of its own"), "{message}");
}
