//! Several devices, and several instances in threads of their own. They need two GPUs.

use std::thread;

use candle_core::cuda::cudarc::driver::result;
use host_api::host::Instance;
use host_api::{Device, Dtype, Memory, Status, ViewMut};
use serde_json::json;
use tests::dpt::*;
use tests::hosts::plain;

use super::memory::*;

const SHAPE: [usize; 4] = [2, 4, 16, 16];

/// An instance on a device, for latents there.
fn instance(ordinal: usize) -> Instance {
    let config = own_config(json!({"device": format!("cuda:{ordinal}")}));
    prepared_for(plain(), &config, Device::Cuda(ordinal))
}

fn begin(instance: &mut Instance) {
    let texts = Texts::of(&[0, 2]);
    instance.begin(&run(2, texts.text())).unwrap();
}

/// Latents on a device, and a stream of the host's there.
fn place(ordinal: usize) -> (Buffer, Stream) {
    let bytes = encode(&latents(1, 2), Dtype::F32);
    (Buffer::raw_on(ordinal, &bytes), Stream::on(ordinal, Kind::NonBlocking))
}

fn correct_on(instance: &mut Instance, index: usize, (buffer, stream): &(Buffer, Stream)) {
    instance.step_in_place(&step(index), &mut buffer.view_mut(Dtype::F32, &SHAPE, stream)).unwrap();
}

/// A run from beginning to end.
fn whole(instance: &mut Instance, ordinal: usize) -> Vec<f32> {
    let place = place(ordinal);
    begin(instance);
    (0..STEPS).for_each(|index| correct_on(instance, index, &place));
    instance.end().unwrap();
    place.0.numbers(Dtype::F32)
}

/// Steps in turn, the host's current device now the one and now the other, and always what it was.
#[test]
fn instances_on_two_devices_take_turns() {
    let expected = whole(&mut instance(0), 0);
    assert_ne!(float_bits(&expected), float_bits(&latents(1, 2)));
    let mut instances = [instance(0), instance(1)];
    let places = [place(0), place(1)];
    instances.iter_mut().for_each(begin);
    for index in 0..STEPS {
        for (ordinal, (instance, place)) in instances.iter_mut().zip(&places).enumerate() {
            let current = context_of((index + ordinal) % 2);
            correct_on(instance, index, place);
            assert_eq!(result::ctx::get_current().unwrap(), Some(current.cu_ctx()), "step {index} on cuda:{ordinal}");
        }
    }
    for (buffer, _) in &places {
        assert_eq!(float_bits(&buffer.numbers(Dtype::F32)), float_bits(&expected));
    }
    context_of(1);
    drop(instances);
    assert_eq!(result::ctx::get_current().unwrap(), Some(context_of(1).cu_ctx()));
}

/// Two on each device at the same time: their steps are captured when they are alone on it or not at all.
#[test]
fn instances_in_threads_of_their_own_do_not_meet() {
    let expected = whole(&mut instance(0), 0);
    thread::scope(|scope| {
        for ordinal in [0, 1, 0, 1] {
            let expected = &expected;
            scope.spawn(move || {
                let mut instance = instance(ordinal);
                for turn in 0..3 {
                    let found = whole(&mut instance, ordinal);
                    let error = norm(&difference(&found, expected)) / norm(expected);
                    assert!(error < 1e-5, "cuda:{ordinal}, run {turn}: {error:.1e}");
                }
            });
        }
    });
}

#[test]
fn latents_of_another_device_are_refused() {
    let mut on_second = create(plain(), &own_config(json!({"device": "cuda:1"}))).unwrap();
    let error = on_second.prepare(&model(&unet_config(&base_model())), Device::Cuda(0)).unwrap_err();
    assert_eq!(error.status, Status::Unsupported, "{error}");
    assert!(error.message.contains("cuda:0") && error.message.contains("cuda:1"), "{error}");

    let mut instance = instance(1);
    begin(&mut instance);
    let ((here, _), (there, stream)) = (place(0), place(1));
    let memory = Memory::Cuda { ordinal: 1, stream: stream.handle.cast() };
    // SAFETY: not what the view says, which is what is tried; the plugin must not follow it.
    let mut view = unsafe { ViewMut::of_memory(here.address(), Dtype::F32, &SHAPE, None, memory) }.unwrap();
    let error = instance.step_in_place(&step(0), &mut view).unwrap_err();
    assert_eq!(error.status, Status::InvalidArgument, "{error}");
    assert!(error.message.contains("cuda:0") && error.message.contains("cuda:1"), "{error}");
    assert_eq!(float_bits(&here.numbers(Dtype::F32)), float_bits(&latents(1, 2)));
    correct_on(&mut instance, 0, &(there, stream));
}
