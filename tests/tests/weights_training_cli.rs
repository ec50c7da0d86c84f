//! `weights shapes`, `probe`, `tune`, `eval`, `score` and `ground` as a user runs them, from a folder of pictures to a plugin
//! that corrects with what was trained.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::cli::generated;
use tests::dpt::scratch;
use tests::weights_program;

fn weights(folder: &Path, words: &[&str]) -> Output {
    Command::new(weights_program()).current_dir(folder).args(words).env("RAYON_NUM_THREADS", "2").output().unwrap()
}

#[track_caller]
fn done(folder: &Path, words: &[&str]) -> String {
    let done = weights(folder, words);
    assert!(done.status.success(), "{words:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

#[track_caller]
fn refused(folder: &Path, words: &[&str], named: &[&str]) {
    let done = weights(folder, words);
    let message = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success(), "{words:?}");
    assert!(message.starts_with("error: ") && named.iter().all(|part| message.contains(part)), "{words:?}: {message}");
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// An adapter that trains in no time.
const SMALL: [&str; 10] =
    ["--width", "32", "--heads", "4", "--feedforward", "32", "--matching-queries", "3", "--grounding-queries", "4"];

/// A folder with scenes in `scenes` and, from them, a first stage in `one`.
fn probed(name: &str) -> PathBuf {
    let folder = scratch(name);
    done(&folder, &["shapes", "scenes", "--examples", "6"]);
    let probe = ["probe", "--data", "scenes", "--out", "one", "--steps", "2", "--batch", "2"];
    let said = done(&folder, &[&probe[..], &SMALL].concat());
    assert_eq!(said.trim(), "one/adapter.safetensors");
    folder
}

#[test]
fn from_pictures_to_a_plugin_that_corrects() {
    let folder = probed("training");
    let one = ["--adapter", "one/adapter.safetensors"];
    let tune = ["tune", "--data", "scenes", "--out", "two", "--steps", "2", "--batch", "2", "--accumulate", "2"];
    done(&folder, &[&tune[..], &one].concat());
    let lines = std::fs::read_to_string(folder.join("two/metrics.jsonl")).unwrap();
    let last: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!((lines.lines().count(), &last["step"]), (2, &json!(2)));
    assert!(last["denoising"].as_f64().unwrap() > 0. && last["text_to_image"].is_number(), "{last}");
    let inspected = done(&folder, &["inspect", "two/adapter.safetensors", "--json"]);
    let inspected: Value = serde_json::from_str(&inspected).unwrap();
    assert_eq!(inspected["kinds"], json!(["DPT adapter", "LoRA"]));
    assert_eq!(inspected["adapter"]["tap"], "mid");

    let config = json!({"adapter": "two/adapter.safetensors"}).to_string();
    let words = ["--prompt", "a red circle", "--steps", "2", "--config", &config, "--eta", "1", "--report", "run.json"];
    generated(&folder, &words);
    let report = json(&folder.join("run.json"));
    assert!(report["steps"][0]["items"][0]["correction_norm"].as_f64().unwrap() > 0., "{report}");

    let generate = ["eval", "generate", "--captions", "2", "--steps", "2", "--batch", "2", "--eta", "0,1"];
    let files = ["--adapter", "two/adapter.safetensors", "--json", "drawn.json", "--plot", "drawn.png"];
    let table = done(&folder, &[&generate[..], &files].concat());
    assert!(table.contains("| base |") && table.contains("two/adapter.safetensors, eta 1"), "{table}");
    let drawn = json(&folder.join("drawn.json"));
    // Two splits of a base and two strengths.
    assert_eq!(drawn["results"].as_array().unwrap().len(), 6);
    assert_eq!(drawn["results"][0]["alignment"]["all"]["trials"], 2);
    assert!(drawn["results"][0]["alignment"]["frechet"].as_f64().unwrap() > 0.);
    assert!(folder.join("drawn.png").is_file());
}

/// Runs a training command until it has done `steps` steps in all, interrupts it, and gives the step that it says it stopped
/// after.
fn interrupted(folder: &Path, words: &[&str], steps: usize) -> usize {
    let mut program = Command::new(weights_program());
    let program = program.current_dir(folder).args(words).env("RAYON_NUM_THREADS", "2");
    let running = program.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    while metrics(folder).len() < steps {
        assert!(started.elapsed() < Duration::from_secs(300), "no step is done");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(Command::new("kill").args(["-INT", &running.id().to_string()]).status().unwrap().success());
    let output = running.wait_with_output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && said.contains("--resume goes on"), "{said}");
    said.split_whitespace().find_map(|word| word.parse().ok()).unwrap()
}

/// The steps of the run in `one`.
fn metrics(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("one/metrics.jsonl")).unwrap_or_default();
    text.split_inclusive('\n').filter_map(|line| serde_json::from_str(line.strip_suffix('\n')?).ok()).collect()
}

#[test]
fn an_interrupted_run_is_saved_resumed_and_not_overwritten() {
    let folder = scratch("training-interrupt");
    let words = ["probe", "--out", "one", "--steps", "100000", "--batch", "2", "--examples", "8"];
    let words = [&words[..], &SMALL].concat();
    let step = interrupted(&folder, &words, 2);
    assert_eq!(step, metrics(&folder).len());
    assert!(folder.join("one/adapter.safetensors").is_file());
    let later = interrupted(&folder, &[&words[..], &["--resume"]].concat(), step + 1);
    let steps: Vec<u64> = metrics(&folder).iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=later as u64).collect::<Vec<_>>());
    refused(&folder, &words, &["one/state.safetensors", "--resume"]);
    let mut other = words.clone();
    other[4] = "7";
    other.push("--resume");
    refused(&folder, &other, &["steps 100000, not 7"]);
    let heads = SMALL.iter().position(|word| *word == "4").unwrap();
    let mut other = [&words[..], &["--resume"]].concat();
    other[words.len() - SMALL.len() + heads] = "2";
    refused(&folder, &other, &["heads 4, not 2"]);
    refused(&folder, &[&words[..], &["--resume", "--dropout", "0.1"]].concat(), &["dropout 0.0, not 0.1"]);
}

