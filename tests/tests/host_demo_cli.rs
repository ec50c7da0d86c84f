//! `host-demo generate` on the shipped model: the pictures, the report, and what is refused.

use std::collections::HashMap;
use std::path::Path;

use candle_core::Device;
use serde_json::{Value, json};
use tests::cli::{Picture, generate, generated};
use tests::dpt::scratch;
use tests::{committed, plugin_library};

const PROMPT: &str = "a red circle to the left of a blue square";

/// A picture of two steps by more words.
fn draw(folder: &Path, name: &str, words: &[&str]) -> Picture {
    let steps: &[&str] = if words.contains(&"--steps") { &[] } else { &["--steps", "2"] };
    generated(folder, &[&["--prompt", PROMPT, "--out", name], steps, words].concat());
    Picture::read(&folder.join(name))
}

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_picture_carries_its_settings_and_a_report_tells_the_rest() {
    let folder = scratch("cli_report");
    let words = ["--steps", "3", "--seed", "5", "--guidance", "3.5", "--eta", "2", "--monitor"];
    let picture = draw_with(&folder, &words, "näive ☃ circle");
    assert_eq!(picture.size, (64, 64));
    assert_eq!(picture.text("prompt"), "näive ☃ circle");
    assert!(picture.pixels.iter().max() > picture.pixels.iter().min());
    let report: Value = serde_json::from_slice(&std::fs::read(folder.join("report.json")).unwrap()).unwrap();
    let mut settings = report["settings"].clone();
    assert_eq!(picture.settings(), settings);
    let (model, library) = (settings["model"].take(), settings["plugin"].take());
    assert!(model.as_str().unwrap().ends_with("weights/shapes"));
    assert_eq!(library, plugin_library().to_str().unwrap());
    let adapter = host_demo::default_adapter().unwrap();
    let expected = json!({
        "prompt": "näive ☃ circle", "negative": "", "model": null, "plugin": null,
        "config": {"adapter": adapter, "eta": 2., "monitor": true}, "scheduler": "ddim", "mode": "paper", "steps": 3, "guidance": 3.5,
        "seed": 5, "batch": 1, "width": 64, "height": 64, "latents": null, "image": null, "strength": null, "prompt_at": [],
        "lora": [], "device": "cpu", "dtype": "f32",
    });
    assert_eq!(settings, expected);

    let steps = report["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 3);
    for (index, step) in steps.iter().enumerate() {
        assert_eq!((&step["index"], &step["outcome"]), (&json!(index), &json!("corrected")));
        let [item] = &step["items"].as_array().unwrap()[..] else { panic!("one item") };
        let number = |key: &str| item[key].as_f64().unwrap();
        assert!(item["status"] == "ok" && number("score").abs() < 1.);
        assert!((number("correction_norm") / number("gradient_norm") - 2.).abs() < 1e-4, "{item}");
        assert!(step["seconds"].as_f64().unwrap() > 0. && step["alpha_bar"].as_f64().unwrap() < 1.);
    }
    let timesteps: Vec<_> = steps.iter().map(|step| step["timestep"].as_f64().unwrap()).collect();
    assert_eq!(timesteps, [667., 334., 1.]);
    let phases = report["seconds"].as_object().unwrap();
    for phase in ["load", "text", "lora", "correction", "unet", "decode"] {
        let seconds = phases[phase].as_f64().unwrap();
        assert!(if phase == "lora" { seconds >= 0. } else { seconds > 0. }, "{phase}");
    }
    assert!(report["plugin_memory_bytes"].as_u64().unwrap() > 1_000_000);
    assert!(!cfg!(target_os = "linux") || report["peak_memory_bytes"].as_u64().unwrap() > 10_000_000);
    // The shipped adapter brings LoRA for each of the four projections of fourteen attentions.
    assert_eq!((&report["lora_entries"], &report["images"]), (&json!(56), &json!(["out.png"])));
    assert_eq!(files(&folder), ["out.png", "report.json"]);
}

/// The default name, with a report.
fn draw_with(folder: &Path, words: &[&str], prompt: &str) -> Picture {
    generated(folder, &[&["--prompt", prompt, "--report", "report.json"], words].concat());
    Picture::read(&folder.join("out.png"))
}

#[test]
fn an_item_of_a_batch_is_the_picture_of_its_own_seed() {
    let folder = scratch("cli_batch");
    generated(&folder, &["--prompt", PROMPT, "--steps", "2", "--batch", "2", "--eta", "4", "--out", "both.png"]);
    assert_eq!(files(&folder), ["both-0.png", "both-1.png"]);
    let [first, second] = [0, 1].map(|item| Picture::read(&folder.join(format!("both-{item}.png"))));
    let alone = draw(&folder, "alone.png", &["--seed", "1", "--eta", "4"]);
    assert!(second.distance(&alone) <= 2 && first.distance(&alone) > 20);
    assert_eq!(second.settings(), alone.settings());
    // The settings are enough to draw it again.
    let again = draw(&folder, "again.png", &["--seed", "1", "--eta", "4"]);
    assert_eq!(again.distance(&alone), 0);
}

#[test]
fn eta_0_is_no_plugin_and_both_gradients_are_one() {
    let folder = scratch("cli_gradients");
    let without = draw(&folder, "without.png", &["--no-plugin"]);
    assert_eq!(without.settings()["plugin"], Value::Null);
    let no_lora = ["--eta", "0", "--config", "{\"lora_strength\": 0}"];
    assert_eq!(draw(&folder, "zero.png", &no_lora).distance(&without), 0);
    assert!(draw(&folder, "lora.png", &["--eta", "0"]).distance(&without) > 1, "the LoRA shows");
    let host = draw(&folder, "host.png", &["--eta", "4", "--gradient", "host"]);
    let plugin = draw(&folder, "plugin.png", &["--eta", "4", "--gradient", "plugin"]);
    assert!(host.distance(&plugin) <= 1);
    assert!(host.distance(&without) > 1, "the correction shows");
    assert_eq!(plugin.settings()["config"]["gradient"], "plugin");
    // The configuration may be a file, and its strength is the same as the option's.
    let adapter = host_demo::default_adapter().unwrap();
    std::fs::write(folder.join("dpt.json"), json!({"adapter": adapter, "eta": 4}).to_string()).unwrap();
    assert_eq!(draw(&folder, "file.png", &["--config", "dpt.json"]).distance(&host), 0);
    assert_eq!(draw(&folder, "text.png", &["--config", "{\"eta\": 4}"]).distance(&host), 0);
}

#[test]
fn latents_from_a_file_are_the_start() {
    let folder = scratch("cli_latents");
    let noise = host_demo::seeded_noise(3, [2, 4, 16, 16], &Device::Cpu).unwrap();
    candle_core::safetensors::save(&HashMap::from([("latents", noise)]), folder.join("start.safetensors")).unwrap();
    generated(&folder, &["--prompt", PROMPT, "--steps", "2", "--latents", "start.safetensors", "--out", "l.png"]);
    for (item, seed) in [("l-0.png", "3"), ("l-1.png", "4")] {
        let picture = Picture::read(&folder.join(item));
        let seeded = draw(&folder, "seeded.png", &["--seed", seed]);
        assert!(picture.distance(&seeded) <= 2, "{item}");
        assert_eq!(picture.settings()["latents"], "start.safetensors");
        assert_eq!(picture.settings()["batch"], 2);
    }
    let wrong = |words: &[&str]| {
        let words = [&["--prompt", PROMPT, "--out", "wrong.png", "--latents", "start.safetensors"], words].concat();
        let done = generate(&folder, &words);
        (done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned())
    };
    let (code, message) = wrong(&["--batch", "3"]);
    assert!(code == Some(1) && message.contains("holds 2 item(s), --batch asks for 3"), "{message}");
    let (code, message) = wrong(&["--size", "64x64"]);
    assert!(code == Some(2) && message.contains("--size"), "{message}");
    let other = host_demo::seeded_noise(3, [1, 3, 16, 16], &Device::Cpu).unwrap();
    candle_core::safetensors::save(&HashMap::from([("latents", other)]), folder.join("start.safetensors")).unwrap();
    let (code, message) = wrong(&[]);
    assert!(code == Some(1) && message.contains("[1, 3, 16, 16], expected [batch, 4, height, width]"), "{message}");
    assert!(!folder.join("wrong.png").exists());
}

#[test]
fn other_sizes_and_an_empty_prompt_are_drawn() {
    let folder = scratch("cli_sizes");
    for (text, size) in [("96x48", (96, 48)), ("68x52", (68, 52)), ("4x4", (4, 4))] {
        let words = ["--size", text, "--eta", "4"];
        let picture = draw(&folder, "sized.png", &words);
        assert_eq!(picture.size, size);
        assert_eq!((&picture.settings()["width"], &picture.settings()["height"]), (&json!(size.0), &json!(size.1)));
        let own = draw(&folder, "own.png", &[&words[..], &["--gradient", "plugin"]].concat());
        assert!(picture.distance(&own) <= 1, "{text}");
    }
    generated(&folder, &["--prompt", "", "--steps", "2", "--out", "empty.png"]);
    assert_eq!(Picture::read(&folder.join("empty.png")).text("prompt"), "");
}

#[test]
fn samplers_and_modes_are_chosen_by_name() {
    let folder = scratch("cli_samplers");
    let eta = ["--eta", "4"];
    let ddim = draw(&folder, "default.png", &eta);
    assert_eq!((&ddim.settings()["scheduler"], &ddim.settings()["mode"]), (&json!("ddim"), &json!("paper")));
    for scheduler in ["ddim", "euler", "pndm", "dpmpp-2m"] {
        let picture = draw(&folder, "s.png", &["--eta", "4", "--scheduler", scheduler]);
        assert_eq!(picture.settings()["scheduler"], scheduler);
        assert_eq!(picture.distance(&ddim) == 0, scheduler == "ddim", "{scheduler}");
    }
    let other = draw(&folder, "mode.png", &["--eta", "4", "--mode", "condition-only"]);
    assert!(other.settings()["mode"] == "condition-only" && other.distance(&ddim) > 0);
}

#[test]
fn a_picture_is_changed_by_the_strength() {
    let folder = scratch("cli_image");
    let start = draw(&folder, "start.png", &["--no-plugin", "--seed", "9"]);
    let from =
        |words: &[&str]| draw(&folder, "from.png", &[&["--image", "start.png", "--steps", "10"], words].concat());
    let light = from(&["--strength", "0.1"]);
    let settings = light.settings();
    assert_eq!((&settings["image"], &settings["strength"]), (&json!("start.png"), &json!(0.1)));
    assert_eq!((&settings["width"], &settings["height"]), (&json!(64), &json!(64)));
    let mean = |picture: &Picture| {
        let distances = picture.pixels.iter().zip(&start.pixels).map(|(a, b)| f64::from(a.abs_diff(*b)));
        distances.sum::<f64>() / start.pixels.len() as f64
    };
    let strong = from(&["--strength", "1"]);
    assert!(mean(&light) < mean(&strong), "{} {}", mean(&light), mean(&strong));
    assert_eq!(from(&[]).settings()["strength"], 0.8);
    // The same picture for every item, each with noise of its own.
    let words = ["--image", "start.png", "--batch", "2", "--out", "b.png", "--prompt-at", "0.5=a blue square"];
    generated(&folder, &[&["--prompt", PROMPT, "--steps", "4"], &words[..]].concat());
    let [first, second] = ["b-0.png", "b-1.png"].map(|name| Picture::read(&folder.join(name)));
    assert!(first.distance(&second) > 0 && first.settings()["prompt_at"] == json!([[0.5, "a blue square"]]));
}

/// The host's own LoRA counts as the plugin's would, and its share that is not applied is reported.
#[test]
fn the_hosts_own_lora_is_merged() {
    let folder = scratch("cli_lora");
    let (model, kohya) = (committed("sd1-tiny"), committed("sd1-cases/lora_kohya.safetensors"));
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("parity-more/lora_peft_header.safetensors");
    let base = ["--model", model.to_str().unwrap(), "--size", "64x64", "--no-plugin"];
    let of = |name: &str, more: &[&str]| draw(&folder, name, &[&base[..], more].concat());
    let plain = of("plain.png", &[]);
    let (kohya, header) = (kohya.to_str().unwrap(), header.to_str().unwrap());
    let both = ["--lora", &format!("{kohya}:0.5"), "--lora", header, "--report", "report.json"];
    assert!(of("both.png", &both).distance(&plain) > 0);
    assert_eq!(of("none.png", &["--lora", &format!("{kohya}:0")]).distance(&plain), 0);
    let report: Value = serde_json::from_slice(&std::fs::read(folder.join("report.json")).unwrap()).unwrap();
    let left = "mid_block.attentions.0.transformer_blocks.0.ff.net.2";
    let expected = json!([
        {"path": kohya, "strength": 0.5, "entries": 4, "not_applied": []},
        {"path": header, "strength": 1.0, "entries": 3, "not_applied": [[left, "feed-forward"]]},
    ]);
    assert_eq!(report["settings"]["lora"], expected);
    let done = generate(&folder, &[&["--prompt", PROMPT, "--steps", "2", "--lora", header][..], &base].concat());
    assert!(String::from_utf8_lossy(&done.stderr).contains("(feed-forward)"));
    // The shipped model has other modules.
    let done = generate(&folder, &["--prompt", PROMPT, "--lora", kohya]);
    let message = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.code() == Some(1) && message.contains("do not fit the weight"), "{message}");
}

