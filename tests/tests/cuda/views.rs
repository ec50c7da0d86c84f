//! The plugin on views of the host's CUDA memory: the same numbers as in main memory, in the order of the host's streams, whatever
//! the layout; and refusals that leave host and latents as they were.

use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use candle_core::cuda::cudarc::driver::{result, sys};
use host_api::host::{Host, Instance};
use host_api::{Device, Dtype, Memory, Outcome, Report, Status, Text, View, ViewMut};
use serde_json::{Value, json};
use tests::dpt::*;
use tests::hosts::{Lender, plain};

use super::memory::*;

const GPU: Device = Device::Cuda(0);
const ITEM: usize = 4 * 16 * 16;
const SHAPE: [usize; 4] = [2, 4, 16, 16];
const TYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// Of two items, for latents on the GPU.
fn running_on_gpu(host: Arc<dyn Host>, config: &Value) -> Instance {
    let texts = Texts::of(&[0, 2]);
    let mut instance = prepared_for(host, config, GPU);
    instance.begin(&run(2, texts.text())).unwrap();
    instance
}

/// With the plugin's own U-Net as a [`Lender`] has it: without the LoRA that the adapter's file brings.
fn own(more: Value) -> Value {
    let mut config = own_config(more);
    config["lora_strength"] = json!(0.);
    config
}

fn lender() -> Arc<dyn Host> {
    Arc::new(Lender::new(&Texts::of(&[0, 2])))
}

/// What a plugin that computes on the CPU makes of those latents in main memory, rounded to `dtype`.
fn expected(values: &[f32], dtype: Dtype) -> (Report, Vec<f32>) {
    let mut instance = running(plain(), &own(json!({"device": "cpu"})), &Texts::of(&[0, 2]));
    in_main_memory(values, dtype, &SHAPE, |view| instance.step_in_place(&step(1), view).unwrap())
}

fn rounded(values: &[f32], dtype: Dtype) -> Vec<f32> {
    decode(&encode(values, dtype), dtype)
}

/// That two corrections of `before` agree: f32 to 1e-4 of the latents, all types to 2 % of the correction and in its direction.
fn assert_corrected(what: &str, before: &[f32], found: &[f32], expected: &[f32], dtype: Dtype) {
    let (a, b) = (difference(found, before), difference(expected, before));
    assert!(norm(&b) > 0.01 * norm(before), "{what}: nothing to see");
    let (error, product) = (norm(&difference(&a, &b)), a.iter().zip(&b).map(|(a, b)| f64::from(a * b)).sum::<f64>());
    assert!(error < 2e-2 * norm(&b), "{what}: {} of the correction", error / norm(&b));
    assert!(product > 0.999 * norm(&a) * norm(&b), "{what}: cosine {}", product / norm(&a) / norm(&b));
    assert!(dtype != Dtype::F32 || error < 1e-4 * norm(expected), "{what}: {}", error / norm(expected));
}

#[test]
fn views_on_the_gpu_are_corrected_as_in_main_memory() {
    let stream = Stream::new(Kind::NonBlocking);
    let values = latents(1, 2);
    for dtype in TYPES {
        let (report, expected) = expected(&values, dtype);
        let before = rounded(&values, dtype);
        let hosts = [("own", plain(), own(json!({}))), ("host", lender(), host_config(json!({})))];
        for (source, host, config) in hosts {
            let mut instance = running_on_gpu(host, &config);
            let what = format!("{source} {dtype:?}");
            let (place, out) = (Buffer::of(&values, dtype), Buffer::new(2 * ITEM * dtype.size()));
            let apart = instance
                .step(&step(1), &place.view(dtype, &SHAPE, &stream), &mut out.view_mut(dtype, &SHAPE, &stream))
                .unwrap();
            assert_eq!(place.numbers(dtype), before, "{what}: the input");
            assert_corrected(&format!("{what} apart"), &before, &out.numbers(dtype), &expected, dtype);
            instance.step_in_place(&step(1), &mut place.view_mut(dtype, &SHAPE, &stream)).unwrap();
            assert_corrected(&format!("{what} in place"), &before, &place.numbers(dtype), &expected, dtype);
            for (found, expected) in apart.items.iter().zip(&report.items) {
                assert_eq!(found.status, Status::Ok);
                assert!((found.score - expected.score).abs() < 1e-3, "{what}: {found:?}, {expected:?}");
                assert!(
                    (found.gradient_norm / expected.gradient_norm - 1.).abs() < 2e-2,
                    "{what}: {found:?}, {expected:?}"
                );
            }
        }
    }
}

