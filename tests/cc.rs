//! The system's C compiler, for hosts and plugins written from the header alone.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const STRICT: [&str; 4] = ["-std=c11", "-Wall", "-Wextra", "-Werror"];

/// A file of `tests/c`.
pub fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("c").join(name)
}

fn compile(name: &str, arguments: &[&str], output: &Path) {
    let mut cc = Command::new("cc");
    cc.args(STRICT).args(arguments).arg("-I").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../host-api/include"));
    cc.arg(source(name)).arg("-o").arg(output).args(["-lm", "-ldl"]);
    let done = cc.output().unwrap_or_else(|error| panic!("cc: {error}"));
    assert!(done.status.success(), "cc {name}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Compiles `tests/c/<name>.c` to a shared library in `folder`.
pub fn library(name: &str, folder: &Path) -> PathBuf {
    let output = folder.join(format!("lib{name}.so"));
    compile(&format!("{name}.c"), &["-O1", "-g", "-shared", "-fPIC"], &output);
    output
}

/// Compiles `tests/c/<name>.c` to a program in `folder`.
pub fn program(name: &str, folder: &Path) -> PathBuf {
    let output = folder.join(name);
    compile(&format!("{name}.c"), &["-O1", "-g"], &output);
    output
}

/// What `tests/c/host.c` is told about the model and the run.
#[derive(Clone, Debug)]
pub struct HostArguments<'a> {
    /// The plugin library.
    pub library: &'a Path,
    /// The plugin's configuration, a JSON file.
    pub config: Option<&'a Path>,
    /// Where the final latents go, as raw f32.
    pub output: &'a Path,
    /// `"sd1"`, `"sd2"`.
    pub family: &'a str,
    /// 4; 9 for inpainting models.
    pub unet_in_channels: usize,
    /// `[B, C, h, w]`.
    pub latents: [usize; 4],
    /// `[S, D]` of the text.
    pub text: [usize; 2],
    /// Steps of the run.
    pub steps: usize,
    /// The U-Net's `config.json`.
    pub unet_config: Option<&'a Path>,
}

impl HostArguments<'_> {
    /// Runs the host that [`program`] compiled.
    pub fn run(&self, host: &Path) -> Output {
        let or_none = |path: Option<&Path>| path.map_or("-".into(), |path| path.as_os_str().to_owned());
        let mut command = Command::new(host);
        command.arg(self.library).arg(or_none(self.config)).arg(self.output).arg(self.family);
        command.arg(self.unet_in_channels.to_string());
        command.args(self.latents.iter().chain(&self.text).map(usize::to_string)).arg(self.steps.to_string());
        command.arg(or_none(self.unet_config));
        command.output().unwrap_or_else(|error| panic!("{}: {error}", host.display()))
    }
}
