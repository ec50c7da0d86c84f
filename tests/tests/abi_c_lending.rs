//! A host in C that lends weights, shows progress and calls the halves of a step, against the same from Rust.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::json;
use tests::cc::{self, Language};
use tests::dpt::{Texts, correct, float_bits, host_config, latents, own_config, running, scratch, step, unet_config};
use tests::hosts::plain;
use tests::{committed, plugin_library, tiny_unet, values};

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn read(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// Writes `<name>.txt` with names and shapes and `<name>.f32` with the numbers.
fn write(folder: &Path, name: &str, tensors: &[(String, Vec<usize>, Vec<f32>)]) {
    let line = |(name, shape, _): &(String, Vec<usize>, Vec<f32>)| {
        let extents: Vec<String> = shape.iter().map(usize::to_string).collect();
        format!("{name} {} {}\n", shape.len(), extents.join(" "))
    };
    std::fs::write(folder.join(format!("{name}.txt")), tensors.iter().map(line).collect::<String>()).unwrap();
    let numbers: Vec<u8> = tensors.iter().flat_map(|(.., values)| bytes(values)).collect();
    std::fs::write(folder.join(format!("{name}.f32")), numbers).unwrap();
}

#[test]
fn a_c_host_lends_and_calls_both_halves() {
    let folder = scratch("c_lending");
    let texts = Texts::of(&[0, 2]);
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let unet = tiny_unet("sd1", DType::F32);
    let weights: Vec<_> = unet
        .weights()
        .iter()
        .map(|(name, weight)| (name.clone(), weight.tensor.dims().to_vec(), flat(&weight.tensor)))
        .collect();
    write(&folder, "tensors", &weights);

    // What the C host is given for the halves: features and the way back of the same step.
    let start = latents(1, 2);
    let context = Tensor::from_slice(&texts.context, &texts.shape, &Device::Cpu).unwrap();
    let z = Tensor::from_slice(&start, (2, 4, 16, 16), &Device::Cpu).unwrap();
    let tap = unet.config().tap("mid").unwrap();
    let (features, _) = unet.forward_to(&z, &[800.; 2], &unet.text(&context).unwrap(), tap).unwrap();
    let gradient = flat(&(values(8, (2, 4, 16, 16)) * 1e-3).unwrap());
    let [batch, tokens, width] = texts.shape;
    let inputs = [
        ("context".into(), vec![batch, tokens, width], texts.context.clone()),
        ("pooled".into(), vec![batch, width], texts.pooled.clone()),
        ("latents".into(), vec![2, 4, 16, 16], start.clone()),
        ("features".into(), features.dims().to_vec(), flat(&features)),
        ("gradient".into(), vec![2, 4, 16, 16], gradient.clone()),
    ];
    write(&folder, "shapes", &inputs);
    for source in ["weights", "split"] {
        let config = host_config(json!({"gradient": source}));
        std::fs::write(folder.join(format!("{source}.json")), config.to_string()).unwrap();
    }
    std::fs::write(folder.join("unet.json"), unet_config(&committed("sd1-tiny"))).unwrap();

    let host = cc::program(Language::C11, &cc::source("lending_host.c"), &folder);
    let done = cc::run(&host, &[plugin_library().as_os_str(), folder.as_os_str()]);
    let printed = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{printed}{}", String::from_utf8_lossy(&done.stderr));
    assert!(printed.ends_with("done\n"), "{printed}");

    // The step is that of the plugin's own U-Net from the file, whose weights these are, without the LoRA.
    let mut own = running(plain(), &own_config(json!({"lora_strength": 0})), &texts);
    let mut expected = start.clone();
    let report = correct(&mut own, &step(0), &mut expected).unwrap();
    assert_eq!(float_bits(&read(&folder.join("stepped.f32"))), float_bits(&expected));
    // And the halves: its scores, and 20 times the gradient.
    let scores = format!("scores {:.6} {:.6}\n", report.items[0].score, report.items[1].score);
    assert!(printed.contains(&scores), "{scores} in {printed}");
    assert!(read(&folder.join("cotangent.f32")).iter().any(|value| *value != 0.));
    let applied = read(&folder.join("applied.f32"));
    for ((found, z), g) in applied.iter().zip(&start).zip(&gradient) {
        assert!((found - (z + 20. * g)).abs() < 1e-6, "{found} from {z} and {g}");
    }
}
