//! Who may call what when, and what a call says when it is refused.

mod common;

use std::ptr;
use std::sync::atomic::Ordering;

use common::raw::{self, Raw, create_with};
use host_api::abi::*;

/// Each call in each state, and the states after.
#[test]
fn calls_are_legal_where_the_header_says() {
    let in_state = |state: &str| {
        let raw = Raw::create("");
        if state != "CREATED" {
            raw.prepare(&raw::model()).ok();
        }
        if state == "RUNNING" {
            raw.begin(&raw::run(1, 1)).ok();
        }
        raw
    };
    let mut numbers = [0.0f32; 2];
    let mut shape = [1, 2, 1, 1];
    let view = raw::view(numbers.as_mut_ptr(), &mut shape);
    let mut needs = sh_needs { struct_size: 32, flags: 9, tap: sh_string::EMPTY };
    needs.struct_size = size_of::<sh_needs>() as u32;
    for (call, legal) in [
        ("prepare", ["CREATED", "PREPARED"].as_slice()),
        ("needs", &["PREPARED", "RUNNING"]),
        ("begin", &["PREPARED"]),
        ("step", &["RUNNING"]),
        ("end", &["RUNNING"]),
    ] {
        for state in ["CREATED", "PREPARED", "RUNNING"] {
            let raw = in_state(state);
            let outcome = match call {
                "prepare" => raw.prepare(&raw::model()),
                "needs" => raw.needs(&mut needs),
                "begin" => raw.begin(&raw::run(1, 1)),
                "step" => raw.step(&raw::step(0, 1), &view, &view, ptr::null_mut()),
                _ => raw.end(),
            };
            if legal.contains(&state) {
                outcome.ok();
            } else {
                let expected = format!("{call} in state {state}; it is legal in {}", legal.join(", "));
                outcome.is(SH_INVALID_STATE, &expected);
                // Nothing has changed: the state's own call still works.
                match state {
                    "CREATED" => raw.prepare(&raw::model()).ok(),
                    "PREPARED" => raw.begin(&raw::run(1, 1)).ok(),
                    _ => raw.end().ok(),
                }
            }
            raw.destroy();
        }
    }
}

#[test]
fn a_failed_prepare_leaves_the_state() {
    let raw = Raw::create("prepare fails");
    raw.prepare(&raw::model()).is(SH_INVALID_DATA, "prepare, as told");
    raw.begin(&raw::run(1, 1)).is(SH_INVALID_STATE, "CREATED");
    raw.destroy();
}

#[test]
fn a_panic_poisons_the_instance_and_no_other() {
    let other = Raw::running("", 1, 1);
    let raw = Raw::running("step panics", 1, 1);
    assert_eq!(raw.memory(), 77);
    let mut numbers = [1.0f32, 2.0];
    let mut shape = [1, 2, 1, 1];
    let view = raw::view(numbers.as_mut_ptr(), &mut shape);
    raw.step(&raw::step(0, 1), &view, &view, ptr::null_mut()).is(SH_PANIC, "step, as told");
    assert_eq!(numbers, [1.0, 2.0], "what was written before the panic does not count");
    raw.step(&raw::step(0, 1), &view, &view, ptr::null_mut()).is(SH_POISONED, "only destroy is left");
    raw.end().is(SH_POISONED, "");
    raw.prepare(&raw::model()).is(SH_POISONED, "");
    raw.begin(ptr::null()).is(SH_POISONED, "");
    raw.needs(ptr::null_mut()).is(SH_POISONED, "");
    assert_eq!(raw.memory(), 0);
    let host = raw.host;
    raw.destroy();
    assert_eq!(host.messages.load(Ordering::SeqCst), 1, "the plugin was dropped");
    other.step(&raw::step(0, 1), &view, &view, ptr::null_mut()).ok();
    other.destroy();
}

#[test]
fn panics_in_create_and_drop_stay_inside() {
    let (host, _) = raw::host();
    let (outcome, plugin) = create_with("probe", host, sh_string::from_static("create panics"));
    outcome.is(SH_PANIC, "create, as told");
    assert!(plugin.is_null());
    let raw = Raw::create("drop panics");
    let state = raw.host;
    raw.destroy();
    assert_eq!(state.messages.load(Ordering::SeqCst), 1, "the host was told");
}