#[test]
fn an_adapter_is_measured_on_scenes() {
    let folder = probed("training-measured");
    let words = ["eval", "discriminate", "--data", "scenes", "--adapter", "one/adapter.safetensors", "--t", "200,800"];
    let table =
        done(&folder, &[&words[..], &["--baselines", "2", "--json", "found.json", "--plot", "found.png"]].concat());
    let rows = ["| t = 200 |", "| t = 800 |", "| denoising error |", "| overall, by category |"];
    assert!(rows.iter().all(|row| table.contains(row)), "{table}");
    let found = json(&folder.join("found.json"));
    let result = &found["by_timestep"][1]["result"];
    assert_eq!((&found["examples"], &found["by_timestep"][1]["t"]), (&json!(6), &json!(800)));
    assert_eq!((&result["image_to_text"]["trials"], &result["overall"]["trials"]), (&json!(6), &json!(12)));
    assert!(result["boxes"]["trials"].as_u64().unwrap() >= 6);
    let trials = result["by_category"].as_object().unwrap().values().map(|share| share["trials"].as_u64().unwrap());
    assert_eq!(trials.sum::<u64>(), 12);
    assert!(folder.join("found.png").is_file());
    // Scenes with one box are no question to the baseline.
    let baseline = found["denoising"]["result"]["boxes"]["trials"].as_u64().unwrap();
    assert!(baseline > 0 && baseline <= result["boxes"]["trials"].as_u64().unwrap(), "{found}");
}