/// Strides and offset in elements of a layout of [`SHAPE`] with gaps.
const LAYOUTS: [([i64; 4], usize); 3] = [
    ([2048, 1, 128, 8], 3),            // channels last, every second place
    ([1100, 270, 16, 1], 5),           // rows follow each other, channels and items do not
    ([1024, -256, -16, -1], ITEM - 1), // backwards within an item
];
const PLACES: usize = 4200;

fn places(strides: &[i64; 4], offset: usize) -> Vec<usize> {
    let mut places = Vec::new();
    for b in 0..2 {
        for c in 0..4 {
            for y in 0..16 {
                for x in 0..16 {
                    let at = [b, c, y, x].iter().zip(strides).map(|(i, s)| i * s).sum::<i64>();
                    places.push((offset as i64 + at) as usize);
                }
            }
        }
    }
    places
}

#[test]
fn strides_and_offsets_lead_to_the_same_numbers_and_gaps_stay() {
    let stream = Stream::new(Kind::Blocking);
    let values = latents(1, 2);
    for dtype in TYPES {
        let mut instance = running_on_gpu(plain(), &own(json!({})));
        let plain_out = Buffer::of(&values, dtype);
        instance.step_in_place(&step(1), &mut plain_out.view_mut(dtype, &SHAPE, &stream)).unwrap();
        let (before, corrected) = (rounded(&values, dtype), plain_out.numbers(dtype));
        for (strides, offset) in LAYOUTS {
            let what = format!("{dtype:?} {strides:?}");
            let places = places(&strides, offset);
            let mut spread = vec![77.; PLACES];
            places.iter().zip(&values).for_each(|(&place, value)| spread[place] = *value);
            let (place, out) = (Buffer::of(&spread, dtype), Buffer::of(&vec![-5.; PLACES], dtype));
            let input = place.strided(dtype, &SHAPE, Some(&strides), offset, &stream);
            let mut output = out.strided_mut(dtype, &SHAPE, Some(&strides), offset, &stream);
            instance.step(&step(1), &input, &mut output).unwrap();
            assert_eq!(place.numbers(dtype), rounded(&spread, dtype), "{what}: the input");
            let mut written = out.numbers(dtype);
            let found: Vec<f32> = places.iter().map(|&place| std::mem::replace(&mut written[place], -5.)).collect();
            assert_corrected(&what, &before, &found, &corrected, dtype);
            assert!(written.iter().all(|v| *v == -5.), "{what}: a gap was written to");
            // And where they are.
            let mut output = place.strided_mut(dtype, &SHAPE, Some(&strides), offset, &stream);
            instance.step_in_place(&step(1), &mut output).unwrap();
            let mut written = place.numbers(dtype);
            let found: Vec<f32> = places.iter().map(|&place| std::mem::replace(&mut written[place], 77.)).collect();
            assert_corrected(&what, &before, &found, &corrected, dtype);
            assert!(written.iter().all(|v| *v == 77.), "{what}: a gap was written to in place");
        }
    }
}

