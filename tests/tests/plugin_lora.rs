//! The plugin's LoRA: what hosts are given, what a merge makes of a weight, and the files.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use half::f16;
use host_api::host::InstanceLora;
use host_api::plugin::LoraLayout;
use host_api::{Status, ViewMut};
use serde_json::{Value, json};
use tests::dpt::{Texts, adapter, corrected, create, float_bits, host_config, own_config, running, scratch};
use tests::hosts::plain;
use tests::{assert_close, bits, device, tiny_unet};

fn lora(more: Value) -> InstanceLora {
    create(plain(), &host_config(more)).unwrap().lora().unwrap().unwrap()
}

fn load(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, device()).unwrap()
}

/// The released file's factors by diffusers module: (down, up).
fn released() -> HashMap<String, (Tensor, Tensor)> {
    let tensors = load(&adapter());
    let entry = |name: &String| {
        let stem = name.strip_suffix("_lora.down.weight")?;
        let module = stem.strip_prefix("unet.")?.replace(".processor.", ".");
        let module = module.strip_suffix("to_out").map(|stem| format!("{stem}to_out.0")).unwrap_or(module);
        Some((module, (tensors[name].clone(), tensors[&format!("{stem}_lora.up.weight")].clone())))
    };
    tensors.keys().filter_map(entry).collect()
}

/// The released file in two: the adapter alone, and the LoRA alone, its numbers times `factor`.
fn split(folder: &Path, factor: f64) -> (std::path::PathBuf, std::path::PathBuf) {
    let (lora, adapter): (HashMap<_, _>, HashMap<_, _>) =
        load(&adapter()).into_iter().partition(|(name, _)| name.starts_with("unet."));
    let scale = |(name, tensor): (String, Tensor)| {
        let tensor = if name.ends_with("up.weight") { (tensor * factor).unwrap() } else { tensor };
        (name, tensor)
    };
    let (alone, entries) = (folder.join("adapter.safetensors"), folder.join("lora.safetensors"));
    candle_core::safetensors::save(&adapter, &alone).unwrap();
    candle_core::safetensors::save(&lora.into_iter().map(scale).collect(), &entries).unwrap();
    (alone, entries)
}

#[test]
fn entries_are_the_released_tensors() {
    let expected = released();
    let unet = tiny_unet("sd1", DType::F32);
    for strength in [1., 0.25] {
        let lora = lora(json!({"lora_strength": strength}));
        let entries = lora.entries().unwrap();
        assert!(lora.count() as usize == expected.len() && entries.len() == expected.len());
        for entry in &entries {
            let (down, up) = &expected[&entry.module];
            assert_eq!(float_bits(&entry.down), bits(down), "{}", entry.module);
            assert_eq!(float_bits(&entry.up), bits(up), "{}", entry.module);
            assert_eq!((entry.rank, entry.scale), (down.dim(0).unwrap(), strength));
        }
        // The modules are the U-Net's attention projections, each once.
        let mut modules: Vec<_> = entries.iter().map(|entry| entry.module.clone()).collect();
        let mut projections: Vec<_> = unet.projections().map(|(path, _)| path).collect();
        modules.sort();
        projections.sort();
        assert_eq!(modules, projections);
    }
}

#[test]
fn a_merge_adds_the_product() {
    let expected = released();
    let lora = lora(json!({"lora_strength": 0.5}));
    let unet = tiny_unet("sd1", DType::F32);
    let weights: HashMap<_, _> = unet.projections().collect();
    for (index, entry) in lora.entries().unwrap().iter().enumerate() {
        let weight = weights[&entry.module];
        let (down, up) = &expected[&entry.module];
        let sum = (weight + (up.matmul(down).unwrap() * (0.5 * 3.)).unwrap()).unwrap();
        let mut numbers = weight.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut view = ViewMut::new(&mut numbers, weight.dims()).unwrap();
        lora.merge(index as u64, 3., &mut view).unwrap();
        let merged = Tensor::from_slice(&numbers, weight.shape(), device()).unwrap();
        assert_close(&entry.module, &merged, &sum, 1e-6);
        assert_ne!(bits(&merged), bits(weight));

        // The same in half precision, rounded once.
        let halves = |t: &Tensor| t.to_dtype(DType::F16).unwrap().flatten_all().unwrap().to_vec1::<f16>().unwrap();
        let mut stored = halves(weight);
        let wide: Vec<f32> = stored.iter().map(|v| v.to_f32()).collect();
        let mut wide_sum = wide.clone();
        lora.merge(index as u64, 3., &mut ViewMut::new(&mut wide_sum, weight.dims()).unwrap()).unwrap();
        lora.merge(index as u64, 3., &mut ViewMut::new(&mut stored, weight.dims()).unwrap()).unwrap();
        let rounded: Vec<f16> = wide_sum.iter().map(|v| f16::from_f32(*v)).collect();
        assert_eq!(stored, rounded);
    }
    let mut wrong = [0f32; 12];
    let error = lora.merge(0, 1., &mut ViewMut::new(&mut wrong, &[3, 4]).unwrap()).unwrap_err();
    assert!(error.status == Status::ShapeMismatch && error.message.contains("[3, 4]"), "{error}");
    let error = lora.merge(9999, 1., &mut ViewMut::new(&mut wrong, &[3, 4]).unwrap()).unwrap_err();
    assert_eq!((error.status, wrong), (Status::InvalidArgument, [0.; 12]));
}

