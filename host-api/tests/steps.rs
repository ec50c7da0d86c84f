//! Views and latents through the raw tables.

mod common;

use std::ptr;

use common::raw::{self, Raw};
use half::{bf16, f16};
use host_api::abi::*;

const CANARY: f32 = -12345.0;

fn item() -> sh_item_report {
    sh_item_report { status: -7, score: CANARY, gradient_norm: CANARY, correction_norm: CANARY }
}

#[test]
fn out_of_place_and_in_place_agree_and_touch_nothing_else() {
    let raw = Raw::running("", 2, 1);
    let mut memory = [CANARY; 40];
    memory[4..8].copy_from_slice(&[1.0, 2.0, 3.0, 4.0]);
    let mut shape = [2, 2, 1, 1];
    let from = raw::view(memory.as_mut_ptr().wrapping_add(4), &mut shape);
    let to = raw::view(memory.as_mut_ptr().wrapping_add(20), &mut shape);
    let mut items = [item(); 2];
    let mut report = raw::report(&mut items);
    raw.step(&raw::step(0, 1), &from, &to, &mut report).ok();
    assert_eq!((report.outcome, report.reserved), (SH_CORRECTED, 0));
    assert!(report.seconds >= 0.0);
    assert_eq!((items[1].status, items[1].score, items[1].correction_norm), (SH_OK, 1.0, 0.0));
    assert!(items[1].gradient_norm.is_nan());
    assert_eq!(memory[4..8], [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(memory[20..24], [2.0, 3.0, 4.0, 5.0]);
    raw.step(&raw::step(0, 1), &from, &from, ptr::null_mut()).ok();
    assert_eq!(memory[4..8], [2.0, 3.0, 4.0, 5.0]);
    let touched = |index: &usize| (4..8).contains(index) || (20..24).contains(index);
    assert!((0..40).filter(|index| !touched(index)).all(|index| memory[index] == CANARY));
    raw.destroy();
}

#[test]
fn a_step_that_fails_writes_nothing() {
    for (behaviour, code) in
        [("step fails", SH_INTERNAL), ("step skips but writes", SH_INTERNAL), ("all items fail", SH_NON_FINITE)]
    {
        let raw = Raw::running(behaviour, 1, 1);
        let (mut from, mut to) = ([1.0f32, 2.0], [CANARY; 2]);
        let mut shape = [1, 2, 1, 1];
        let (from_view, to_view) = (raw::view(from.as_mut_ptr(), &mut shape), raw::view(to.as_mut_ptr(), &mut shape));
        let mut items = [item()];
        let mut report = raw::report(&mut items);
        raw.step(&raw::step(0, 1), &from_view, &to_view, &mut report).is(code, "");
        raw.step(&raw::step(0, 1), &from_view, &from_view, ptr::null_mut()).is(code, "");
        assert_eq!((from, to), ([1.0, 2.0], [CANARY; 2]), "{behaviour}");
        assert_eq!((report.outcome, items[0].status), (0, -7), "{behaviour}");
        raw.destroy();
    }
}

#[test]
fn an_item_that_fails_is_copied_bit_for_bit() {
    let payload = f32::from_bits(0x7fa1_2345); // a signalling NaN, which arithmetic would quieten
    let mut shape = [2, 2, 1, 1];
    let raw = Raw::running("first item fails", 2, 1);
    let (mut from, mut to) = ([payload, 1.0, 2.0, 3.0], [CANARY; 4]);
    let (from_view, to_view) = (raw::view(from.as_mut_ptr(), &mut shape), raw::view(to.as_mut_ptr(), &mut shape));
    raw.step(&raw::step(0, 1), &from_view, &to_view, ptr::null_mut()).ok();
    assert_eq!(to[0].to_bits(), payload.to_bits());
    assert_eq!(to[1..], [1.0, 3.0, 4.0]);
    raw.destroy();
    // What was written for an item that failed after all does not count.
    let raw = Raw::running("second item fails", 2, 1);
    let (mut from, mut to) = ([0.0, 1.0, 2.0, 3.0], [CANARY; 4]);
    let (from_view, to_view) = (raw::view(from.as_mut_ptr(), &mut shape), raw::view(to.as_mut_ptr(), &mut shape));
    raw.step(&raw::step(0, 1), &from_view, &to_view, ptr::null_mut()).ok();
    assert_eq!(to, [1.0, 2.0, 2.0, 3.0]);
    raw.step(&raw::step(0, 1), &from_view, &from_view, ptr::null_mut()).ok();
    assert_eq!(from, [1.0, 2.0, 2.0, 3.0]);
    raw.destroy();
}

/// Reads through negative, zero and swapped strides with a byte offset, in each dtype.
#[test]
fn any_strides_and_dtype() {
    fn check<T: host_api::Element + PartialEq + std::fmt::Debug>(code: u8, bits: u8) {
        let raw = Raw::running("", 1, 1);
        let mut numbers: Vec<T> = (0..16).map(|i| T::from_f32(i as f32 * 0.25)).collect();
        let before = numbers.clone();
        let (mut shape, mut strides) = ([1, 2, 2, 2], [99, -1, 4, 2]);
        let mut view = raw::view(numbers.as_mut_ptr().cast(), &mut shape);
        view.tensor.dtype = sh_dtype { code, bits, lanes: 1 };
        view.tensor.strides = strides.as_mut_ptr();
        view.tensor.byte_offset = 5 * size_of::<T>() as u64;
        raw.step(&raw::step(0, 1), &view, &view, ptr::null_mut()).ok();
        let touched = [5, 7, 9, 11, 4, 6, 8, 10];
        for (index, (before, after)) in before.iter().zip(&numbers).enumerate() {
            let sum = before.to_f32() + if touched.contains(&index) { 1.0 } else { 0.0 };
            assert_eq!(*after, T::from_f32(sum), "{index}");
        }
        // One number read as all eight, written apart.
        let mut zero = [0i64; 4];
        let mut out = vec![T::from_f32(0.0); 8];
        let mut broadcast = view;
        broadcast.tensor.strides = zero.as_mut_ptr();
        let mut to = raw::view(out.as_mut_ptr().cast(), &mut shape);
        to.tensor.dtype = view.tensor.dtype;
        raw.step(&raw::step(0, 1), &broadcast, &to, ptr::null_mut()).ok();
        assert_eq!(out, vec![T::from_f32(numbers[5].to_f32() + 1.0); 8]);
        raw.step(&raw::step(0, 1), &view, &broadcast, ptr::null_mut()).is(SH_INVALID_ARGUMENT, "overlap");
        raw.destroy();
    }
    check::<f32>(2, 32);
    check::<f16>(2, 16);
    check::<bf16>(4, 16);
}

#[test]
fn views_that_cannot_be_are_refused() {
    let raw = Raw::running("", 1, 1);
    let mut numbers = [1.0f32; 64];
    let mut shape = [1i64, 2, 2, 2];
    let good = raw::view(numbers.as_mut_ptr(), &mut shape);
    let with = |change: &dyn Fn(&mut sh_view)| {
        let mut view = good;
        change(&mut view);
        view
    };
    let [mut negative, mut huge, mut wide, mut other] =
        [[1, 2, -2, 2], [1, 2, i64::MAX, i64::MAX], [1, 3, 2, 2], [1, 2, 2, 3]].map(Box::new);
    let negative_shape = negative.as_mut_ptr();
    let mut strides = [1, i64::MAX, 1, 1];
    let tensor_strides = strides.as_mut_ptr();
    let cases: Vec<(sh_view, sh_status, &str)> = vec![
        (with(&|v| v.flags = 2), SH_INVALID_ARGUMENT, "unknown flags 0x2"),
        (with(&|v| v.tensor.data = ptr::null_mut()), SH_INVALID_ARGUMENT, "data is NULL"),
        (with(&|v| v.tensor.device.device_type = SH_DEVICE_CUDA), SH_UNSUPPORTED, "on cuda:0, but only main memory"),
        (with(&|v| v.tensor.device.device_type = 77), SH_UNSUPPORTED, "device type 77"),
        (with(&|v| v.tensor.ndim = 9), SH_INVALID_ARGUMENT, "ndim 9"),
        (with(&|v| v.tensor.ndim = -1), SH_INVALID_ARGUMENT, "ndim -1"),
        (with(&|v| v.tensor.ndim = 3), SH_SHAPE_MISMATCH, "latents have shape [1, 2, 2]"),
        (with(&|v| v.tensor.shape = ptr::null_mut()), SH_INVALID_ARGUMENT, "shape is NULL"),
        (with(&|v| v.tensor.dtype.lanes = 2), SH_DTYPE_MISMATCH, "2 lanes"),
        (with(&|v| v.tensor.dtype.bits = 64), SH_DTYPE_MISMATCH, "64 bits"),
        (with(&|v| v.tensor.dtype.code = 0), SH_DTYPE_MISMATCH, "code 0"),
        (with(&|v| v.tensor.byte_offset = 2), SH_INVALID_ARGUMENT, "aligned"),
        (with(&|v| v.tensor.byte_offset = u64::MAX - 3), SH_INVALID_ARGUMENT, "address space"),
        (with(&|v| v.tensor.shape = negative_shape), SH_INVALID_ARGUMENT, "negative"),
        (with(&|v| v.tensor.strides = tensor_strides), SH_INVALID_ARGUMENT, "too large"),
        (with(&|v| v.struct_size = 8), SH_INVALID_ARGUMENT, "struct_size 8"),
    ];
    for (view, code, part) in &cases {
        raw.step(&raw::step(0, 1), view, &good, ptr::null_mut()).is(*code, part);
    }
    for (shape, part) in [(&mut huge, "too large"), (&mut wide, "expected [1, 2, h, w]")] {
        let mut view = good;
        view.tensor.shape = shape.as_mut_ptr();
        let code = if part == "too large" { SH_INVALID_ARGUMENT } else { SH_SHAPE_MISMATCH };
        raw.step(&raw::step(0, 1), &view, &view, ptr::null_mut()).is(code, part);
    }
    let mut mismatched = good;
    mismatched.tensor.shape = other.as_mut_ptr();
    raw.step(&raw::step(0, 1), &good, &mismatched, ptr::null_mut()).is(SH_SHAPE_MISMATCH, "out has shape");
    let mut halves = good;
    halves.tensor.dtype.bits = 16;
    raw.step(&raw::step(0, 1), &good, &halves, ptr::null_mut()).is(SH_DTYPE_MISMATCH, "out is F16");
    let mut read_only = good;
    read_only.flags = SH_VIEW_READ_ONLY;
    raw.step(&raw::step(0, 1), &good, &read_only, ptr::null_mut()).is(SH_INVALID_ARGUMENT, "read-only");
    let mut shifted = good;
    shifted.tensor.byte_offset = 4;
    raw.step(&raw::step(0, 1), &good, &shifted, ptr::null_mut()).is(SH_INVALID_ARGUMENT, "overlaps the latents");
    assert_eq!(numbers, [1.0; 64]);
    // Two views that interleave in one buffer do not overlap.
    let mut even = [16i64, 8, 4, 2];
    let (mut from, mut to) = (good, shifted);
    from.tensor.strides = even.as_mut_ptr();
    to.tensor.strides = even.as_mut_ptr();
    raw.step(&raw::step(0, 1), &from, &to, ptr::null_mut()).ok();
    let expected: Vec<f32> = (0..64).map(|i| if i < 16 && i % 2 == 1 { 2.0 } else { 1.0 }).collect();
    assert_eq!(numbers.as_slice(), expected);
    raw.destroy();
}

#[test]
fn an_empty_batch_is_a_no_op() {
    let raw = Raw::running("step panics", 0, 2);
    let mut shape = [0, 2, 8, 8];
    let view = raw::view(ptr::null_mut(), &mut shape);
    let mut report = raw::report(&mut []);
    raw.step(&raw::step(1, 2), &view, &view, &mut report).ok();
    assert_eq!(report.outcome, SH_SKIPPED_EMPTY);
    raw.step(&raw::step(2, 2), &view, &view, &mut report).is(SH_INVALID_ARGUMENT, "step 2 of 2");
    raw.end().ok();
    raw.destroy();
}

/// A caller of a later version has larger items; a caller may also give room for fewer.
#[test]
fn report_items_carry_their_stride() {
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Grown {
        known: sh_item_report,
        more: u64,
    }
    let raw = Raw::running("", 3, 1);
    let mut numbers = [0.0f32; 6];
    let mut shape = [3, 2, 1, 1];
    let view = raw::view(numbers.as_mut_ptr(), &mut shape);
    let mut grown = [Grown { known: item(), more: 42 }; 3];
    let mut report = raw::report(&mut []);
    report.items = grown.as_mut_ptr().cast();
    report.item_size = size_of::<Grown>() as u32;
    report.item_count = 2;
    raw.step(&raw::step(0, 1), &view, &view, &mut report).ok();
    assert_eq!(grown.map(|item| item.known.score), [0.0, 1.0, CANARY]);
    assert!(grown.iter().all(|item| item.more == 42));
    report.item_size = 8;
    raw.step(&raw::step(0, 1), &view, &view, &mut report).is(SH_INVALID_ARGUMENT, "item_size 8");
    report.items = ptr::null_mut();
    raw.step(&raw::step(0, 1), &view, &view, &mut report).ok();
    assert_eq!(numbers, [2.0; 6]);
    raw.destroy();
}