#[test]
fn what_cannot_be_done_is_said_and_leaves_nothing() {
    let folder = scratch("cli_refusals");
    for name in ["bare", "taken.png"] {
        std::fs::create_dir(folder.join(name)).unwrap();
    }
    std::fs::write(folder.join("broken.json"), "{\"eta\"").unwrap();
    let before = files(&folder);
    let tiny = committed("sd1-tiny");
    let tiny = tiny.to_str().unwrap();
    let refused = |code: i32, words: &[&str], expected: &[&str]| {
        let steps: &[&str] = if words.contains(&"--steps") { &[] } else { &["--steps", "2"] };
        let done = generate(&folder, &[&["--prompt", PROMPT], steps, words].concat());
        let message = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(code), "{words:?}: {message}");
        assert!(expected.iter().all(|part| message.contains(part)), "{words:?}: {message}");
        assert!(message.starts_with("error: ") && !message.contains("panicked"), "{words:?}: {message}");
        assert_eq!(files(&folder), before, "{words:?}");
    };
    refused(1, &["--model", "nowhere"], &["nowhere", "no such model"]);
    refused(1, &["--model", "nowhere", "--no-plugin"], &["nowhere", "no such model"]);
    refused(1, &["--model", "bare", "--no-plugin"], &["bare/model_index.json", "No such file"]);
    refused(1, &["--model", tiny], &["no adapter for", "--config", "--no-plugin"]);
    refused(1, &["--size", "66x64"], &["66x64", "divisible by 4"]);
    refused(1, &["--size", "4x6", "--no-plugin"], &["4x6", "divisible by 4"]);
    refused(1, &["--steps", "0"], &["0 steps", "1 to 1000"]);
    refused(1, &["--batch", "0"], &["--batch 0"]);
    refused(1, &["--config", "{\"eta\""], &["--config", "EOF"]);
    refused(1, &["--config", "broken.json"], &["broken.json", "EOF"]);
    refused(1, &["--config", "absent.json"], &["absent.json", "No such file"]);
    refused(1, &["--config", "{\"etta\": 1}"], &["plugin, create", "`etta`", "`eta`"]);
    refused(1, &["--config", "{\"adapter\": \"absent\"}"], &["plugin, create", "absent", "No such file"]);
    refused(1, &["--eta=-1"], &["eta = -1", "between 0 and 100"]);
    refused(1, &["--plugin", "libabsent.so"], &["libabsent.so", "no plugin library"]);
    refused(1, &["--plugin", "broken.json"], &["broken.json"]);
    refused(1, &["--device", "gpu"], &["`gpu`"]);
    refused(1, &["--dtype", "f64"], &["`f64`"]);
    refused(1, &["--guidance", "inf"], &["--guidance inf"]);
    refused(1, &["--latents", "absent.safetensors"], &["absent.safetensors"]);
    refused(1, &["--out", "absent/out.png"], &["absent/out.png", "no folder absent"]);
    refused(1, &["--out", "taken.png"], &["taken.png", "is a folder"]);
    refused(1, &["--report", "absent/report.json"], &["absent/report.json", "no folder absent"]);
    refused(2, &["--size", "64"], &["`64`", "WIDTHxHEIGHT"]);
    refused(2, &["--size", "0x64"], &["`0x64`"]);
    refused(2, &["--gradient", "both"], &["'both'", "host, plugin"]);
    refused(2, &["--no-plugin", "--eta", "1"], &["--no-plugin", "--eta"]);
    refused(2, &["--seed", "x"], &["'x'"]);
    refused(2, &["--scheduler", "heun"], &["`heun`", "`ddim`, `euler`, `pndm`, `dpmpp-2m`"]);
    refused(2, &["--mode", "both"], &["'both'", "paper, condition-only"]);
    refused(2, &["--prompt-at", "2=a"], &["`2=a`", "SHARE=PROMPT"]);
    refused(2, &["--prompt-at", "a blue square"], &["SHARE=PROMPT"]);
    refused(1, &["--lora", "absent.safetensors:2"], &["absent.safetensors: No such file"]);
    refused(1, &["--lora", "broken.json"], &["broken.json", "not a readable safetensors file"]);
    refused(2, &["--lora", ":2"], &["`:2`", "FILE:STRENGTH"]);
    refused(2, &["--strength", "0.5"], &["--image"]);
    refused(1, &["--image", "absent.png"], &["absent.png"]);
    refused(1, &["--image", "broken.json"], &["broken.json", "not a readable PNG"]);
}