#[test]
fn a_skipped_step_copies_every_bit_and_a_spoilt_item_keeps_its_own() {
    let stream = Stream::new(Kind::NonBlocking);
    for dtype in TYPES {
        let mut bytes = encode(&latents(1, 2), dtype);
        // A NaN with a payload, in the first item.
        let nan: &[u8] = if dtype == Dtype::F32 { &[0x21, 0x43, 0xc5, 0x7f] } else { &[0x83, 0x7f] };
        bytes[..nan.len()].copy_from_slice(nan);
        let mut instance = running_on_gpu(plain(), &own(json!({})));
        let eta = |instance: &Instance, eta: f64| instance.params().unwrap().unwrap().set("eta", eta).unwrap();
        let (place, out) = (Buffer::raw(&bytes), Buffer::new(bytes.len()));
        let (input, mut output) = (place.view(dtype, &SHAPE, &stream), out.view_mut(dtype, &SHAPE, &stream));
        eta(&instance, 0.);
        assert_eq!(instance.step(&step(1), &input, &mut output).unwrap().outcome, Outcome::SkippedStrength);
        assert_eq!(out.bytes(), bytes, "{dtype:?}");
        // Through a layout with gaps too.
        let (strides, offset) = LAYOUTS[0];
        let spread = Buffer::new(PLACES * dtype.size());
        instance
            .step(&step(1), &input, &mut spread.strided_mut(dtype, &SHAPE, Some(&strides), offset, &stream))
            .unwrap();
        let spread_bytes = spread.bytes();
        let at = |place: usize| &spread_bytes[place * dtype.size()..][..dtype.size()];
        let found: Vec<u8> = places(&strides, offset).into_iter().flat_map(|place| at(place).to_vec()).collect();
        assert_eq!(found, bytes, "{dtype:?} with gaps");

        eta(&instance, 20.);
        let out = Buffer::new(bytes.len());
        let report = instance.step(&step(1), &input, &mut out.view_mut(dtype, &SHAPE, &stream)).unwrap();
        assert_eq!(report.items.iter().map(|item| item.status).collect::<Vec<_>>(), [Status::NonFinite, Status::Ok]);
        let (after, half) = (out.bytes(), bytes.len() / 2);
        assert_eq!(after[..half], bytes[..half], "{dtype:?}: the spoilt item");
        assert_ne!(after[half..], bytes[half..], "{dtype:?}: its neighbour");
        assert!(decode(&after[half..], dtype).iter().all(|v| v.is_finite()));
    }
}

/// Has the stream write the latents late, and take what the step makes of them at once.
fn late(instance: &mut Instance, stream: &Stream, values: &[f32], seen: &mut dyn FnMut(&Stream)) -> Vec<f32> {
    let room = Buffer::new(1 << 30);
    let (source, place) = (Buffer::of(values, Dtype::F32), Buffer::of(&latents(50, 2), Dtype::F32));
    let (out, taken) = (Buffer::of(&latents(60, 2), Dtype::F32), Buffer::new(2 * ITEM * 4));
    stream.delay(&room);
    stream.copy(&source, &place);
    assert!(stream.is_busy(), "the delay is too short to show anything");
    let input = place.view(Dtype::F32, &SHAPE, stream);
    instance.step(&step(1), &input, &mut out.view_mut(Dtype::F32, &SHAPE, stream)).unwrap();
    seen(stream);
    // What the host does next, before anything has waited for the step.
    stream.copy(&out, &taken);
    stream.copy(&room, &place);
    stream.wait();
    taken.numbers(Dtype::F32)
}

#[test]
fn work_is_in_the_order_of_the_hosts_stream() {
    let values = latents(1, 2);
    let (_, expected) = expected(&values, Dtype::F32);
    for kind in KINDS {
        let stream = Stream::new(kind);
        let mut instance = running_on_gpu(plain(), &own(json!({})));
        // Kernels are loaded at their first use, which may wait for the device.
        drop(late(&mut instance, &stream, &values, &mut |_| {}));
        let found = late(&mut instance, &stream, &values, &mut |_| {});
        assert_corrected(&format!("{kind:?}"), &values, &found, &expected, Dtype::F32);
        instance.params().unwrap().unwrap().set("eta", 0.).unwrap();
        let found = late(&mut instance, &stream, &values, &mut |stream| {
            assert!(stream.is_busy(), "{kind:?}: a skipped step waited for the device");
        });
        assert_eq!(float_bits(&found), float_bits(&values), "{kind:?}, skipped");
    }
}

