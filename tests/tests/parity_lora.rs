//! LoRA files in every layout: merged weights against PyTorch's, stacks, what is not applied, and what is refused.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use diffusion::lora::{LoraFile, LoraLayout, stack};
use diffusion::{LoraEntry, UNet};
use tests::dpt::scratch;
use tests::{FAMILIES, assert_close, bits, case, device, parity, relative_error, tiny_unet, values};

fn open(path: &Path) -> diffusion::Result<LoraFile> {
    LoraFile::open(path, device())
}

/// Merges the entries and holds every projection against `merged`, which names those that change.
fn assert_merged(what: &str, unet: &mut UNet, entries: &[LoraEntry], merged: &HashMap<String, Tensor>) {
    let plain: Vec<_> = unet.projections().map(|(module, weight)| (module, weight.clone())).collect();
    unet.merge_lora(entries, 1.).unwrap();
    let mut changed = 0;
    for ((module, weight), (_, before)) in unet.projections().zip(plain) {
        match merged.get(&format!("{module}.weight")) {
            Some(expected) => {
                assert!(relative_error(&before, expected) > 1e-2, "{what} {module}: the change is too small");
                assert_close(&format!("{what} {module}"), weight, expected, 1e-6);
                changed += 1;
            }
            None => assert_eq!(relative_error(weight, &before), 0., "{what} {module}"),
        }
    }
    assert_eq!(changed, merged.len());
}

#[test]
fn parity_of_merged_weights_in_both_layouts() {
    for family in FAMILIES {
        let merged = case(&format!("{family}-cases/lora_merged.safetensors"));
        for layout in [LoraLayout::Peft, LoraLayout::Kohya] {
            let file = open(&parity(&format!("{family}-cases/lora_{layout}.safetensors"))).unwrap();
            assert_eq!(file.layouts, [layout].into());
            assert!(file.not_applied.is_empty() && file.warning().is_none());
            let folder = parity(&format!("{family}-tiny/unet"));
            let mut unet = UNet::load(&folder, DType::F32, device()).unwrap();
            assert_merged(&format!("{family} {layout}"), &mut unet, &file.entries, &merged);
        }
    }
}

/// Rank and alpha of PEFT's own files are in the header: 2 and 6, 4 and 1, 4 and 6.
#[test]
fn parity_with_rank_and_alpha_in_the_header() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("parity-more");
    let file = open(&folder.join("lora_peft_header.safetensors")).unwrap();
    let merged = candle_core::safetensors::load(folder.join("lora_peft_header_merged.safetensors"), device()).unwrap();
    assert_merged("header", &mut tiny_unet("sd1", DType::F32), &file.entries, &merged);
    let mut scales: Vec<_> = file.entries.iter().map(|entry| entry.scale).collect();
    scales.sort_by(f64::total_cmp);
    assert_eq!(scales, [0.25, 1.5, 3.]);
    assert_eq!(file.not_applied.len(), 1);
    assert!(file.warning().unwrap().contains("ff.net.2 (feed-forward)"), "{:?}", file.warning());
}

#[test]
fn the_release_is_read_from_safetensors_and_pickle() {
    let of = |name: &str| {
        let path = parity(&format!("sd1-cases/{name}"));
        let checkpoint = diffusion::Checkpoint::open(&path, DType::F32, device()).unwrap();
        LoraFile::read(&checkpoint).unwrap()
    };
    let (a, b) = (of("release_mid.safetensors"), of("release_mid.bin"));
    assert_eq!((&a.layouts, a.entries.len()), (&[LoraLayout::Release].into(), b.entries.len()));
    for (a, b) in a.entries.iter().zip(&b.entries) {
        assert_eq!((&a.module, a.scale, bits(&a.up), bits(&a.down)), (&b.module, 1., bits(&b.up), bits(&b.down)));
    }
}

/// Two files that change some modules both and some alone.
fn two_files() -> [Vec<LoraEntry>; 2] {
    ["sd1-cases/lora_peft.safetensors", "sd1-cases/release_mid.safetensors"].map(|name| {
        let checkpoint = diffusion::Checkpoint::open(&parity(name), DType::F32, device()).unwrap();
        LoraFile::read(&checkpoint).unwrap().entries
    })
}

#[test]
fn a_stack_is_one_file_after_the_other() {
    let [a, b] = two_files();
    let mut expected = tiny_unet("sd1", DType::F32);
    expected.merge_lora(&a, 0.5).unwrap();
    expected.merge_lora(&b, -2.).unwrap();
    let before: BTreeMap<_, _> = tiny_unet("sd1", DType::F32).projections().map(|(m, w)| (m, bits(w))).collect();
    for stacked in [[(a.clone(), 0.5), (b.clone(), -2.)], [(b.clone(), -2.), (a.clone(), 0.5)]] {
        let entries = stack(&stacked).unwrap();
        let modules: Vec<_> = entries.iter().map(|entry| &entry.module).collect();
        assert!(modules.windows(2).all(|pair| pair[0] < pair[1]), "each module once");
        let mut unet = tiny_unet("sd1", DType::F32);
        unet.merge_lora(&entries, 1.).unwrap();
        for ((module, weight), (_, expected)) in unet.projections().zip(expected.projections()) {
            assert_close(&module, weight, expected, 1e-6);
        }
        unet.restore_lora();
        assert!(unet.projections().all(|(module, weight)| before[&module] == bits(weight)));
    }
    // One file alone is as it was read.
    for (entry, alone) in a.iter().zip(stack(&[(a.clone(), 0.5)]).unwrap()) {
        assert_eq!((bits(&entry.up), bits(&entry.down)), (bits(&alone.up), bits(&alone.down)));
        assert_eq!(entry.scale * 0.5, alone.scale);
    }
}

