//! A host in C and a plugin in C, neither of which has seen a line of Rust.

use std::path::PathBuf;
use std::process::Output;

use tests::cc::{self, HostArguments};

fn scratch(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn read_f32(path: &PathBuf) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// Runs the C host with the C plugin, or with itself as the library; the output and the final latents.
fn run(name: &str, config: &str, batch: usize, with_plugin: bool) -> (Output, Vec<f32>) {
    let folder = scratch(name);
    let host = cc::program("host", &folder);
    let library = if with_plugin { cc::library("tiny_plugin", &folder) } else { host.clone() };
    let (config_file, output) = (folder.join("config.json"), folder.join("latents.f32"));
    std::fs::write(&config_file, config).unwrap();
    let arguments = HostArguments {
        library: &library,
        config: Some(&config_file),
        output: &output,
        family: "sd1",
        unet_in_channels: 4,
        latents: [batch, 4, 8, 6],
        text: [7, 16],
        steps: 3,
        unet_config: None,
    };
    let done = arguments.run(&host);
    let latents = if output.exists() { read_f32(&output) } else { Vec::new() };
    (done, latents)
}

#[test]
fn a_c_host_runs_a_c_plugin() {
    let (done, halved) = run("c_host_half", r#"{"strength": 0.5}"#, 2, true);
    let printed = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{printed}{}", String::from_utf8_lossy(&done.stderr));
    for line in ["log 3: tiny: created", "end before prepare: status 2", "step 2: timestep 333, outcome 1"] {
        assert!(printed.contains(line), "{line} is missing in\n{printed}");
    }
    let (done, whole) = run("c_host_whole", "{\"strength\": 1}", 2, true);
    assert!(done.status.success());
    assert_eq!(whole.len(), 2 * 4 * 8 * 6);
    assert!(whole.iter().any(|&value| value != 0.0));
    let eighth: Vec<f32> = whole.iter().map(|value| value * 0.125).collect();
    assert_eq!(halved, eighth);
}

#[test]
fn an_empty_batch_is_no_error() {
    let (done, latents) = run("c_host_empty", "", 0, true);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(String::from_utf8_lossy(&done.stdout).contains("outcome 6"));
    assert!(latents.is_empty());
}

#[test]
fn the_host_says_what_went_wrong() {
    let (done, _) = run("c_host_config", r#"{"strength": 9}"#, 1, true);
    assert_eq!(done.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&done.stderr).contains("create: status 4, expected"));
    let (done, _) = run("c_host_library", "", 1, false);
    assert_eq!(done.status.code(), Some(1), "a program is not a plugin library");
}
