//! What the correction writes and reports (Eq. 9), in every space, dtype and layout.

use std::sync::Arc;

use half::{bf16, f16};
use host_api::host::{Host, Instance};
use host_api::{Element, Outcome, Space, Status, Step, View, ViewMut};
use serde_json::{Value, json};
use tests::dpt::{
    STEPS, Texts, correct, corrected, difference, float_bits, host_config, latents, norm, own_config, run, running,
    step,
};
use tests::hosts::{Lender, plain};

const SHAPE: [usize; 4] = [2, 4, 16, 16];
const ITEM: usize = 4 * 16 * 16;

fn own(more: Value) -> Instance {
    running(plain(), &own_config(more), &Texts::of(&[0, 2]))
}

#[track_caller]
fn assert_near(what: &str, found: f64, expected: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance * expected.abs(), "{what}: {found}, expected {expected}");
}

#[test]
fn the_report_tells_what_was_done() {
    let texts = Texts::of(&[0, 2]);
    let lender: Arc<dyn Host> = Arc::new(Lender::new(&texts));
    for (host, settings) in [(lender, host_config(json!({}))), (plain(), own_config(json!({})))] {
        let mut instance = running(host, &settings, &texts);
        let (start, mut numbers) = (latents(1, 2), latents(1, 2));
        let report = correct(&mut instance, &step(0), &mut numbers).unwrap();
        assert_eq!(report.outcome, Outcome::Corrected);
        assert!(report.seconds > 0. && report.items.len() == 2);
        for (index, item) in report.items.iter().enumerate() {
            let added = difference(&numbers[index * ITEM..][..ITEM], &start[index * ITEM..][..ITEM]);
            assert_eq!(item.status, Status::Ok);
            assert!(item.score.abs() <= 1. && item.score != 0.);
            assert_near("size", norm(&added), item.correction_norm.into(), 1e-5);
            assert_near("eta |g|", item.correction_norm.into(), 20. * f64::from(item.gradient_norm), 1e-5);
        }
        assert_ne!(report.items[0].score, report.items[1].score);
    }
}

/// The score's slope along the step that was taken is the gradient's norm; across it there is none.
#[test]
fn the_gradient_is_that_of_the_score() {
    let texts = Texts::of(&[0]);
    let score = |instance: &mut Instance, z: &[f32]| {
        f64::from(correct(instance, &step(1), &mut z.to_vec()).unwrap().items[0].score)
    };
    for more in [json!({}), json!({"tap": "up1", "adapter": tests::committed("sd1-cases/release_up1.safetensors")})] {
        let mut instance = running(plain(), &own_config(more), &texts);
        let params = instance.params().unwrap().unwrap();
        params.set("eta", 100.).unwrap();
        let start = latents(1, 1);
        let mut moved = start.clone();
        let gradient_norm = f64::from(correct(&mut instance, &step(1), &mut moved).unwrap().items[0].gradient_norm);
        let gradient = difference(&moved, &start);
        params.set("eta", 0.).unwrap();
        params.set("monitor", 1.).unwrap();
        let mut slope = |direction: &[f32]| {
            // Further away another query may be the best one, and the score has a kink.
            let h = 0.01 / norm(direction);
            let at = |h: f64| -> Vec<f32> {
                start.iter().zip(direction).map(|(z, d)| (f64::from(*z) + h * f64::from(*d)) as f32).collect()
            };
            (score(&mut instance, &at(h)) - score(&mut instance, &at(-h))) / 0.02
        };
        assert_near("slope along the gradient", slope(&gradient), gradient_norm, 0.01);
        // Any other direction: what the gradient says of it.
        let other = latents(7, 1);
        let product: f64 = gradient.iter().zip(&other).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        let expected = product / norm(&gradient) / norm(&other) * gradient_norm;
        let found = slope(&other);
        assert!((found - expected).abs() < 0.01 * gradient_norm, "slope {found}, expected {expected}");
    }
}

