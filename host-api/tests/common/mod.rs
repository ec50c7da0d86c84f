//! What the tests of this crate share.
#![allow(dead_code, reason = "each test uses its part")]

pub mod probe;
pub mod raw;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use host_api::host::{Gradient, Host};
use host_api::{Model, Prediction, Run, Space, Step, Text};

/// A host that remembers what it was told.
#[derive(Default)]
pub struct TestHost {
    pub messages: Mutex<Vec<(log::Level, String)>>,
    pub cancel: AtomicBool,
    pub gradient: Option<Box<dyn Gradient>>,
}

impl Host for TestHost {
    fn name(&self) -> &str {
        "test host"
    }
    fn version(&self) -> &str {
        "1.2.3"
    }
    fn log(&self, level: log::Level, message: &str) {
        self.messages.lock().unwrap().push((level, message.to_owned()));
    }
    fn cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }
    fn gradient(&self) -> Option<&dyn Gradient> {
        self.gradient.as_deref()
    }
}

/// A Stable Diffusion 1.x model with three timesteps.
pub fn model() -> Model<'static> {
    Model {
        family: "sd1",
        prediction: Prediction::Epsilon,
        unet_in_channels: 4,
        latent_channels: 4,
        alphas_cumprod: &[0.99, 0.5, 0.01],
        unet_config: None,
    }
}

pub fn run(batch: usize, steps: usize) -> Run<'static> {
    Run { batch, steps, guidance_scale: 7.5, text: Text::default() }
}

pub fn step(index: usize, count: usize) -> Step<'static> {
    Step {
        index,
        count,
        sub_evaluation: 0,
        timestep: 1.0,
        alpha_bar: 0.5,
        space: Space::Vp,
        extra_inputs: false,
        text: None,
    }
}

/// A folder for one test, empty.
pub fn scratch(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// The folder of the header.
pub fn include() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("include")
}

/// Runs a compiler; the error is what it printed.
pub fn compile(compiler: &str, arguments: &[&str], files: &[&Path]) -> Result<(), String> {
    let output = Command::new(compiler).args(arguments).arg("-I").arg(include()).args(files).output();
    let output = output.map_err(|error| format!("{compiler}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(text) }
}

/// The library of `examples/scale.rs`, which `cargo test` builds beside the tests.
pub fn scale_library() -> PathBuf {
    let name = format!("{}scale{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let tests = std::env::current_exe().unwrap();
    tests.parent().unwrap().with_file_name("examples").join(name)
}