#[test]
fn a_plugin_that_computes_on_the_cpu_takes_them_in_order_too() {
    let values = latents(1, 2);
    let (_, expected) = expected(&values, Dtype::F32);
    for kind in KINDS {
        let stream = Stream::new(kind);
        let mut instance = running_on_gpu(plain(), &own(json!({"device": "cpu"})));
        let found = late(&mut instance, &stream, &values, &mut |_| {});
        assert_eq!(float_bits(&found), float_bits(&expected), "{kind:?}");
    }
    // And through layouts with gaps, both ways.
    let stream = Stream::new(Kind::NonBlocking);
    let (strides, offset) = LAYOUTS[0];
    let places = places(&strides, offset);
    let mut spread = vec![77.; PLACES];
    places.iter().zip(&values).for_each(|(&place, value)| spread[place] = *value);
    let place = Buffer::of(&spread, Dtype::F32);
    let mut instance = running_on_gpu(plain(), &own(json!({"device": "cpu"})));
    let mut view = place.strided_mut(Dtype::F32, &SHAPE, Some(&strides), offset, &stream);
    instance.step_in_place(&step(1), &mut view).unwrap();
    places.iter().zip(&expected).for_each(|(&place, value)| spread[place] = *value);
    assert_eq!(float_bits(&place.numbers(Dtype::F32)), float_bits(&spread));
}

#[test]
fn text_may_be_on_the_gpu_and_so_may_the_halves_of_a_step() {
    let stream = Stream::new(Kind::NonBlocking);
    let texts = Texts::of(&[0, 2]);
    let values = latents(1, 2);
    let (_, expected) = expected(&values, Dtype::F32);
    let (context, pooled) = (Buffer::of(&texts.context, Dtype::F32), Buffer::of(&texts.pooled, Dtype::F32));
    let text = Text {
        context: Some(context.view(Dtype::F32, &texts.shape, &stream)),
        pooled: Some(pooled.view(Dtype::F32, &[2, texts.shape[2]], &stream)),
        ..Text::default()
    };
    let mut instance = prepared_for(plain(), &own(json!({})), GPU);
    instance.begin(&run(2, text)).unwrap();
    let place = Buffer::of(&values, Dtype::F32);
    instance.step_in_place(&step(1), &mut place.view_mut(Dtype::F32, &SHAPE, &stream)).unwrap();
    assert_corrected("text", &values, &place.numbers(Dtype::F32), &expected, Dtype::F32);

    let lender = Lender::new(&texts);
    let mut instance = prepared_for(plain(), &host_config(json!({"gradient": "split"})), GPU);
    instance.begin(&run(2, text)).unwrap();
    let place = Buffer::of(&values, Dtype::F32);
    let mut split = instance.split().unwrap().unwrap();
    use host_api::host::Gradient;
    let features = lender.features(&step(1), &place.view(Dtype::F32, &SHAPE, &stream), "mid").unwrap();
    let features = features.view();
    for dtype in TYPES {
        let count: usize = features.shape().iter().product();
        let cotangent = Buffer::new(count * dtype.size());
        split.score(&step(1), &features, &mut cotangent.view_mut(dtype, features.shape(), &stream)).unwrap();
        assert!(norm(&cotangent.numbers(dtype)) > 0., "{dtype:?}");
        if dtype == Dtype::F32 {
            let gradient = Buffer::new(2 * ITEM * 4);
            let cotangent = cotangent.view(dtype, features.shape(), &stream);
            lender.vjp(&cotangent, &mut gradient.view_mut(dtype, &SHAPE, &stream)).unwrap();
            let mut out = place.view_mut(dtype, &SHAPE, &stream);
            let input = place.view(dtype, &SHAPE, &stream);
            split.apply(&step(1), &input, &gradient.view(dtype, &SHAPE, &stream), &mut out).unwrap();
        }
    }
    assert_corrected("split", &values, &place.numbers(Dtype::F32), &expected, Dtype::F32);
}