/// The same bits from run to run, and the same numbers but for rounding on any number of threads.
#[test]
fn threads_are_the_hosts_choice_and_results_are_not() {
    let corrected = |more: Value| {
        let mut numbers = latents(1, 2);
        correct(&mut own(more), &step(0), &mut numbers).unwrap();
        difference(&numbers, &latents(1, 2))
    };
    let expected = corrected(json!({}));
    for threads in [1, 3] {
        let found = corrected(json!({"threads": threads}));
        assert_eq!(found, corrected(json!({"threads": threads})), "{threads} threads, again");
        assert!(norm(&difference(&found, &expected)) < 1e-4 * norm(&expected), "{threads} threads");
    }
}

#[test]
fn eta_0_writes_nothing() {
    fn bytes<T: Copy>(values: &[T]) -> Vec<u8> {
        let length = std::mem::size_of_val(values);
        // SAFETY: plain numbers without padding, read as the bytes that they are.
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), length) }.to_vec()
    }
    fn check<T: Element + Copy>(instance: &mut Instance, numbers: &[f32]) {
        let stored: Vec<T> = numbers.iter().map(|value| T::from_f32(*value)).collect();
        let mut in_place = stored.clone();
        let report = instance.step_in_place(&step(0), &mut ViewMut::new(&mut in_place, &SHAPE).unwrap()).unwrap();
        assert_eq!(report.outcome, Outcome::SkippedStrength);
        assert!(bytes(&in_place) == bytes(&stored));
        // Items, rows and columns in reverse, channels last, written to a transposed target with gaps.
        let mirrored = [-(ITEM as isize), -1, -64, -4];
        let input = View::strided(&stored, &SHAPE, &mirrored, 2 * ITEM - 1).unwrap();
        let mut target = vec![T::from_f32(7.); 4 * ITEM];
        let mut out = ViewMut::strided(&mut target, &SHAPE, &[2 * ITEM as isize, 512, 2, 32], 1).unwrap();
        let report = instance.step(&step(1), &input, &mut out).unwrap();
        assert_eq!(report.outcome, Outcome::SkippedStrength);
        let at = |strides: [isize; 4], offset: isize, i: usize| {
            let index = [i / ITEM, i / 256 % 4, i / 16 % 16, i % 16];
            (offset + index.iter().zip(strides).map(|(i, s)| *i as isize * s).sum::<isize>()) as usize
        };
        let from = |i| at(mirrored, 2 * ITEM as isize - 1, i);
        let to = |i| at([2 * ITEM as isize, 512, 2, 32], 1, i);
        let written: Vec<T> = (0..2 * ITEM).map(|i| target[to(i)]).collect();
        let expected: Vec<T> = (0..2 * ITEM).map(|i| stored[from(i)]).collect();
        assert!(bytes(&written) == bytes(&expected));
        // Between them nothing.
        assert_eq!(target.iter().filter(|value| value.to_f32() == 7.).count(), 2 * ITEM);
    }
    let mut numbers = latents(1, 2);
    // Even what no correction could touch.
    numbers[..4].copy_from_slice(&[f32::NAN, f32::INFINITY, -0., f32::MIN_POSITIVE / 4.]);
    let mut instance = own(json!({"eta": 0}));
    check::<f32>(&mut instance, &numbers);
    check::<f16>(&mut instance, &numbers);
    check::<bf16>(&mut instance, &numbers);
}