#[test]
fn two_calls_at_a_time_are_refused() {
    let raw = Raw::running("step waits", 1, 1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut numbers = [1.0f32, 2.0];
            let mut shape = [1, 2, 1, 1];
            let view = raw::view(numbers.as_mut_ptr(), &mut shape);
            raw.step(&raw::step(0, 1), &view, &view, ptr::null_mut()).is(SH_CANCELLED, "cancelled");
            assert_eq!(numbers, [1.0, 2.0], "a cancelled step writes nothing");
        });
        while raw.host.messages.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        raw.end().is(SH_BUSY, "end: another call");
        raw.begin(&raw::run(1, 1)).is(SH_BUSY, "");
        assert_eq!(raw.memory(), 77, "memory answers with what it knows");
        raw.host.cancel.store(true, Ordering::SeqCst);
    });
    raw.end().ok();
    raw.destroy();
}

#[test]
fn long_messages_end_at_a_character() {
    let (host, _) = raw::host();
    // 511 bytes hold 255 characters of two bytes, or one byte and 255 of them.
    let (outcome, _) = create_with("probe", host, sh_string::from_static("create fails"));
    outcome.is(SH_INVALID_CONFIG, "é");
    let (even, _) = create_with("probe", host, sh_string::from_static("create fails"));
    assert_eq!(even.message, "é".repeat(255));
    let (odd, _) = create_with("probe", host, sh_string::from_static("create fails, odd"));
    assert_eq!(odd.message, format!("x{}", "é".repeat(255)));
}

#[test]
fn create_refuses_what_it_cannot_use() {
    let empty = sh_string::EMPTY;
    let (host, _) = raw::host();
    create_with("other", host, empty).0.is(SH_NOT_FOUND, "other");
    create_with("probe", ptr::null(), empty).0.is(SH_INVALID_ARGUMENT, "host is NULL");
    let not_utf8 = sh_string { data: [-1i8].as_ptr().cast(), size: 1 };
    create_with("probe", host, not_utf8).0.is(SH_INVALID_ARGUMENT, "config is not UTF-8");
    let null = sh_string { data: ptr::null(), size: 3 };
    create_with("probe", host, null).0.is(SH_INVALID_ARGUMENT, "config is NULL");
    host.struct_size -= 1;
    create_with("probe", host, empty).0.is(SH_INVALID_ARGUMENT, "struct_size");
    host.struct_size += 1;
    host.log = None;
    create_with("probe", host, empty).0.is(SH_INVALID_ARGUMENT, "log is NULL");
}

/// A struct of a later version is larger; what this version does not know is neither read nor written.
#[test]
fn larger_structs_are_fine_and_smaller_ones_are_not() {
    #[repr(C)]
    struct Grown<T> {
        known: T,
        tail: [u64; 2],
    }
    fn sizes<T: Copy>(known: T, mut call: impl FnMut(*mut T) -> raw::Outcome, legal: impl Fn(raw::Outcome)) {
        let tail = [0xAAAA_AAAA_AAAA_AAAA; 2];
        let mut grown = Grown { known, tail };
        let pointer = (&raw mut grown).cast::<T>();
        // SAFETY: the struct starts with its u32 struct_size.
        unsafe { pointer.cast::<u32>().write(size_of::<Grown<T>>() as u32) };
        legal(call(pointer));
        assert_eq!(grown.tail, tail);
        // SAFETY: as above.
        unsafe { pointer.cast::<u32>().write(size_of::<T>() as u32 - 1) };
        call(pointer).is(SH_INVALID_ARGUMENT, "struct_size");
        call(ptr::null_mut()).is(SH_INVALID_ARGUMENT, "NULL");
    }
    let raw = Raw::create("");
    sizes(raw::model(), |model| raw.prepare(model), raw::Outcome::ok);
    let needs = sh_needs { struct_size: 0, flags: 0, tap: sh_string::EMPTY };
    sizes(needs, |needs| raw.needs(needs), raw::Outcome::ok);
    let begin = |run: *mut sh_run| {
        let outcome = raw.begin(run);
        if outcome.code == SH_OK {
            raw.end().ok();
        }
        outcome
    };
    sizes(raw::run(1, 1), begin, raw::Outcome::ok);
    raw.begin(&raw::run(1, 1)).ok();
    let mut numbers = [0.0f32; 2];
    let mut shape = [1, 2, 1, 1];
    let view = raw::view(numbers.as_mut_ptr(), &mut shape);
    let step = raw::step(0, 1);
    sizes(step, |step| raw.step(step, &view, &view, ptr::null_mut()), raw::Outcome::ok);
    sizes(view, |view| raw.step(&step, view, view, ptr::null_mut()), raw::Outcome::ok);
    raw.destroy();
}