/// The shipped adapter: of two prompts the right one scores higher, a box is on the object, and both say so.
#[test]
fn the_shipped_adapter_scores_and_grounds() {
    let folder = scratch("training-judged");
    done(&folder, &["shapes", "scenes", "--examples", "12", "--seed", "4"]);
    let manifest = std::fs::read_to_string(folder.join("scenes/manifest.jsonl")).unwrap();
    let scenes: Vec<Value> = manifest.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // One object: what a briefly trained adapter does best.
    let single = |scene: &&Value| scene["caption"].as_str().unwrap().split(' ').count() == 3;
    let scene = scenes.iter().filter(single).find(|s| s["caption"].as_str().unwrap().starts_with('a')).unwrap();
    let (image, caption) = (format!("scenes/{}", scene["image"].as_str().unwrap()), scene["caption"].as_str().unwrap());
    let wrong = if caption.contains("green") { "three blue crosses" } else { "three green crosses" };
    let few = ["--timesteps", "4", "--draws", "2"];
    let words = ["score", "--image", &image, "--prompt", wrong, "--prompt", caption];
    let ranked = done(&folder, &[&words[..], &few, &["--plot", "scored.png"]].concat());
    assert!(tests::cli::Picture::read(&folder.join("scored.png")).size.0 >= 560);
    let lines: Vec<&str> = ranked.lines().collect();
    assert!(lines[0] == image && lines[1].ends_with(caption) && lines[2].ends_with(wrong), "{ranked}");
    let both = done(&folder, &[&words[..], &few, &["--json"]].concat());
    let both: Value = serde_json::from_str(&both).unwrap();
    assert_eq!(both["scores"][1]["by_timestep"].as_array().unwrap().len(), 4);
    assert!(both["scores"][1]["score"].as_f64() > both["scores"][0]["score"].as_f64(), "{both}");

    let expression = &scene["expressions"][0];
    let phrase = expression["text"].as_str().unwrap();
    let found = done(&folder, &["ground", "--image", &image, "--phrase", phrase, "--out", "found.png"]);
    let found: Value = serde_json::from_str(&found).unwrap();
    let numbers = |value: &Value| value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect::<Vec<_>>();
    let found_box = numbers(&found["box"]);
    assert!(found_box.iter().all(|v| (0. ..=64.).contains(v)) && found_box[2] > 0., "{found}");
    assert!(found["probability"].as_f64().unwrap() > 0.);
    let picture = tests::cli::Picture::read(&folder.join("found.png"));
    assert!(picture.size.0 >= 256 && picture.pixels.chunks(3).any(|pixel| pixel == [255, 0, 160]));
    assert_eq!(picture.text("phrase"), phrase);
}

#[test]
fn what_cannot_be_done_is_said() {
    let folder = scratch("training-refused");
    let out = ["--out", "one"];
    let probe = |more: &[&'static str]| [&["probe"], &out[..], more].concat();
    refused(&folder, &probe(&["--data", "nowhere"]), &["nowhere/manifest.jsonl"]);
    refused(&folder, &probe(&["--tap", "up7"]), &["up7"]);
    refused(&folder, &probe(&["--heads", "7"]), &["7 heads"]);
    refused(&folder, &probe(&["--batch", "0"]), &["batches of 0"]);
    refused(&folder, &probe(&["--steps", "0"]), &["--steps"]);
    refused(&folder, &probe(&["--clip=-1"]), &["--clip"]);
    refused(&folder, &probe(&["--lr", "nan"]), &["--lr"]);
    refused(&folder, &probe(&["--dropout", "1"]), &["--dropout", "below 1"]);
    refused(&folder, &probe(&["--betas", "0.9"]), &["--betas"]);
    refused(&folder, &probe(&["--temperature", "0"]), &["--temperature"]);
    // Of a flag with several values, a second would not be read.
    let twice = ["--grounding-costs", "1", "1", "1", "--grounding-costs", "1", "1", "1"];
    refused(&folder, &probe(&twice), &["--grounding-costs", "multiple times"]);
    refused(&folder, &probe(&["--matching", "0", "--grounding", "0"]), &["nothing to learn"]);
    refused(&folder, &probe(&["--contrast", "in-batch", "--batch", "1"]), &["at least 2"]);
    refused(&folder, &probe(&["--encoder-layers", "0"]), &["encoder has no layers"]);
    refused(&folder, &probe(&["--grounding-queries", "0"]), &["--grounding 0"]);
    refused(&folder, &["eval", "generate", "--captions", "1"], &["one picture"]);
    refused(&folder, &["eval", "generate", "--device", "tpu"], &["tpu", "cuda:N"]);
    refused(&folder, &["eval", "generate", "--adapter", "none.safetensors"], &["none.safetensors"]);
    refused(&folder, &probe(&["--resume"]), &["one/state.safetensors"]);
    refused(&folder, &["tune", "--adapter", "none.safetensors", "--out", "two"], &["none.safetensors"]);
    let model = tests::committed("sd1-tiny");
    let score = ["score", "--image", "a.png", "--prompt", "x"];
    refused(&folder, &[&score[..], &["--model", model.to_str().unwrap()]].concat(), &["--adapter"]);
    refused(&folder, &score, &["a.png"]);
    std::fs::write(folder.join("a.png"), "not a picture").unwrap();
    refused(&folder, &score, &["a.png", "not a readable PNG or JPEG"]);
    refused(&folder, &[&score[..], &["--draws", "0"]].concat(), &["--draws"]);
    refused(&folder, &["ground", "--image", "a.png", "--phrase", "x", "--out", "no/where.png"], &["no/where.png"]);
    refused(&folder, &["eval", "discriminate", "--t", "1000"], &["1000", "999"]);
}