#[test]
fn two_instances_on_two_streams_do_not_disturb_each_other() {
    let streams = [Stream::new(Kind::NonBlocking), Stream::new(Kind::PerThread)];
    let starts = [latents(1, 2), latents(7, 2)];
    let mut instances = [0, 1].map(|_| running_on_gpu(plain(), &own(json!({}))));
    let places = [0, 1].map(|i: usize| Buffer::of(&starts[i], Dtype::F32));
    for index in 0..STEPS {
        for i in 0..2 {
            let mut view = places[i].view_mut(Dtype::F32, &SHAPE, &streams[i]);
            instances[i].step_in_place(&step(index), &mut view).unwrap();
        }
    }
    for i in 0..2 {
        let alone = Buffer::of(&starts[i], Dtype::F32);
        let mut instance = running_on_gpu(plain(), &own(json!({})));
        for index in 0..STEPS {
            instance.step_in_place(&step(index), &mut alone.view_mut(Dtype::F32, &SHAPE, &streams[i])).unwrap();
        }
        let (found, expected) = (places[i].numbers(Dtype::F32), alone.numbers(Dtype::F32));
        assert_corrected(&format!("instance {i}"), &starts[i], &found, &expected, Dtype::F32);
    }
}

fn free() -> usize {
    let context = context();
    context.synchronize().unwrap();
    context.mem_get_info().unwrap().0
}

#[test]
fn two_hundred_steps_take_no_more_memory_than_the_first_ones() {
    let stream = Stream::new(Kind::NonBlocking);
    let mut instance = running_on_gpu(lender(), &host_config(json!({})));
    let place = Buffer::new(2 * ITEM * 4);
    let source = Buffer::of(&latents(1, 2), Dtype::F32);
    let mut steps = |count: usize| {
        for _ in 0..count {
            stream.copy(&source, &place);
            instance.step_in_place(&step(1), &mut place.view_mut(Dtype::F32, &SHAPE, &stream)).unwrap();
        }
        free()
    };
    let first = steps(5);
    let last = steps(200);
    // What the driver says moves by whole pieces of its pool, and by other processes.
    assert!(last + (64 << 20) > first, "{} MB more", (first - last) >> 20);
}

/// Takes nearly all there is: nothing else can run at the time.
#[test]
fn too_little_memory_is_said_so_and_the_instance_lives() {
    let stream = Stream::new(Kind::NonBlocking);
    let texts = Texts::of(&[0]);
    let mut instance = prepared_for(plain(), &own(json!({})), GPU);
    instance.begin(&run(1, texts.text())).unwrap();
    let small = latents(1, 1);
    let (place, shape) = (Buffer::of(&small, Dtype::F32), [1, 4, 16, 16]);
    instance.step_in_place(&step(1), &mut place.view_mut(Dtype::F32, &shape, &stream)).unwrap();
    let expected = place.numbers(Dtype::F32);

    let (side, count) = (512, 4 * 512 * 512);
    let numbers: Vec<f32> = (0..count).map(|i| (i as f32 * 0.7).sin()).collect();
    let large = Buffer::of(&numbers, Dtype::F32);
    context().synchronize().unwrap();
    // What the pool of this process keeps would do for the step.
    // SAFETY: the device exists, and so does its pool.
    unsafe {
        let pool = result::device::get_default_mem_pool(result::device::get(0).unwrap()).unwrap();
        assert_eq!(sys::cuMemPoolTrimTo(pool, 0), sys::CUresult::CUDA_SUCCESS);
    }
    let mut hoard = Vec::new();
    let mut piece = 1usize << 36;
    while piece >= 1 << 20 {
        // SAFETY: freed below and used by nobody.
        match unsafe { result::malloc_sync(piece) } {
            Ok(pointer) => hoard.push(pointer),
            Err(_) => piece /= 2,
        }
    }
    let failed = instance.step_in_place(&step(1), &mut large.view_mut(Dtype::F32, &[1, 4, side, side], &stream));
    // SAFETY: allocated above.
    hoard.into_iter().for_each(|pointer| unsafe { result::free_sync(pointer) }.unwrap());
    let error = failed.unwrap_err();
    assert_eq!(error.status, Status::OutOfMemory, "{error}");
    assert_eq!(float_bits(&large.numbers(Dtype::F32)), float_bits(&numbers));
    let place = Buffer::of(&small, Dtype::F32);
    instance.step_in_place(&step(1), &mut place.view_mut(Dtype::F32, &shape, &stream)).unwrap();
    assert_corrected("afterwards", &small, &place.numbers(Dtype::F32), &expected, Dtype::F32);
}