#[test]
fn written_files_hold_the_entries() {
    let folder = scratch("plugin_lora_write");
    let lora = lora(json!({"lora_strength": 0.5}));
    for (layout, name) in [(LoraLayout::Peft, "peft.safetensors"), (LoraLayout::Kohya, "kohya.safetensors")] {
        let path = folder.join(name);
        // Over an older file too.
        std::fs::write(&path, "old").unwrap();
        lora.write(&path, layout).unwrap();
        let tensors = load(&path);
        let entries = lora.entries().unwrap();
        let alphas = if layout == LoraLayout::Kohya { entries.len() } else { 0 };
        assert_eq!(tensors.len(), 2 * entries.len() + alphas);
        // What readers make of the file is what the plugin has, alpha included.
        let read = diffusion::lora::LoraFile::open(&path, device()).unwrap().entries;
        assert!(read.iter().all(|entry| entry.scale == 0.5) && read.len() == entries.len());
        let header = diffusion::Checkpoint::open(&path, DType::F32, device()).unwrap().metadata().unwrap();
        assert_eq!(header.contains_key("lora_adapter_metadata"), layout == LoraLayout::Peft);
        for entry in &entries {
            let (stem, down, up) = match layout {
                LoraLayout::Peft => (format!("unet.{}", entry.module), "lora_A", "lora_B"),
                LoraLayout::Kohya => (format!("lora_unet_{}", entry.module.replace('.', "_")), "lora_down", "lora_up"),
            };
            let (down, up) = (&tensors[&format!("{stem}.{down}.weight")], &tensors[&format!("{stem}.{up}.weight")]);
            assert_eq!(
                (down.dims(), up.dims()),
                (&[entry.rank, entry.in_features][..], &[entry.out_features, entry.rank][..])
            );
            assert_eq!((bits(down), bits(up)), (float_bits(&entry.down), float_bits(&entry.up)));
            let alpha = tensors.get(&format!("{stem}.alpha")).map(|alpha| alpha.to_scalar::<f32>().unwrap());
            assert_eq!(alpha, (layout == LoraLayout::Kohya).then_some(0.5 * entry.rank as f32));
        }
    }
    let error = lora.write(&folder.join("absent/lora.safetensors"), LoraLayout::Peft).unwrap_err();
    assert!(error.status == Status::NotFound && error.message.contains("absent"), "{error}");
    let mut left: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["kohya.safetensors", "peft.safetensors"]);
}

#[test]
fn a_lora_of_its_own_replaces_the_adapters() {
    let (alone, doubled) = split(&scratch("plugin_lora_split"), 2.);
    let scales = |lora: InstanceLora| -> Vec<(String, Vec<u32>)> {
        lora.entries().unwrap().into_iter().map(|entry| (entry.module, float_bits(&entry.up))).collect()
    };
    assert_eq!(lora(json!({"adapter": alone})).count(), 0);
    let (own, other) = (scales(lora(json!({}))), scales(lora(json!({"lora": doubled}))));
    assert_ne!(own, other);
    assert_eq!(scales(lora(json!({"adapter": alone, "lora": doubled}))), other);

    // The plugin's own U-Net sees them: twice the factors at half the strength are the same weights.
    let step = |more: Value| corrected(&mut running(plain(), &own_config(more), &Texts::of(&[0, 2])), 0);
    let expected = step(json!({}));
    assert_eq!(float_bits(&step(json!({"lora": doubled, "lora_strength": 0.5}))), float_bits(&expected));
    assert_ne!(float_bits(&step(json!({"lora": doubled}))), float_bits(&expected));
    assert_eq!(float_bits(&step(json!({"lora_strength": 0}))), float_bits(&step(json!({"adapter": alone}))));

    let error = create(plain(), &host_config(json!({"lora": alone}))).unwrap_err();
    assert!(error.status == Status::InvalidData && error.message.contains("adapter.safetensors"), "{error}");
}

/// Files in other layouts, with strengths of their own; each module comes once.
#[test]
fn several_files_are_stacked() {
    let (alone, release) = split(&scratch("plugin_lora_stack"), 1.);
    let kohya = tests::committed("sd1-cases/lora_kohya.safetensors");
    let peft = tests::committed("sd1-cases/lora_peft.safetensors");
    let of = |more: Value| {
        let entries = lora(more).entries().unwrap();
        let product = |entry: &host_api::plugin::LoraEntry| {
            let factor = |values: &[f32], rows, columns| Tensor::from_slice(values, (rows, columns), device()).unwrap();
            let down = factor(&entry.down, entry.rank, entry.in_features);
            (factor(&entry.up, entry.out_features, entry.rank).matmul(&down).unwrap() * entry.scale).unwrap()
        };
        entries.iter().map(|entry| (entry.module.clone(), product(entry))).collect::<HashMap<_, _>>()
    };
    let own = of(json!({}));
    let other = of(json!({"adapter": alone, "lora": kohya}));
    let both = json!([{"path": peft, "strength": 0.5}, release]);
    let stacked = of(json!({"adapter": alone, "lora": both, "lora_strength": 2}));
    assert_eq!((other.len(), stacked.len()), (4, own.len()));
    for (module, product) in &stacked {
        let expected = (&own[module] * 2.).unwrap();
        let expected = other.get(module).map_or(Ok(expected.clone()), |other| &expected + other).unwrap();
        assert_close(module, product, &expected, 1e-5);
    }
    for (wrong, named) in [
        (json!({"path": "a", "strengt": 1}), "a LoRA is a path"),
        (json!([{"strength": 1}]), "a LoRA is a path"),
        (json!(3), "a LoRA is a path"),
    ] {
        let error = create(plain(), &host_config(json!({"lora": wrong}))).unwrap_err();
        assert!(error.status == Status::InvalidConfig && error.message.contains(named), "{error}");
    }
}
