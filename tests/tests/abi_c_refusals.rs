//! Bad input through the C door to the real plugin, by a host in C under sanitizers.

use std::ffi::OsString;

use serde_json::json;
use tests::cc::{self, Language};
use tests::dpt::{scratch, with};
use tests::plugin_library;

#[test]
fn a_c_host_does_everything_wrong_and_lives_on() {
    let folder = scratch("c_refusals");
    let config = json!({
        "adapter": host_demo::default_adapter().unwrap(), "base_model": host_demo::default_model().unwrap(), "eta": 4,
    });
    let broken = with(config.clone(), json!({"base_model": "/nowhere/model"}));
    let [config, broken] = [config, broken].map(|config| OsString::from(config.to_string()));
    let program = cc::program(Language::C11, &cc::source("refusals.c"), &folder);
    let done = cc::run(&program, &[plugin_library().as_os_str(), &config, &broken]);
    let (printed, errors) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success() && printed.ends_with("done\n"), "{printed}{errors}");
}

/// The checks that every C program of these tests runs under can fail.
#[test]
fn the_sanitizers_find_faults() {
    let folder = scratch("c_faults");
    let found = |name| cc::fault(name, &folder).unwrap_or_default();
    assert!(found("overflow").contains("heap-buffer-overflow"), "{}", found("overflow"));
    assert!(found("undefined").contains("signed integer overflow"), "{}", found("undefined"));
    assert_eq!(cc::fault("none", &folder), None);
    assert_eq!(found("leak").contains("detected memory leaks"), cc::leaks_are_found(&folder));
}