/// A host that notes which context is current when it is called.
#[derive(Default)]
struct Watcher(Mutex<Vec<usize>>);

fn current() -> usize {
    result::ctx::get_current().unwrap().map_or(0, |context| context.addr())
}

/// A context that lives, or none. One that is made current lies on those before, and none is only current when these are gone.
fn make_current(context: sys::CUcontext) {
    // SAFETY: each is a context that lives, or none.
    let set = |context| unsafe { result::ctx::set_current(context) }.unwrap();
    while current() != 0 {
        set(std::ptr::null_mut());
    }
    if !context.is_null() {
        set(context);
    }
}

impl Host for Watcher {
    fn name(&self) -> &str {
        "watcher"
    }
    fn version(&self) -> &str {
        "1"
    }
    fn log(&self, _level: log::Level, _message: &str) {
        self.0.lock().unwrap().push(current());
    }
    fn cancelled(&self) -> bool {
        self.0.lock().unwrap().push(current());
        false
    }
}

#[test]
fn the_callers_context_stays_current() {
    let primary = context();
    let stream = Stream::new(Kind::NonBlocking);
    let (place, out) = (Buffer::of(&latents(1, 2), Dtype::F32), Buffer::new(2 * ITEM * 4));
    let texts = Texts::of(&[0, 2]);
    let other = candle_core::cuda::cudarc::driver::CudaContext::new_non_primary(0, 0).unwrap();
    for context in [std::ptr::null_mut(), other.cu_ctx(), primary.cu_ctx()] {
        make_current(context);
        let watcher = Arc::new(Watcher::default());
        let stays = |call: &str| assert_eq!(current(), context.addr(), "{call}");
        let mut instance = create(watcher.clone(), &own(json!({}))).unwrap();
        stays("create");
        instance.prepare(&model(&unet_config(&base_model())), GPU).unwrap();
        stays("prepare");
        instance.begin(&run(2, texts.text())).unwrap();
        stays("begin");
        let (input, mut output) = (place.view(Dtype::F32, &SHAPE, &stream), out.view_mut(Dtype::F32, &SHAPE, &stream));
        for eta in [20., 0.] {
            instance.params().unwrap().unwrap().set("eta", eta).unwrap();
            instance.step(&step(1), &input, &mut output).unwrap();
            stays("step");
        }
        instance.end().unwrap();
        stays("end");
        drop(instance);
        stays("destroy");
        let seen = watcher.0.lock().unwrap();
        assert!(seen.len() > 4 && seen.iter().all(|found| *found == context.addr()), "{context:?}: {seen:?}");
    }
    primary.bind_to_thread().unwrap();
}

