//! PyTorch pickles are programs: the plugin reads tensors from them and runs nothing, and what is broken is an error.

use std::path::Path;

use host_api::{Error, Status};
use serde_json::json;
use tests::dpt::{create, host_config, scratch};
use tests::hosts::plain;
use tests::pickle::{call, checkpoint, dict, int, pickle, tensor, text, tuple};

/// What the plugin says of an adapter file with these bytes.
fn refusal(path: &Path, bytes: &[u8]) -> Error {
    std::fs::write(path, bytes).unwrap();
    create(plain(), &host_config(json!({"adapter": path}))).expect_err("it is no adapter")
}

#[track_caller]
fn refused(path: &Path, bytes: &[u8], words: &str) {
    let error = refusal(path, bytes);
    assert_eq!(error.status, Status::InvalidData, "{error}");
    assert!(error.message.contains(words) && error.message.contains(path.to_str().unwrap()), "{words}: {error}");
}

/// A file that a reader takes tensors from; `query_embed.weight` is the first that an adapter is asked for.
fn state(value: Vec<u8>) -> Vec<u8> {
    checkpoint(&pickle(&dict(&[("query_embed.weight", value)])), &[0.5; 8])
}

/// That the files below are read at all: this one gets as far as its tensors.
#[test]
fn a_pickle_of_tensors_is_read() {
    let path = scratch("plugin_pickles_read").join("adapter.bin");
    let short = state(tensor(&[2, 4], &[4, 1], 0, 8));
    refused(&path, &short, "`input_proj.weight`");
}

#[test]
fn nothing_that_a_pickle_names_is_called() {
    let folder = scratch("plugin_pickles_calls");
    let (path, marker) = (folder.join("adapter.bin"), folder.join("marker"));
    let touch = format!("touch '{}'", marker.display());
    let python = format!("open({:?}, 'w')", marker.display().to_string());
    let calls = [
        call("os", "system", &[text(&touch)]),
        call("posix", "system", &[text(&touch)]),
        call("subprocess", "check_output", &[text(&touch)]),
        call("builtins", "eval", &[text(&python)]),
        call("builtins", "exec", &[text(&python)]),
        // A class made without its constructor, with a state that would be set.
        [b"cbuiltins\nexec\n", &tuple(&[text(&python)])[..], b"\x81", &text(&python), b"b"].concat(),
    ];
    for body in &calls {
        refused(&path, &checkpoint(&pickle(body), &[]), "pickle");
        refused(&path, &state(body.clone()), "pickle");
        // Beside a tensor, below it on the stack, and as its storage.
        let good = tensor(&[2, 4], &[4, 1], 0, 8);
        let beside = dict(&[("query_embed.weight", good.clone()), ("harm", body.clone())]);
        let below = [&body[..], &dict(&[("query_embed.weight", good.clone())])].concat();
        let storage = call("torch._utils", "_rebuild_tensor_v2", &[body.clone(), int(0), int(0), int(0)]);
        for body in [beside, below, dict(&[("query_embed.weight", storage)])] {
            assert_eq!(refusal(&path, &checkpoint(&pickle(&body), &[0.5; 8])).status, Status::InvalidData);
        }
        assert!(!marker.exists());
    }
    // The marker would show: the same command through a shell makes it.
    assert!(std::process::Command::new("sh").args(["-c", &touch]).status().unwrap().success() && marker.exists());
}

#[test]
fn a_pickle_that_ends_anywhere_is_an_error() {
    let path = scratch("plugin_pickles_cut").join("adapter.bin");
    let body = pickle(&dict(&[("query_embed.weight", tensor(&[2, 4], &[4, 1], 0, 8))]));
    for length in 0..body.len() {
        refused(&path, &checkpoint(&body[..length], &[0.5; 8]), "pickle");
    }
    let file = checkpoint(&body, &[0.5; 8]);
    for length in 0..file.len() {
        assert_eq!(refusal(&path, &file[..length]).status, Status::InvalidData, "{length} bytes");
    }
    let real = std::fs::read(tests::committed("sd1-cases/release_mid.bin")).unwrap();
    for eighth in 1..8 {
        refused(&path, &real[..real.len() * eighth / 8], "pickle");
    }
}

/// Every byte of the pickle in turn has another value: an error or another tensor, never a panic.
#[test]
fn a_pickle_with_any_byte_changed_is_no_panic() {
    let path = scratch("plugin_pickles_changed").join("adapter.bin");
    let body = pickle(&dict(&[("query_embed.weight", tensor(&[2, 4], &[4, 1], 0, 8))]));
    for index in 0..body.len() {
        for value in [0, 1, 0x7f, 0xff, b'.', b'R', b't', body[index] ^ 1] {
            let mut changed = body.clone();
            changed[index] = value;
            let error = refusal(&path, &checkpoint(&changed, &[0.5; 8]));
            assert_eq!(error.status, Status::InvalidData, "byte {index} is {value}: {error}");
        }
    }
}

#[test]
fn tensors_that_the_file_cannot_hold_are_refused() {
    let path = scratch("plugin_pickles_sizes").join("adapter.bin");
    let huge = i32::MAX;
    for (shape, strides) in [
        (&[huge, huge][..], &[huge, 1][..]),
        (&[huge, 64], &[64, 1]),
        (&[huge, huge, huge], &[huge, huge, 1]),
        (&[1 << 20, 1 << 20], &[1 << 20, 1]),
        (&[3, 4], &[4, 1]),
    ] {
        refused(&path, &state(tensor(shape, strides, 0, 8)), "pickle");
    }
    refused(&path, &state(tensor(&[2, 4], &[4, 1], huge, 8)), "pickle");
    refused(&path, &state(tensor(&[2, 4], &[4, 1], 1, 8)), "pickle");
    refused(&path, &state(tensor(&[2, 4], &[4, 1, 1], 0, 8)), "pickle");
    // Arguments of the wrong number and kind.
    let rebuild = |arguments: &[Vec<u8>]| state(call("torch._utils", "_rebuild_tensor_v2", arguments));
    refused(&path, &rebuild(&[]), "pickle");
    refused(&path, &rebuild(&[int(1), int(2)]), "pickle");
    refused(&path, &state(call("torch._utils", "_rebuild_parameter", &[])), "pickle");
    refused(&path, &state([b"\x8a\xff", &[0x41; 255][..]].concat()), "pickle");
}
