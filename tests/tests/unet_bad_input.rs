//! Broken checkpoints, configurations that are not Stable Diffusion, and inputs that do not fit: each is an error that says
//! what was found and what was expected.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use diffusion::{Error, Tap, UNet};
use serde_json::{Value, json};
use tests::{committed, tiny_unet, values};

const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";
const NAME: &str = "mid_block.resnets.1.conv2.weight";

/// A changed copy of the tiny SD 1 U-Net's folder.
fn copy(name: &str, change: impl FnOnce(&mut HashMap<String, Tensor>, &mut Value)) -> PathBuf {
    let (source, folder) = (committed("sd1-tiny/unet"), PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name));
    std::fs::create_dir_all(&folder).unwrap();
    let mut tensors = candle_core::safetensors::load(source.join(WEIGHTS), &Device::Cpu).unwrap();
    let mut config = serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    change(&mut tensors, &mut config);
    candle_core::safetensors::save(&tensors, folder.join(WEIGHTS)).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    folder
}

fn failure(folder: PathBuf) -> Error {
    UNet::load(&folder, DType::F32, &Device::Cpu).err().expect("a broken folder")
}

#[test]
fn an_unchanged_copy_loads() {
    UNet::load(&copy("unchanged", |_, _| {}), DType::F32, &Device::Cpu).map(drop).unwrap();
}

#[test]
fn missing_tensor() {
    let error = failure(copy("missing", |tensors, _| drop(tensors.remove(NAME))));
    assert!(
        matches!(&error, Error::MissingTensor { name, expected, .. } if name == NAME && expected == &[32, 32, 3, 3])
    );
    let message = error.to_string();
    assert!(message.contains(WEIGHTS) && message.contains(NAME) && message.contains("[32, 32, 3, 3]"), "{message}");
}

#[test]
fn misshapen_tensor() {
    let error = failure(copy("misshapen", |tensors, _| drop(tensors.insert(NAME.into(), values(1, (32, 16, 3, 3))))));
    let shapes = ([32, 32, 3, 3], [32, 16, 3, 3]);
    assert!(matches!(&error, Error::TensorShape { name, expected, found, .. }
        if name == NAME && expected == &shapes.0 && found == &shapes.1));
    let message = error.to_string();
    assert!(
        message.contains(NAME) && message.contains("has shape [32, 16, 3, 3], expected [32, 32, 3, 3]"),
        "{message}"
    );
}

/// As many values in another order of dimensions are not the same tensor.
#[test]
fn transposed_tensor() {
    let name = "time_embedding.linear_1.weight";
    let error = failure(copy("transposed", |tensors, _| {
        let transposed = tensors[name].t().unwrap().contiguous().unwrap();
        tensors.insert(name.into(), transposed);
    }));
    assert!(error.to_string().contains("has shape [16, 64], expected [64, 16]"), "{error}");
}

#[test]
fn unexpected_tensors() {
    let error = failure(copy("unexpected", |tensors, _| {
        tensors.insert("up_blocks.3.resnets.3.norm1.bias".into(), values(1, 16));
        tensors.insert("add_embedding.linear_1.bias".into(), values(1, (2, 7)));
    }));
    assert!(matches!(&error, Error::UnexpectedTensor { name, found, count: 2, .. }
        if name == "add_embedding.linear_1.bias" && found == &[2, 7]));
    let message = error.to_string();
    assert!(message.contains("2 unexpected") && message.contains("`add_embedding.linear_1.bias`"), "{message}");
}

/// What lies in a block beyond the tap is not read; what lies outside every block is still refused.
#[test]
fn a_partial_load_ignores_its_absent_blocks_alone() {
    let beyond = copy("beyond", |tensors, _| drop(tensors.remove("up_blocks.3.resnets.0.conv1.weight")));
    UNet::load_to(&beyond, "up2", DType::F32, &Device::Cpu).map(drop).unwrap();
    let message = UNet::load_to(&beyond, "up3", DType::F32, &Device::Cpu).err().unwrap().to_string();
    assert!(message.contains("`up_blocks.3.resnets.0.conv1.weight` is missing"), "{message}");
    let stray = copy("stray", |tensors, _| drop(tensors.insert("stray.weight".into(), values(1, 3))));
    let message = UNet::load_to(&stray, "mid", DType::F32, &Device::Cpu).err().unwrap().to_string();
    assert!(message.contains("`stray.weight`"), "{message}");
}