#[test]
fn an_error_may_be_missing_but_not_too_small() {
    let raw = Raw::create("");
    let end = raw.table().end.unwrap();
    // SAFETY: a living instance; a null error is legal.
    assert_eq!(unsafe { end(raw.plugin, ptr::null_mut()) }, SH_INVALID_STATE);
    let mut error = raw::no_error();
    error.struct_size = 16;
    // SAFETY: as above; the error says that it is small.
    assert_eq!(unsafe { end(raw.plugin, &mut error) }, SH_INVALID_ARGUMENT);
    assert!(error.message.iter().all(|&byte| byte == 0x55), "nothing is written to it");
    // SAFETY: the plugin has to refuse null.
    assert_eq!(unsafe { end(ptr::null(), ptr::null_mut()) }, SH_INVALID_ARGUMENT);
    raw.destroy();
}

#[test]
fn unknown_extensions_are_null() {
    let raw = Raw::create("");
    assert!(raw.extension("sampler-hook.lora/2").is_null());
    assert!(raw.extension("").is_null());
    assert!(!raw.extension(SH_PLUGIN_LORA).is_null());
    assert!(!raw.extension(SH_PLUGIN_PARAMS).is_null());
    raw.destroy();
}

#[test]
fn runs_and_steps_are_checked() {
    let raw = Raw::create("");
    raw.prepare(&sh_model { prediction: 9, ..raw::model() }).is(SH_INVALID_ARGUMENT, "unknown prediction 9");
    let alphas = [0.5, f64::NAN];
    raw.prepare(&sh_model { alphas_cumprod: alphas.as_ptr(), ..raw::model() })
        .is(SH_INVALID_ARGUMENT, "alphas_cumprod[1]");
    raw.prepare(&raw::model()).ok();
    raw.begin(&raw::run(1, 0)).is(SH_INVALID_ARGUMENT, "at least one step");
    raw.begin(&sh_run { reserved: 1, ..raw::run(1, 1) }).is(SH_INVALID_ARGUMENT, "reserved");
    raw.begin(&sh_run { guidance_scale: f64::NAN, ..raw::run(1, 1) }).is(SH_INVALID_ARGUMENT, "guidance_scale");
    raw.begin(&raw::run(1, 5)).ok();
    let mut numbers = [0.0f32; 2];
    let mut shape = [1, 2, 1, 1];
    let view = raw::view(numbers.as_mut_ptr(), &mut shape);
    for (step, part) in [
        (raw::step(5, 5), "step 5 of 5"),
        (raw::step(0, 4), "count 4 in a run of 5"),
        (sh_step { timestep: f64::INFINITY, ..raw::step(0, 5) }, "timestep"),
        (sh_step { alpha_bar: 0.0, space: SH_SPACE_VE, ..raw::step(0, 5) }, "alpha_bar 0"),
        (sh_step { alpha_bar: -0.1, ..raw::step(0, 5) }, "alpha_bar -0.1"),
        (sh_step { alpha_bar: 1.5, ..raw::step(0, 5) }, "alpha_bar 1.5"),
        (sh_step { alpha_bar: f64::NAN, ..raw::step(0, 5) }, "alpha_bar NaN"),
        (sh_step { space: 0, ..raw::step(0, 5) }, "unknown space 0"),
        (sh_step { flags: 2, ..raw::step(0, 5) }, "unknown flags 0x2"),
    ] {
        raw.step(&step, &view, &view, ptr::null_mut()).is(SH_INVALID_ARGUMENT, part);
    }
    assert_eq!(numbers, [0.0; 2]);
    raw.step(&sh_step { flags: SH_STEP_EXTRA_INPUTS, ..raw::step(4, 5) }, &view, &view, ptr::null_mut()).ok();
    assert_eq!(numbers, [1.0; 2]);
    raw.destroy();
}
