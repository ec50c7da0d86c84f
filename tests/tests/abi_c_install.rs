//! The header installed, moved, and found by CMake and pkg-config: the example host built with it runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use host_api::abi::{SH_ABI_MAJOR, SH_ABI_MINOR};
use tests::cc;

fn scratch(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Whether these programs are installed; says which one is not.
fn installed(tools: &[&str]) -> bool {
    tools.iter().all(|tool| {
        let runs = Command::new(tool).arg("--version").output().is_ok();
        if !runs {
            cc::say(&format!("abi_c_install: skipped, {tool} is not installed"));
        }
        runs
    })
}

fn text(done: &Output) -> String {
    String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr)
}

/// Runs a program that has to succeed; what it printed.
#[track_caller]
fn run(command: &mut Command) -> String {
    let done = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(done.status.success(), "{command:?}: {}", text(&done));
    String::from_utf8(done.stdout).unwrap()
}

/// Configures `source` with packages from `prefix`.
fn configure(source: &Path, build: &Path, prefix: &Path) -> Command {
    let mut cmake = Command::new("cmake");
    cmake.arg("-S").arg(source).arg("-B").arg(build).arg(format!("-DCMAKE_PREFIX_PATH={}", prefix.display()));
    cmake
}

/// Installs the header from `source` and moves the installation; where it is then.
fn install(source: &Path, folder: &Path) -> PathBuf {
    let (build, first, moved) = (folder.join("build"), folder.join("first"), folder.join("moved"));
    run(Command::new("cmake").arg("-S").arg(source).arg("-B").arg(&build));
    run(Command::new("cmake").arg("--install").arg(&build).arg("--prefix").arg(&first));
    fs::rename(first, &moved).unwrap();
    moved
}

/// Asks pkg-config about `sampler-hook` in `prefix`.
fn pkg_config(prefix: &Path, question: &str) -> String {
    let mut command = Command::new("pkg-config");
    command.env("PKG_CONFIG_PATH", prefix.join("share/pkgconfig")).args([question, "sampler-hook"]);
    run(&mut command).trim().to_owned()
}