#[test]
fn truncated_file() {
    let folder = copy("truncated", |_, _| {});
    let whole = std::fs::read(folder.join(WEIGHTS)).unwrap();
    for length in [0, 7, 8, 1000, whole.len() / 2, whole.len() - 1] {
        std::fs::write(folder.join(WEIGHTS), &whole[..length]).unwrap();
        let message = failure(folder.clone()).to_string();
        assert!(
            message.contains(WEIGHTS) && message.contains("not a readable safetensors file"),
            "{length}: {message}"
        );
    }
}

#[test]
fn missing_files() {
    let folder = copy("no-weights", |_, _| {});
    std::fs::remove_file(folder.join(WEIGHTS)).unwrap();
    let message = failure(folder.clone()).to_string();
    assert!(message.contains("no-weights") && message.contains(WEIGHTS), "{message}");
    std::fs::remove_file(folder.join("config.json")).unwrap();
    let error = failure(folder);
    assert!(matches!(&error, Error::Io { path, .. } if path.ends_with("config.json")), "{error}");
}

#[test]
fn configurations_that_are_not_stable_diffusion() {
    let cases = [
        ("act_fn", json!("gelu"), "`act_fn` is \"gelu\"; only \"silu\""),
        ("mid_block_type", json!(null), "`mid_block_type` is null"),
        ("class_embed_type", json!("timestep"), "`class_embed_type` is \"timestep\""),
        ("addition_embed_type", json!("text_time"), "`addition_embed_type` is \"text_time\""),
        ("resnet_time_scale_shift", json!("scale_shift"), "`resnet_time_scale_shift` is \"scale_shift\""),
        ("down_block_types", json!(["DownBlock2D"]), "`down_block_types` has 1 entries, expected 4"),
        ("up_block_types", json!(["A", "B", "C", "D"]), "`up_block_types` has \"A\""),
        ("block_out_channels", json!([]), "`block_out_channels` is empty"),
        ("block_out_channels", json!([16, 16, 32]), "expected 3"),
        ("block_out_channels", json!([16, 16, 0, 32]), "`block_out_channels`"),
        ("block_out_channels", json!([1u64 << 62, 16, 32, 32]), "`block_out_channels`"),
        ("layers_per_block", json!(0), "`layers_per_block`"),
        ("layers_per_block", json!([2, 2, 1, 2]), "`layers_per_block` is [2, 2, 1, 2]"),
        ("transformer_layers_per_block", json!([1, 2, 10, 1]), "`transformer_layers_per_block`"),
        ("attention_head_dim", json!([8, 8, 8]), "`attention_head_dim` has 3 entries, expected 4"),
        ("attention_head_dim", json!(3), "`attention_head_dim` is 3, which does not divide 16"),
        ("attention_head_dim", json!(0), "`attention_head_dim` is 0"),
        ("norm_num_groups", json!(5), "`norm_num_groups` is 5, which does not divide 16"),
        ("norm_num_groups", json!(null), "invalid type: null"),
        ("in_channels", json!(-4), "-4"),
        ("cross_attention_dim", json!([32, 32]), "invalid type: sequence"),
    ];
    for (key, value, expected) in cases {
        let message = failure(copy("config", |_, config| config[key] = value)).to_string();
        assert!(message.contains("config.json") && message.contains(expected), "{message}, not {expected}");
    }
    let message = failure(copy("config", |_, config| drop(config.as_object_mut().unwrap().remove("norm_eps"))));
    assert!(message.to_string().contains("missing field `norm_eps`"), "{message}");
    let message = failure(copy("config", |_, config| *config = json!([1, 2]))).to_string();
    assert!(message.contains("config.json"), "{message}");
}

/// Sizes that are sound in themselves but not those of the weights.
#[test]
fn a_configuration_of_other_weights() {
    let error = failure(copy("other", |_, config| config["cross_attention_dim"] = json!(768)));
    assert!(error.to_string().contains("has shape [16, 32], expected [16, 768]"), "{error}");
    let error = failure(copy("other", |_, config| config["layers_per_block"] = json!(1)));
    assert!(matches!(&error, Error::TensorShape { .. } | Error::UnexpectedTensor { .. }), "{error}");
    let error = failure(copy("other", |_, config| config["use_linear_projection"] = json!(true)));
    assert!(error.to_string().contains("proj_in.weight` has shape [16, 16, 1, 1], expected [16, 16]"), "{error}");
}

