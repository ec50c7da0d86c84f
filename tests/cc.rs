//! The system's C and C++ compilers, for hosts and plugins written from the header alone. Programs are built with the
//! address and undefined-behaviour sanitizers, leaks included; the plugin library that they load is not.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

const STRICT: [&str; 4] = ["-Wall", "-Wextra", "-Werror", "-pedantic"];
const SANITIZED: [&str; 3] = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
/// The exit code of a sanitizer that found something; programs of their own end with 0, 1 or 2.
const FOUND: i32 = 99;

/// What a file is compiled as.
#[derive(Clone, Copy, Debug)]
pub enum Language {
    /// `cc`
    C11,
    /// `c++`
    Cxx17,
}

/// A folder of `host-api`.
pub fn host_api(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join("host-api").join(path)
}

/// A file of `tests/c`.
pub fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("c").join(name)
}

fn compile(language: Language, source: &Path, arguments: &[&[&str]], output: &Path) {
    let (compiler, standard) = match language {
        Language::C11 => ("cc", ["-x", "c", "-std=c11"]),
        Language::Cxx17 => ("c++", ["-x", "c++", "-std=c++17"]),
    };
    let mut cc = Command::new(compiler);
    cc.args(standard).args(STRICT).args(arguments.concat()).arg("-I").arg(host_api("include"));
    cc.arg(source).arg("-o").arg(output).args(["-lm", "-ldl", "-pthread"]);
    let done = cc.output().unwrap_or_else(|error| panic!("{compiler}: {error}"));
    assert!(done.status.success(), "{compiler} {}: {}", source.display(), String::from_utf8_lossy(&done.stderr));
}

/// Compiles `tests/c/<name>.c` to a shared library in `folder`. Only sanitized programs can load it if it is sanitized.
pub fn library(name: &str, sanitized: bool, folder: &Path) -> PathBuf {
    let output = folder.join(format!("lib{name}.so"));
    let sanitizers = if sanitized { &SANITIZED[..] } else { &["-O1"] };
    compile(Language::C11, &source(&format!("{name}.c")), &[sanitizers, &["-shared", "-fPIC"]], &output);
    output
}

/// Compiles a file to a sanitized program in `folder`.
pub fn program(language: Language, source: &Path, folder: &Path) -> PathBuf {
    let output = folder.join(format!("{}-{language:?}", source.file_stem().unwrap().display()));
    compile(language, source, &[&SANITIZED], &output);
    output
}

/// Runs a sanitized program, which may fail, but not by what a sanitizer finds.
pub fn run(program: &Path, arguments: &[&OsStr]) -> Output {
    let done = unchecked(program, arguments, leaks_are_found(program.parent().unwrap()));
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.code().is_some_and(|code| code != FOUND), "{}: {}\n{errors}", program.display(), done.status);
    done
}

fn unchecked(program: &Path, arguments: &[&OsStr], leaks: bool) -> Output {
    let mut command = Command::new(program);
    command.env("ASAN_OPTIONS", format!("exitcode={FOUND}:detect_leaks={}", u8::from(leaks)));
    command.env("LSAN_OPTIONS", format!("exitcode={FOUND}")).env("UBSAN_OPTIONS", format!("exitcode={FOUND}"));
    command.args(arguments).output().unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}

/// What a sanitizer says of `tests/c/faulty.c` with one of its faults; `None` when it finds nothing.
pub fn fault(name: &str, folder: &Path) -> Option<String> {
    let done = unchecked(&program(Language::C11, &source("faulty.c"), folder), &[name.as_ref()], true);
    (done.status.code() == Some(FOUND)).then(|| String::from_utf8_lossy(&done.stderr).into_owned())
}

/// Whether leaks can be found here: LeakSanitizer needs ptrace, which some containers forbid, and not every system has it.
pub fn leaks_are_found(folder: &Path) -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let found = fault("leak", folder).is_some_and(|text| text.contains("detected memory leaks"));
        if !found {
            say("leaks are not looked for: LeakSanitizer does not work here");
        }
        found
    })
}

/// Prints a line that `cargo test` does not swallow, for what is not checked on this machine.
pub fn say(line: &str) {
    writeln!(std::io::stderr(), "{line}").expect("stderr is open");
}
