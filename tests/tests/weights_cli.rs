//! `weights inspect` and `weights convert`: what files are, and LoRA there and back, tensor for tensor and bit for bit.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{DType, Device, Tensor};
use diffusion::Checkpoint;
use diffusion::lora::LoraFile;
use serde_json::{Value, json};
use tests::dpt::scratch;
use tests::{committed, values, weights_program};

fn weights(words: &[&str]) -> Output {
    Command::new(weights_program()).args(words).env("RAYON_NUM_THREADS", "2").output().unwrap()
}

#[track_caller]
fn done(words: &[&str]) -> String {
    let done = weights(words);
    assert!(done.status.success(), "{words:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

#[track_caller]
fn refused(words: &[&str], named: &[&str]) {
    let done = weights(words);
    let message = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(1), "{words:?}: {message}");
    assert!(message.starts_with("error: ") && named.iter().all(|part| message.contains(part)), "{words:?}: {message}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn inspect(path: &Path) -> Value {
    serde_json::from_str(&done(&["inspect", text(path), "--json"])).unwrap()
}

/// Type, shape and bytes of every tensor, and the header's texts.
type Content = (BTreeMap<String, (String, Vec<usize>, Vec<u8>)>, BTreeMap<String, String>);

fn content(path: &Path) -> Content {
    let file = Checkpoint::open(path, DType::F32, &Device::Cpu).unwrap();
    let tensor = |name: String| {
        let raw = file.raw(&name).unwrap();
        let stored = (format!("{:?}", raw.dtype), raw.shape.clone(), raw.data.to_vec());
        (name, stored)
    };
    (file.names().into_iter().map(tensor).collect(), file.metadata().unwrap())
}

#[test]
fn files_are_what_they_are() {
    let adapter = inspect(&committed("sd1-cases/release_up1.bin"));
    assert_eq!(adapter["kinds"], json!(["DPT adapter", "LoRA"]));
    assert_eq!(adapter["adapter"]["tap"], Value::Null);
    assert!(adapter["adapter"]["problem"].as_str().unwrap().contains("`heads`"), "{adapter}");
    assert_eq!(adapter["unknown"], json!([]));
    assert_eq!((&adapter["lora"]["layouts"], &adapter["lora"]["ranks"]), (&json!(["release"]), &json!({"4": 128})));

    let shipped = host_demo::default_model().unwrap();
    let own = inspect(&shipped.join("adapter_stage1.safetensors"));
    assert_eq!(own["kinds"], json!(["DPT adapter"]));
    let expected = json!({
        "tap": "mid", "channels": 128, "width": 128, "heads": 8, "feedforward": 256, "encoder_layers": 1,
        "decoder_layers": 1, "matching_queries": 8, "grounding_queries": 12, "text_width": 128, "classes": 1,
    });
    assert_eq!(
        (&own["adapter"], &own["unknown"], &own["dtypes"]),
        (&expected, &json!([]), &json!({"f32": own["tensors"]}))
    );

    let kohya = inspect(&committed("sd1-cases/lora_kohya.safetensors"));
    assert_eq!((&kohya["kinds"], &kohya["lora"]["layouts"]), (&json!(["LoRA"]), &json!(["kohya"])));
    assert_eq!((&kohya["lora"]["ranks"], &kohya["lora"]["scales"]), (&json!({"3": 4}), &json!([2.0])));
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("parity-more/lora_peft_header.safetensors");
    let peft = inspect(&header);
    assert_eq!(peft["lora"]["not_applied"][0]["reason"], "feed-forward");
    assert!(peft["metadata"]["lora_adapter_metadata"].as_str().unwrap().contains("alpha_pattern"));

    let folder = inspect(&committed("sd2-tiny"));
    assert_eq!((&folder["kinds"], &folder["family"]), (&json!(["diffusers pipeline"]), &json!("sd2")));
    assert_eq!(folder["model"]["taps"].as_array().unwrap().len(), 9);
    for (part, kind) in [
        ("unet/diffusion_pytorch_model", "U-Net of a diffusers folder"),
        ("vae/diffusion_pytorch_model", "autoencoder of a diffusers folder"),
        ("text_encoder/model", "text encoder of a diffusers folder"),
    ] {
        assert_eq!(inspect(&committed(&format!("sd2-tiny/{part}.safetensors")))["kinds"], json!([kind]));
    }
    let scratch = scratch("weights_inspect");
    let strange = scratch.join("strange.safetensors");
    candle_core::safetensors::save(&HashMap::from([("strange", values(1, 3))]), &strange).unwrap();
    let strange = inspect(&strange);
    assert_eq!((&strange["kinds"], &strange["unknown"]), (&json!(["unknown"]), &json!(["strange"])));

    // For people, the same in lines.
    let table = done(&["inspect", text(&committed("sd1-cases/release_up1.bin"))]);
    for line in ["is ", "DPT adapter and LoRA", "not in the file: configure `tap`", "LoRA: ranks"] {
        assert!(table.contains(line), "{line} in\n{table}");
    }
    refused(&["inspect", "absent.safetensors"], &["absent.safetensors", "No such file"]);
    refused(&["inspect", text(&scratch)], &["no `model_index.json`"]);
}

/// A LoRA of ranks and alphas that differ from module to module, in one type of number.
fn random_lora(path: &Path, dtype: DType, seed: u32, powers_of_two: bool) {
    let file = LoraFile::read(
        &Checkpoint::open(&committed("sd1-cases/release_mid.safetensors"), DType::F32, &Device::Cpu).unwrap(),
    );
    let mut tensors = HashMap::new();
    for (i, entry) in file.unwrap().entries.iter().enumerate().step_by(5) {
        let rank = [1, 2, 4, 3][(i / 5 + seed as usize) % 4];
        let (inputs, outputs) = (entry.down.dim(1).unwrap(), entry.up.dim(0).unwrap());
        let factor = |seed, shape: (usize, usize)| values(seed, shape).to_dtype(dtype).unwrap();
        let stem = format!("lora_unet_{}", entry.module.replace('.', "_"));
        tensors.insert(format!("{stem}.lora_down.weight"), factor(seed + i as u32, (rank, inputs)));
        tensors.insert(format!("{stem}.lora_up.weight"), factor(seed + i as u32 + 500, (outputs, rank)));
        let scale = if powers_of_two { [0.5, 1., 2., 8.][i / 5 % 4] } else { [0.3, 1., 5., 0.7][i / 5 % 4] };
        if i % 2 == 0 {
            let alpha = Tensor::new((scale * rank as f64) as f32, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            tensors.insert(format!("{stem}.alpha"), alpha);
        }
    }
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// Converts along `layouts`; the file after each.
fn along(folder: &Path, start: &Path, layouts: &[&str]) -> Vec<PathBuf> {
    let mut files = vec![start.to_owned()];
    for (i, layout) in layouts.iter().enumerate() {
        let next = folder.join(format!("{i}-{layout}.safetensors"));
        done(&["convert", text(&files[i]), text(&next), "--to", layout, "--force"]);
        files.push(next);
    }
    files
}

/// What merging a file would add to each weight.
fn products(path: &Path) -> BTreeMap<String, Tensor> {
    let file = LoraFile::open(path, &Device::Cpu).unwrap();
    let product = |entry: &diffusion::LoraEntry| (entry.up.matmul(&entry.down).unwrap() * entry.scale).unwrap();
    file.entries.iter().map(|entry| (entry.module.clone(), product(entry))).collect()
}

#[test]
fn lora_goes_there_and_back_bit_for_bit() {
    let folder = scratch("weights_cycles");
    for (seed, dtype) in [(0, DType::F32), (1, DType::F16), (2, DType::BF16)] {
        let start = folder.join("start.safetensors");
        random_lora(&start, dtype, seed, true);
        for layouts in [
            &["peft", "kohya"][..],
            &["release", "kohya"],
            &["peft", "release", "kohya"],
            &["release", "peft", "release", "kohya"],
        ] {
            let files = along(&folder, &start, layouts);
            assert_eq!(content(files.last().unwrap()), content(&start), "{dtype:?} {layouts:?}");
            // And every file on the way means the same.
            for file in &files {
                let (found, expected) = (products(file), products(&start));
                assert!(found.keys().eq(expected.keys()));
                for (module, product) in &found {
                    tests::assert_close(module, product, &expected[module], 1e-6);
                }
            }
        }
        // Any alpha between the layouts that have one.
        random_lora(&start, dtype, seed, false);
        let files = along(&folder, &start, &["peft", "kohya"]);
        assert_eq!(content(&files[2]), content(&start), "{dtype:?}");
        refused(
            &["convert", text(&start), text(&folder.join("lossy.safetensors")), "--to", "release"],
            &["has alpha", "cannot be folded", "use peft or kohya"],
        );
    }
    assert!(!folder.join("lossy.safetensors").exists());
}

/// diffusers reads alpha from PEFT's header entry alone: a file that is written has it there as well.
#[test]
fn a_peft_file_says_alpha_in_its_header() {
    let folder = scratch("weights_peft_header");
    let start = committed("sd1-cases/lora_kohya.safetensors");
    let files = along(&folder, &start, &["peft", "kohya"]);
    let entry: Value = serde_json::from_str(&content(&files[1]).1["lora_adapter_metadata"]).unwrap();
    assert_eq!((&entry["unet.r"], &entry["unet.lora_alpha"]), (&json!(3), &json!(6.)));
    let module = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k";
    assert_eq!((&entry["unet.rank_pattern"][module], &entry["unet.alpha_pattern"][module]), (&json!(3), &json!(6.)));
    assert_eq!(content(&files[2]), content(&start));
}

/// PEFT's own files keep rank and alpha in the header, and so they do when they come back.
#[test]
fn a_headers_alpha_goes_there_and_back() {
    let folder = scratch("weights_header");
    let start = Path::new(env!("CARGO_MANIFEST_DIR")).join("parity-more/lora_peft_header.safetensors");
    let files = along(&folder, &start, &["kohya", "peft"]);
    assert_eq!(content(&files[2]), content(&start));
    let (kohya, expected) = (products(&files[1]), products(&start));
    for (module, product) in &kohya {
        tests::assert_close(module, product, &expected[module], 1e-6);
    }
    // The feed-forward is carried where the layout has names for it, and left out of the release only when told to.
    assert_eq!(inspect(&files[1])["lora"]["not_applied"][0]["reason"], "feed-forward");
    let out = folder.join("release.safetensors");
    refused(&["convert", text(&start), text(&out), "--to", "release", "--drop"], &["alpha 6", "rank 4"]);
    refused(
        &["convert", text(&start), text(&out), "--to", "release"],
        &["no names for 1 module", "ff.net.2", "--drop"],
    );
}

#[test]
fn an_adapter_beside_the_lora_is_kept() {
    let folder = scratch("weights_rest");
    for name in ["release_mid.bin", "release_mid.safetensors"] {
        let start = committed(&format!("sd1-cases/{name}"));
        let [lora, rest, back] = ["lora", "rest", "back"].map(|name| folder.join(format!("{name}.safetensors")));
        let words = ["convert", text(&start), text(&lora), "--to", "peft", "--force"];
        refused(&words, &["no LoRA weights", "--rest"]);
        done(&[&words[..], &["--rest", text(&rest)]].concat());
        assert_eq!(inspect(&lora)["kinds"], json!(["LoRA"]));
        assert_eq!(inspect(&rest)["kinds"], json!(["DPT adapter"]));
        done(&["convert", text(&lora), text(&back), "--to", "release", "--with", text(&rest), "--force"]);
        assert_eq!(content(&back).0, content(&start).0);
    }
    // The same tensors under the same names, from a pickle.
    let (pickle, out) = (committed("sd1-cases/release_mid.bin"), folder.join("same.safetensors"));
    done(&["convert", text(&pickle), text(&out), "--to", "safetensors"]);
    assert_eq!(content(&out).0, content(&committed("sd1-cases/release_mid.safetensors")).0);
    // And a safetensors file with its header.
    let shipped = host_demo::default_model().unwrap().join("adapter_stage1.safetensors");
    done(&["convert", text(&shipped), text(&out), "--to", "safetensors", "--force"]);
    assert_eq!(content(&out), content(&shipped));
}

#[test]
fn a_converted_lora_draws_the_same_picture() {
    let folder = scratch("weights_draw");
    let start = committed("sd1-cases/lora_kohya.safetensors");
    let files = along(&folder, &start, &["peft", "release"]);
    let model = committed("sd1-tiny");
    let draw = |lora: &Path| {
        let out = text(&folder.join("out.png")).to_owned();
        let words = ["--prompt", "a", "--no-plugin", "--model", text(&model), "--size", "64x64", "--steps", "2"];
        tests::cli::generated(&folder, &[&words[..], &["--lora", text(lora), "--out", &out]].concat());
        tests::cli::Picture::read(Path::new(&out)).pixels
    };
    let expected = draw(&start);
    assert!(files.iter().all(|file| draw(file) == expected));
}

#[test]
fn single_files_are_written_and_told() {
    let folder = scratch("weights_single");
    let out = folder.join("sd1.safetensors");
    done(&["convert", text(&committed("sd1-tiny")), text(&out), "--to", "single-file"]);
    let found = inspect(&out);
    assert_eq!(found["kinds"], json!(["single-file checkpoint"]));
    assert!(found["model"]["problem"].as_str().unwrap().contains("folder with configurations"), "{found}");
    let words = ["--prompt", "a", "--no-plugin", "--size", "64x64", "--steps", "2"];
    let model = committed("sd1-tiny");
    let of = |name: &str, more: &[&str]| {
        tests::cli::generated(&folder, &[&words[..], &["--out", name], more].concat());
        tests::cli::Picture::read(&folder.join(name)).pixels
    };
    let from_folder = of("folder.png", &["--model", text(&model)]);
    assert_eq!(of("file.png", &["--model", text(&out), "--configs", text(&model)]), from_folder);
    assert_ne!(
        of("v.png", &["--model", text(&out), "--configs", text(&model), "--prediction", "v"]),
        from_folder,
        "what the model predicts counts"
    );
    refused(&["convert", text(&out), text(&folder.join("o")), "--to", "single-file"], &["expected a folder"]);
}

#[test]
fn what_cannot_be_converted_is_said_and_leaves_nothing() {
    let folder = scratch("weights_refusals");
    let (kohya, out) = (committed("sd1-cases/lora_kohya.safetensors"), folder.join("out.safetensors"));
    let (kohya, target) = (text(&kohya), text(&out));
    std::fs::write(folder.join("there.safetensors"), "old").unwrap();
    let there = folder.join("there.safetensors");
    refused(&["convert", kohya, text(&there), "--to", "peft"], &["there.safetensors exists", "--force"]);
    assert_eq!(std::fs::read(&there).unwrap(), b"old");
    refused(&["convert", kohya, target, "--to", "safetensors", "--drop"], &["--drop is for the LoRA layouts"]);
    refused(&["convert", kohya, target, "--to", "peft", "--with", kohya], &["--with is for --to release"]);
    let adapter = host_demo::default_model().unwrap().join("adapter_stage1.safetensors");
    refused(&["convert", text(&adapter), target, "--to", "peft"], &["holds no LoRA weights", "weights inspect"]);
    refused(&["convert", "absent", target, "--to", "peft"], &["absent: No such file"]);
    refused(&["convert", kohya, text(&folder.join("no/out")), "--to", "peft"], &["no/"]);
    assert_eq!(weights(&["convert", kohya, target, "--to", "lora"]).status.code(), Some(2));
    // A note that lies.
    let notes = HashMap::from([(
        "dpt_lora_alpha".to_owned(),
        r#"{"nowhere": {"value": 1, "dtype": "F32", "shape": [], "factor": 2}}"#.to_owned(),
    )]);
    let bytes = std::fs::read(kohya).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    safetensors::serialize_to_file(tensors.tensors(), Some(notes), &folder.join("lie.safetensors")).unwrap();
    refused(
        &["convert", text(&folder.join("lie.safetensors")), target, "--to", "peft"],
        &["`nowhere`", "not in the file"],
    );
    // Over itself, when asked to.
    let own = folder.join("own.safetensors");
    std::fs::copy(kohya, &own).unwrap();
    done(&["convert", text(&own), text(&own), "--to", "peft", "--force"]);
    done(&["convert", text(&own), text(&own), "--to", "kohya", "--force"]);
    assert_eq!(content(&own), content(Path::new(kohya)));
    let mut left: Vec<_> =
        std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    left.sort();
    assert_eq!(left, ["lie.safetensors", "own.safetensors", "there.safetensors"]);
}