#[test]
fn a_tap_that_does_not_exist() {
    let names = "down0, down1, down2, down3, mid, up0, up1, up2, up3";
    for tap in ["up4", "down", "Mid", "", "down00"] {
        let error = UNet::load_to(&committed("sd1-tiny/unet"), tap, DType::F32, &Device::Cpu).err().unwrap();
        assert_eq!(error.to_string(), format!("this U-Net has no tap `{tap}`; it has {names}"));
    }
    let unet = tiny_unet("sd1", DType::F32);
    let text = unet.text(&values(1, (1, 5, 32))).unwrap();
    for tap in [Tap::Down(4), Tap::Up(4)] {
        let error = unet.forward_to(&values(2, (1, 4, 8, 8)), &[1.], &text, tap).err().unwrap();
        assert_eq!(error.to_string(), format!("tap {tap} is not loaded"));
    }
}

#[test]
fn inputs_of_the_wrong_shape() {
    let unet = tiny_unet("sd1", DType::F32);
    for shape in [vec![1, 5, 31], vec![5, 32], vec![32], vec![1, 0, 32], vec![0, 5, 32]] {
        let message = unet.text(&values(1, shape.clone())).err().unwrap().to_string();
        assert!(message.contains(&format!("text embeddings have shape {shape:?}")), "{message}");
    }
    let text = unet.text(&values(1, (2, 5, 32))).unwrap();
    for shape in
        [vec![2, 3, 8, 8], vec![4, 8, 8], vec![2, 4, 0, 8], vec![2, 4, 64], vec![2, 4, 8, 8, 1], vec![0, 4, 8, 8]]
    {
        let message = unet.forward(&values(2, shape.clone()), &[1., 2.], &text).unwrap_err().to_string();
        assert_eq!(message, format!("latents have shape {shape:?}, expected [batch, 4, h, w]"));
    }
    let run = |batch: usize, timesteps: &[f64]| {
        unet.forward(&values(2, (batch, 4, 8, 8)), timesteps, &text).unwrap_err().to_string()
    };
    assert_eq!(run(2, &[1.]), "1 timesteps for a batch of 2");
    assert_eq!(run(2, &[1.; 3]), "3 timesteps for a batch of 2");
    assert_eq!(run(1, &[1.]), "2 texts for a batch of 1");
    assert_eq!(run(3, &[1.; 3]), "2 texts for a batch of 3");

    for shape in [vec![2, 32, 1, 2], vec![1, 32, 1, 1], vec![2, 16, 1, 1], vec![2, 32]] {
        let (_, tape) = unet.forward_to(&values(2, (2, 4, 8, 8)), &[1., 2.], &text, Tap::Mid).unwrap();
        assert_eq!((tape.tap(), tape.activation_shape()), (Some(Tap::Mid), &[2, 32, 1, 1][..]));
        let message = unet.vjp(tape, &values(3, shape.clone())).unwrap_err().to_string();
        assert_eq!(message, format!("cotangent has shape {shape:?}, the activation [2, 32, 1, 1]"));
    }
    for (start, len) in [(0, 3), (2, 1), (5, 0)] {
        assert!(text.rows(start, len).is_err(), "rows {start} and {len} more of 2");
    }
}

#[test]
fn a_partially_loaded_unet_says_what_it_cannot_do() {
    let unet = UNet::load_to(&committed("sd1-tiny/unet"), "mid", DType::F32, &Device::Cpu).unwrap();
    let text = unet.text(&values(1, (1, 5, 32))).unwrap();
    let latents = values(2, (1, 4, 8, 8));
    let message = unet.forward(&latents, &[1.], &text).unwrap_err().to_string();
    assert_eq!(message, "this U-Net was loaded up to a tap only and cannot predict noise");
    let message = unet.forward_to(&latents, &[1.], &text, Tap::Up(0)).err().unwrap().to_string();
    assert_eq!(message, "tap up0 is not loaded");
    unet.forward_to(&latents, &[1.], &text, Tap::Mid).map(drop).unwrap();
}