#[test]
fn parameters_take_effect_at_the_next_step() {
    let mut instance = own(json!({}));
    let params = instance.params().unwrap().unwrap();
    let mut outcome = |name: &str, value: f64, index: usize| {
        params.set(name, value).unwrap();
        assert_eq!(params.get(name).unwrap(), value);
        let mut numbers = latents(1, 2);
        let report = correct(&mut instance, &step(index), &mut numbers).unwrap();
        let changed = float_bits(&numbers) != float_bits(&latents(1, 2));
        assert_eq!(changed, report.outcome == Outcome::Corrected, "{name} = {value}");
        let size = report.items[0].correction_norm;
        assert_eq!(changed, size > 0.);
        (report.outcome, size, report.items[0].score)
    };
    let (_, size, score) = outcome("eta", 20., 0);
    let (_, half, same_score) = outcome("eta", 10., 0);
    assert_near("half of it", half.into(), f64::from(size) / 2., 1e-5);
    assert_eq!(score, same_score);
    let (result, _, unknown) = outcome("eta", 0., 0);
    assert!(result == Outcome::SkippedStrength && unknown.is_nan());
    assert_eq!(outcome("monitor", 1., 0), (Outcome::SkippedStrength, 0., score));
    assert!(outcome("monitor", 0., 0).2.is_nan());
    assert_eq!(outcome("eta", 20., 0).1, size);
    assert_eq!(outcome("start", 0.5, 1).0, Outcome::SkippedRange);
    assert_eq!(outcome("start", 0.25, 1).0, Outcome::Corrected);
    assert_eq!(outcome("end", 0.5, 2).0, Outcome::SkippedRange);
    assert_eq!(outcome("end", 0.75, 2).0, Outcome::Corrected);
    assert_eq!(outcome("every", 2., 2).0, Outcome::SkippedInterval);
    assert_eq!(outcome("start", 0., 2).0, Outcome::Corrected);
    for (name, wrong) in [("eta", f64::NAN), ("eta", 101.), ("every", 1.5), ("every", 0.), ("monitor", 2.)] {
        let error = params.set(name, wrong).unwrap_err();
        assert!(error.status == Status::InvalidArgument && error.message.contains(name), "{error}");
    }
    assert_eq!(params.schema().unwrap(), dpt_plugin::SCHEMA);
    assert_eq!(params.set("tap", 1.).unwrap_err().status, Status::NotFound);
}

#[test]
fn max_correction_bounds_the_relative_norm() {
    let start = latents(1, 2);
    let free = difference(&corrected(&mut own(json!({"eta": 20.})), 0), &start);
    let size = |added: &[f32], item: usize| norm(&added[item * ITEM..][..ITEM]) / norm(&start[item * ITEM..][..ITEM]);
    let (low, high) = (size(&free, 0).min(size(&free, 1)), size(&free, 0).max(size(&free, 1)));
    assert!(low > 0.01 && high > 1.01 * low, "{low} {high}");
    // Between the two sizes: one item is shortened and the other is not.
    let bound = low.midpoint(high);
    for bound in [bound, low / 3.] {
        let bounded = difference(&corrected(&mut own(json!({"eta": 20., "max_correction": bound})), 0), &start);
        for item in [0, 1] {
            let expected = size(&free, item).min(bound);
            assert_near("relative norm", size(&bounded, item), expected, 1e-5);
            let factor = expected / size(&free, item);
            let of = |added: &[f32]| added[item * ITEM..][..ITEM].to_vec();
            let scaled: Vec<f32> = of(&free).iter().map(|v| (f64::from(*v) * factor) as f32).collect();
            assert!(norm(&difference(&of(&bounded), &scaled)) < 1e-5 * norm(&scaled), "another direction");
        }
    }
}

#[test]
fn only_the_first_evaluation_of_a_step_is_corrected() {
    let mut instance = own(json!({"monitor": true}));
    let mut numbers = latents(1, 2);
    let sub = Step { sub_evaluation: 1, ..step(0) };
    let report = correct(&mut instance, &sub, &mut numbers).unwrap();
    assert_eq!(report.outcome, Outcome::SkippedSubEvaluation);
    assert!(report.items.iter().all(|item| item.score.is_nan()));
    assert_eq!(float_bits(&numbers), float_bits(&latents(1, 2)));
}

#[test]
fn sigma_space_gives_the_same_correction() {
    let texts = Texts::of(&[0, 2]);
    let lender: Arc<dyn Host> = Arc::new(Lender::new(&texts));
    for (host, more) in [(lender, host_config(json!({}))), (plain(), own_config(json!({"max_correction": 0.05})))] {
        let mut instance = running(host, &more, &texts);
        for index in 0..STEPS {
            let start = latents(1, 2);
            let mut z = start.clone();
            let vp = correct(&mut instance, &step(index), &mut z).unwrap();
            let ve_step = Step { space: Space::Ve, ..step(index) };
            let scale = ve_step.alpha_bar.sqrt();
            let rescale = |x: &[f32], by: f64| x.iter().map(|v| (f64::from(*v) * by) as f32).collect::<Vec<_>>();
            let mut x = rescale(&start, 1. / scale);
            let ve = correct(&mut instance, &ve_step, &mut x).unwrap();
            let (ours, expected) = (difference(&rescale(&x, scale), &start), difference(&z, &start));
            let error = norm(&difference(&ours, &expected)) / norm(&expected);
            assert!(error < 1e-4, "step {index}: relative error {error}");
            for (ve, vp) in ve.items.iter().zip(&vp.items) {
                assert_near("score", ve.score.into(), vp.score.into(), 1e-4);
                assert_near("gradient", ve.gradient_norm.into(), vp.gradient_norm.into(), 1e-4);
                assert_near("correction", ve.correction_norm.into(), vp.correction_norm.into(), 1e-4);
            }
        }
    }
}