#[test]
fn merging_leaves_no_trace_also_stacked_and_when_it_fails() {
    for dtype in [DType::F32, DType::F16] {
        let mut unet = tiny_unet("sd1", dtype);
        let weights =
            |unet: &UNet| unet.projections().map(|(module, weight)| (module, bits(weight))).collect::<Vec<_>>();
        let before = weights(&unet);
        let [a, b] = two_files();
        unet.merge_lora(&a, 1.).unwrap();
        unet.merge_lora(&b, 0.3).unwrap();
        let merged = weights(&unet);
        assert_ne!(merged, before);
        // An entry that does not fit, behind others that do.
        let wrong = LoraEntry { up: values(1, (3, 3)), ..b[0].clone() };
        let error = unet.merge_lora(&[b.clone(), vec![wrong]].concat(), 1.).unwrap_err().to_string();
        assert!(error.contains("do not fit") && weights(&unet) == merged, "{error}");
        unet.restore_lora();
        assert!(weights(&unet) == before, "{dtype:?}");
    }
}

/// A safetensors file of these tensors.
fn file(name: &str, tensors: &[(&str, &[usize])]) -> PathBuf {
    let path = scratch(name).join("lora.safetensors");
    let tensor = |(i, (name, shape)): (usize, &(&str, &[usize]))| (name.to_string(), values(i as u32, *shape));
    let tensors: HashMap<_, _> = tensors.iter().enumerate().map(tensor).collect();
    candle_core::safetensors::save(&tensors, &path).unwrap();
    path
}

const ATTENTION: &str = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q";

#[test]
fn what_is_not_applied_is_named() {
    let down = |stem: &str| format!("{stem}.lora_down.weight");
    let up = |stem: &str| format!("{stem}.lora_up.weight");
    let conv = "lora_unet_down_blocks_0_resnets_0_conv1";
    let text = "lora_te_text_model_encoder_layers_0_mlp_fc1";
    let names = [down(ATTENTION), up(ATTENTION), down(conv), up(conv), format!("{conv}.alpha"), down(text), up(text)];
    let shapes: [&[usize]; 7] =
        [&[2, 32, 1, 1], &[32, 2, 1, 1], &[2, 16, 3, 3], &[16, 2, 1, 1], &[], &[2, 32], &[64, 2]];
    let tensors: Vec<_> = names.iter().map(String::as_str).zip(shapes).collect();
    let found = open(&file("lora_not_applied", &tensors)).unwrap();
    assert_eq!(found.entries.len(), 1);
    assert_eq!((found.entries[0].down.dims(), found.entries[0].up.dims()), (&[2, 32][..], &[32, 2][..]));
    let left: Vec<_> = found.not_applied.iter().map(|left| (left.module.as_str(), left.reason)).collect();
    assert_eq!(
        left,
        [
            ("down_blocks.0.resnets.0.conv1", "convolution"),
            ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "text encoder"),
        ]
    );
}

#[test]
fn what_cannot_be_read_is_named() {
    let (down, up) = (format!("{ATTENTION}.lora_down.weight"), format!("{ATTENTION}.lora_up.weight"));
    let (alpha, hada) = (format!("{ATTENTION}.alpha"), format!("{ATTENTION}.hada_w1_a"));
    let twin = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight";
    let pair: [(&str, &[usize]); 2] = [(&down, &[2, 32]), (&up, &[32, 2])];
    let refused = |name: &str, tensors: &[(&str, &[usize])], named: &[&str]| {
        let message = open(&file(name, tensors)).unwrap_err().to_string();
        assert!(named.iter().all(|part| message.contains(part)), "{message}");
    };
    refused("lora_half", &pair[..1], &["attn1.to_q", "no up factor"]);
    refused("lora_other_half", &pair[1..], &["attn1.to_q", "no down factor"]);
    refused("lora_ranks", &[pair[0], (&up, &[32, 3])], &["rank 3", "the down factor 2"]);
    refused("lora_vector", &[(&down, &[64]), pair[1]], &["[64]", "expected a matrix"]);
    refused("lora_conv", &[(&down, &[2, 32, 3, 3]), pair[1]], &["[2, 32, 3, 3]", "expected a matrix"]);
    refused("lora_alpha", &[pair[0], pair[1], (&alpha, &[3])], &["[3]", "expected a number"]);
    refused("lora_loha", &[pair[0], pair[1], (&hada, &[2, 2])], &["hada_w1_a", "LoHa"]);
    refused("lora_twice", &[pair[0], pair[1], (twin, &[2, 32])], &[twin, &down, "both for"]);
    refused("lora_strange", &[pair[0], pair[1], ("strange.weight", &[1])], &["unexpected", "`strange.weight`"]);
    refused("lora_none", &[("strange.weight", &[1])], &["holds no LoRA weights"]);
    let nowhere = ["unet.blocks.0.fused.lora_A.weight", "unet.blocks.0.fused.lora_B.weight"];
    refused("lora_nowhere", &[(nowhere[0], &[2, 4]), (nowhere[1], &[4, 2])], &["`blocks.0.fused` is no module"]);
    assert!(open(Path::new("absent.safetensors")).unwrap_err().to_string().contains("absent.safetensors"));
}
