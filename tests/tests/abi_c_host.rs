//! The example host, as C and as C++, with a plugin in C that has not seen a line of Rust and with the real one.

use std::path::{Path, PathBuf};

use host_api::{Report, Run, Space, Step, Text};
use serde_json::{Value, json};
use tests::cc::{self, Language};
use tests::dpt::{self, model, norm, scratch};
use tests::hosts::plain;
use tests::plugin_library;

/// The example as each language.
fn compiled(folder: &Path) -> [PathBuf; 2] {
    [Language::C11, Language::Cxx17].map(|language| cc::program(language, &cc::host_api("examples/host.c"), folder))
}

/// Exit code, stdout and stderr.
fn run(program: &Path, library: &Path, config: &str) -> (i32, String, String) {
    let done = cc::run(program, &[library.as_os_str(), config.as_ref()]);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (done.status.code().unwrap(), text(done.stdout), text(done.stderr))
}

/// The example's noise.
fn noise() -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 11) as f64 / 9007199254740992.
    };
    (0..4 * 16 * 16).map(|_| (0..12).fold(-6., |sum, _| sum + uniform()) as f32).collect()
}

fn shapes(more: Value) -> Value {
    let (adapter, base) = (host_demo::default_adapter().unwrap(), host_demo::default_model().unwrap());
    dpt::with(json!({"adapter": adapter, "base_model": base, "eta": 4}), more)
}

/// What the Rust host reports of the example's steps.
fn expected(config: &Value) -> Vec<Report> {
    let mut plugin = dpt::create(plain(), config).unwrap();
    let unknown = host_api::Model { unet_config: None, alphas_cumprod: &[], ..model("") };
    plugin.prepare(&unknown, host_api::Device::Cpu).unwrap();
    let prompts = ["a red circle to the left of a blue square".to_owned()];
    let text = Text { prompts: Some(&prompts), ..Text::default() };
    plugin.begin(&Run { batch: 1, steps: 3, guidance_scale: 4., text }).unwrap();
    let root = |t: f64| 0.00085f64.sqrt() + (0.012f64.sqrt() - 0.00085f64.sqrt()) * t / 999.;
    let alpha_bar = (0..=900).map(|t| 1. - root(f64::from(t)).powi(2)).product();
    let step = Step {
        index: 0,
        count: 3,
        sub_evaluation: 0,
        timestep: 900.,
        alpha_bar,
        space: Space::Vp,
        extra_inputs: false,
        text: None,
    };
    let mut latents = noise();
    let mut correct = |index| {
        let mut view = host_api::ViewMut::new(&mut latents, &[1, 4, 16, 16]).unwrap();
        plugin.step_in_place(&Step { index, ..step }, &mut view).unwrap()
    };
    (0..3).map(&mut correct).collect()
}

#[test]
fn the_example_corrects_as_the_rust_host_does() {
    let folder = scratch("c_host_dpt");
    let config = shapes(json!({}));
    let reports = expected(&config);
    let scores: Vec<f32> = reports.iter().map(|report| report.items[0].score).collect();
    assert!(scores.is_sorted(), "the same step again and again raises the score: {scores:?}");
    let lines = reports.iter().enumerate().map(|(index, report)| {
        let item = &report.items[0];
        let (score, norm) = (item.score, item.correction_norm);
        format!("step {index}: outcome 1\n  item 0: score {score:.6}, corrected by {norm:.6}\n")
    });
    let expected: String = lines.collect();
    for program in compiled(&folder) {
        let (code, printed, errors) = run(&program, plugin_library(), &config.to_string());
        assert_eq!((code, printed.as_str()), (0, expected.as_str()), "{}: {errors}", program.display());
    }
}

#[test]
fn a_strength_of_zero_is_told_as_an_outcome() {
    let [program, _] = compiled(&scratch("c_host_eta"));
    let (code, printed, errors) = run(&program, plugin_library(), &shapes(json!({"eta": 0})).to_string());
    assert_eq!((code, printed.matches("outcome 2").count()), (0, 3), "{printed}{errors}");
}

#[test]
fn the_example_runs_a_plugin_in_c() {
    let folder = scratch("c_host_tiny");
    let library = cc::library("tiny_plugin", true, &folder);
    let size = norm(&noise());
    for program in compiled(&folder) {
        let (code, printed, errors) = run(&program, &library, r#"{"strength": 0.5}"#);
        assert_eq!(code, 0, "{errors}");
        assert!(errors.contains("plugin: tiny: created"), "{errors}");
        let corrections: Vec<f64> =
            printed.lines().filter_map(|line| line.split("corrected by ").nth(1)?.parse().ok()).collect();
        // Halved at every step, by as much as is left of it.
        assert_eq!(corrections.len(), 3, "{printed}");
        for (correction, share) in corrections.iter().zip([0.5, 0.25, 0.125]) {
            assert!((correction / (share * size) - 1.).abs() < 1e-5, "{correction} of {size}");
        }
    }
}

#[test]
fn the_example_says_what_went_wrong() {
    let folder = scratch("c_host_errors");
    let tiny = cc::library("tiny_plugin", true, &folder);
    let programs = compiled(&folder);
    let no_adapter = json!({"adapter": "/nowhere/adapter.safetensors"}).to_string();
    let no_base = shapes(json!({"base_model": "/nowhere/model"})).to_string();
    for (library, config, words) in [
        (plugin_library(), no_adapter.as_str(), ["status 6: /nowhere/adapter.safetensors", "No such file"]),
        (plugin_library(), &no_base, ["status 6: /nowhere/model", "No such file"]),
        (plugin_library(), "{", ["status 4: ", "configuration"]),
        (&tiny, r#"{"strength": 9}"#, ["status 4: ", "0 to 4"]),
        (&folder.join("absent.so"), "", ["absent.so", "No such file"]),
        (Path::new("libm.so.6"), "", ["libm.so.6", "sampler_hook_entry"]),
    ] {
        for program in &programs {
            let (code, printed, errors) = run(program, library, config);
            assert_eq!((code, printed.as_str()), (1, ""), "{errors}");
            assert!(words.iter().all(|word| errors.contains(word)), "{words:?} in {errors}");
        }
    }
}