fn rounds_once<T: Element + Copy>() {
    let mut instance = own(json!({}));
    let stored: Vec<T> = latents(1, 2).iter().map(|value| T::from_f32(*value)).collect();
    let mut wide: Vec<f32> = stored.iter().map(|value| value.to_f32()).collect();
    correct(&mut instance, &step(0), &mut wide).unwrap();
    let expected: Vec<f32> = wide.iter().map(|value| T::from_f32(*value).to_f32()).collect();
    let mut out = stored.clone();
    let input = View::new(&stored, &SHAPE).unwrap();
    instance.step(&step(0), &input, &mut ViewMut::new(&mut out, &SHAPE).unwrap()).unwrap();
    let found: Vec<f32> = out.iter().map(|value| value.to_f32()).collect();
    assert_eq!(float_bits(&found), float_bits(&expected));
    assert_ne!(float_bits(&found), float_bits(&stored.iter().map(|v| v.to_f32()).collect::<Vec<_>>()));
}

#[test]
fn half_precision_latents_are_computed_in_f32_and_rounded_once() {
    rounds_once::<f16>();
    rounds_once::<bf16>();
}

#[test]
fn runs_and_preparations_repeat() {
    let texts = Texts::of(&[0, 2]);
    let mut instance = own(json!({}));
    let expected = corrected(&mut instance, 1);
    let memory = instance.memory();
    assert!(memory > 0);
    for round in 0..4 {
        instance.end().unwrap();
        if round % 2 == 0 {
            let config = tests::dpt::unet_config(&tests::dpt::base_model());
            instance.prepare(&tests::dpt::model(&config), host_api::Device::Cpu).unwrap();
        }
        // A run of another size in between.
        let single = Texts::of(&[1]);
        instance.begin(&run(1, single.text())).unwrap();
        correct(&mut instance, &step(0), &mut latents(5, 1)).unwrap();
        instance.end().unwrap();
        instance.begin(&run(2, texts.text())).unwrap();
        assert_eq!(float_bits(&corrected(&mut instance, 1)), float_bits(&expected), "round {round}");
        assert_eq!(instance.memory(), memory);
    }
}

#[test]
fn two_instances_at_once_give_what_each_gives_alone() {
    let settings = [own_config(json!({})), own_config(json!({"eta": 5., "lora_strength": 0.5}))];
    let all = |settings: &Value| -> Vec<Vec<u32>> {
        let mut instance = running(plain(), settings, &Texts::of(&[0, 2]));
        (0..STEPS).map(|index| float_bits(&corrected(&mut instance, index))).collect()
    };
    let alone = settings.each_ref().map(all);
    assert_ne!(alone[0], alone[1]);
    let together = std::thread::scope(|scope| {
        settings.each_ref().map(|settings| scope.spawn(|| all(settings))).map(|thread| thread.join().unwrap())
    });
    assert!(together == alone);
}

#[test]
fn odd_sizes_are_corrected_too() {
    let mut instance = running(plain(), &own_config(json!({})), &Texts::of(&[0]));
    for (height, width) in [(17, 13), (9, 16), (1, 1)] {
        let shape = [1, 4, height, width];
        let start: Vec<f32> = latents(1, 1)[..4 * height * width].to_vec();
        let mut numbers = start.clone();
        let report = instance.step_in_place(&step(0), &mut ViewMut::new(&mut numbers, &shape).unwrap()).unwrap();
        assert_eq!(report.items[0].status, Status::Ok);
        assert!(numbers.iter().all(|v| v.is_finite()) && float_bits(&numbers) != float_bits(&start));
    }
}