/// The example with the plugin in C.
fn runs(host: &Path, folder: &Path) {
    let plugin = cc::library("tiny_plugin", false, folder);
    let printed = run(Command::new(host).arg(plugin).arg(r#"{"strength": 0.5}"#));
    assert_eq!(printed.matches("outcome 1").count(), 3, "{printed}");
}

/// Whether `find_package` takes what is in `prefix` for `version`.
fn is_found(version: &str, prefix: &Path, folder: &Path) -> bool {
    let (source, build) = (folder.join("asks"), folder.join("asks/build"));
    let _ = fs::remove_dir_all(&source);
    fs::create_dir(&source).unwrap();
    let lists = format!(
        "cmake_minimum_required(VERSION 3.14...3.31)\nproject(asks LANGUAGES NONE)\nfind_package(sampler_hook {version} REQUIRED)\n"
    );
    fs::write(source.join("CMakeLists.txt"), lists).unwrap();
    let done = configure(&source, &build, prefix).output().unwrap();
    let printed = text(&done);
    assert!(done.status.success() || printed.contains("compatible with requested version"), "{printed}");
    done.status.success()
}

#[test]
fn the_header_is_found_where_it_was_moved_to() {
    if !installed(&["cmake", "pkg-config"]) {
        return;
    }
    let folder = scratch("c_install");
    let prefix = install(&cc::host_api(""), &folder);
    let files = ["cmake/sampler_hook/sampler_hookConfig.cmake", "pkgconfig/sampler-hook.pc"];
    for file in files.map(|file| prefix.join("share").join(file)) {
        let content = fs::read_to_string(&file).unwrap();
        assert!(!content.contains(folder.to_str().unwrap()), "{} names the folder it was made in", file.display());
    }
    assert_eq!(fs::read_to_string(prefix.join("include/sampler_hook.h")).unwrap(), host_api::abi::HEADER);

    let by_cmake = folder.join("by_cmake");
    run(&mut configure(&cc::host_api("examples"), &by_cmake, &prefix));
    run(Command::new("cmake").arg("--build").arg(&by_cmake));
    runs(&by_cmake.join("host"), &folder);

    let by_pkg_config = folder.join("by_pkg_config");
    let flags = pkg_config(&prefix, "--cflags");
    let mut cc = Command::new("cc");
    cc.args(flags.split_whitespace()).arg(cc::host_api("examples/host.c"));
    run(cc.arg("-o").arg(&by_pkg_config).args(["-lm", "-ldl"]));
    runs(&by_pkg_config, &folder);
}

#[test]
fn the_header_is_a_subdirectory_of_another_project() {
    if !installed(&["cmake"]) {
        return;
    }
    let folder = scratch("c_subdirectory");
    let lists = format!(
        "cmake_minimum_required(VERSION 3.14...3.31)\nproject(other LANGUAGES C)\nadd_subdirectory({:?} header)\n\
         add_executable(other {:?})\ntarget_link_libraries(other sampler_hook::sampler_hook m ${{CMAKE_DL_LIBS}})\n",
        cc::host_api(""),
        cc::host_api("examples/host.c"),
    );
    fs::write(folder.join("CMakeLists.txt"), lists).unwrap();
    let build = folder.join("build");
    run(&mut configure(&folder, &build, &folder));
    run(Command::new("cmake").arg("--build").arg(&build));
    runs(&build.join("other"), &folder);
}

/// The package's version is the header's. A draft fits its own minor alone; from 1.0 on, later minors fit too.
#[test]
fn the_packages_say_the_version_of_the_header() {
    if !installed(&["cmake", "pkg-config"]) {
        return;
    }
    let now = (SH_ABI_MAJOR, SH_ABI_MINOR);
    for (name, (major, minor)) in [("now", now), ("draft", (0, 7)), ("stable", (3, 4))] {
        let folder = scratch(&format!("c_version_{name}"));
        let source = folder.join("source");
        fs::create_dir_all(source.join("include")).unwrap();
        for file in ["CMakeLists.txt", "sampler-hook.pc.in"] {
            fs::copy(cc::host_api(file), source.join(file)).unwrap();
        }
        let define = |name: &str, number: u32| format!("#define SH_ABI_{name} {number}\n");
        let header = host_api::abi::HEADER
            .replace(&define("MAJOR", SH_ABI_MAJOR), &define("MAJOR", major))
            .replace(&define("MINOR", SH_ABI_MINOR), &define("MINOR", minor));
        fs::write(source.join("include/sampler_hook.h"), header).unwrap();
        let prefix = install(&source, &folder);
        assert_eq!(pkg_config(&prefix, "--modversion"), format!("{major}.{minor}"));
        let is_found = |version: &str| is_found(version, &prefix, &folder);
        assert!(is_found(""));
        assert!(is_found(&format!("{major}.{minor}")));
        assert!(!is_found(&format!("{major}.{}", minor + 1)), "{major}.{minor} is not of a later minor");
        assert!(!is_found(&format!("{}.{minor}", major + 1)), "{major}.{minor} is not of another major");
        if minor > 0 {
            assert_eq!(is_found(&format!("{major}.{}", minor - 1)), major > 0, "{major}.{minor} for an older minor");
        }
    }
}

#[test]
fn a_header_without_a_version_is_not_installed() {
    if !installed(&["cmake"]) {
        return;
    }
    let source = scratch("c_no_version");
    fs::create_dir(source.join("include")).unwrap();
    fs::copy(cc::host_api("CMakeLists.txt"), source.join("CMakeLists.txt")).unwrap();
    fs::write(source.join("include/sampler_hook.h"), "#define SH_ABI_MAJOR 1\n").unwrap();
    let done = configure(&source, &source.join("build"), &source).output().unwrap();
    let words = text(&done).split_whitespace().collect::<Vec<_>>().join(" "); // CMake breaks lines
    let expected = "sampler_hook.h: expected SH_ABI_MAJOR and SH_ABI_MINOR, found: #define SH_ABI_MAJOR 1";
    assert!(!done.status.success() && words.contains(expected), "{words}");
}