#[test]
fn views_that_are_not_where_they_say_are_refused_and_nothing_is_touched() {
    let stream = Stream::new(Kind::NonBlocking);
    let start = latents(1, 2);
    let mut place = start.clone();
    let device = Buffer::of(&start, Dtype::F32);
    let mut on_gpu = running_on_gpu(plain(), &own(json!({})));
    let mut in_main = running(plain(), &own(json!({})), &Texts::of(&[0, 2]));
    let main = place.as_mut_ptr().cast::<c_void>();
    let pinned = {
        // SAFETY: freed below.
        let pinned = unsafe { result::malloc_host(2 * ITEM * 4, 0) }.unwrap();
        // SAFETY: as many bytes, and apart.
        unsafe { pinned.cast::<f32>().copy_from(start.as_ptr(), 2 * ITEM) };
        pinned
    };
    let gpu = |ordinal| Memory::Cuda { ordinal, stream: stream.handle.cast() };
    let refused = |instance: &mut Instance, pointer, memory, status: Status, words: &[&str]| {
        // SAFETY: not what the view says, which is what is tried; the plugin must not follow it.
        let mut view = unsafe { ViewMut::of_memory(pointer, Dtype::F32, &SHAPE, None, memory) }.unwrap();
        let error = instance.step_in_place(&step(1), &mut view).unwrap_err();
        assert_eq!(error.status, status, "{error}");
        assert!(words.iter().all(|word| error.message.contains(word)), "{words:?}: {error}");
    };
    let wrong = Status::InvalidArgument;
    refused(&mut on_gpu, main, gpu(0), wrong, &["latents", "cuda:0", "main memory"]);
    refused(&mut on_gpu, pinned, gpu(0), wrong, &["latents", "cuda:0", "main memory"]);
    refused(&mut on_gpu, main, Memory::Main, wrong, &["latents on cpu", "prepare", "cuda:0"]);
    refused(&mut on_gpu, device.address(), gpu(99), Status::Unsupported, &["latents", "cuda:99"]);
    refused(&mut in_main, device.address(), gpu(0), wrong, &["latents on cuda:0", "prepare", "cpu"]);
    refused(&mut in_main, device.address(), Memory::Main, wrong, &["latents", "cpu", "cuda:0"]);
    // SAFETY: allocated above; read as what was written there.
    let pinned_after = unsafe {
        let after = std::slice::from_raw_parts(pinned.cast::<f32>(), 2 * ITEM).to_vec();
        result::free_host(pinned).unwrap();
        after
    };
    for after in [place.clone(), pinned_after, device.numbers(Dtype::F32)] {
        assert_eq!(float_bits(&after), float_bits(&start));
    }
    let prepared = create(plain(), &own(json!({}))).unwrap();
    let mut prepared = prepared;
    let error = prepared.prepare(&model(&unet_config(&base_model())), Device::Cuda(99)).unwrap_err();
    assert!(error.status == Status::Unsupported && error.message.contains("cuda:99"), "{error}");
    // The instances go on.
    on_gpu.step_in_place(&step(1), &mut device.view_mut(Dtype::F32, &SHAPE, &stream)).unwrap();
    in_main.step_in_place(&step(1), &mut ViewMut::new(&mut place, &SHAPE).unwrap()).unwrap();
    assert_corrected("afterwards", &start, &device.numbers(Dtype::F32), &place, Dtype::F32);
}

#[test]
fn an_empty_batch_is_no_operation() {
    let stream = Stream::new(Kind::NonBlocking);
    let mut instance = prepared_for(plain(), &own(json!({})), GPU);
    instance.begin(&run(0, Text::default())).unwrap();
    // SAFETY: no element is read.
    let view =
        unsafe { View::of_memory(std::ptr::null(), Dtype::F32, &[0, 4, 16, 16], None, stream.memory()) }.unwrap();
    // SAFETY: as above.
    let out = unsafe { ViewMut::of_memory(std::ptr::null_mut(), Dtype::F32, &[0, 4, 16, 16], None, stream.memory()) };
    let report = instance.step(&step(1), &view, &mut out.unwrap()).unwrap();
    assert_eq!((report.outcome, report.items.len()), (Outcome::SkippedEmpty, 0));
}
