//! Numbers that are not numbers, hosts whose gradient fails, and a user who cancels: the latents are never harmed, and an
//! item's neighbours are corrected as if nothing was wrong.

use std::sync::Arc;

use host_api::host::{Host, Instance};
use host_api::{Outcome, Report, Status};
use serde_json::{Value, json};
use tests::dpt::{Texts, correct, float_bits, host_config, latents, own_config, running, step};
use tests::hosts::{Fault, Lender, Plain, plain};

const ITEM: usize = 4 * 16 * 16;

/// An instance that runs a batch of two, with either source of the gradient.
fn both_sources(more: Value) -> [(&'static str, Instance); 2] {
    let texts = Texts::of(&[0, 2]);
    let host: Arc<dyn Host> = Arc::new(Lender::new(&texts));
    [
        ("host", running(host, &host_config(more.clone()), &texts)),
        ("plugin", running(plain(), &own_config(more), &texts)),
    ]
}

fn statuses(report: &Report) -> Vec<Status> {
    report.items.iter().map(|item| item.status).collect()
}

#[test]
fn a_single_item_that_is_not_finite_is_an_error() {
    let texts = Texts::of(&[0]);
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for more in [json!({}), json!({"eta": 0., "monitor": true})] {
            let mut instance = running(plain(), &own_config(more), &texts);
            let mut numbers = latents(1, 1);
            numbers[77] = value;
            let before = float_bits(&numbers);
            let error = correct(&mut instance, &step(0), &mut numbers).unwrap_err();
            assert_eq!(error.status, Status::NonFinite, "{error}");
            assert!(error.message.contains("latents") && error.message.contains("NaN or infinity"), "{error}");
            assert_eq!(float_bits(&numbers), before);
            // The host may go on with latents that are fine.
            correct(&mut instance, &step(1), &mut latents(1, 1)).unwrap();
        }
    }
}

#[test]
fn an_item_that_is_not_finite_leaves_its_neighbour_alone() {
    for (source, mut instance) in both_sources(json!({})) {
        let start = latents(1, 2);
        let mut good = start.clone();
        let report = correct(&mut instance, &step(0), &mut good).unwrap();
        assert_eq!(statuses(&report), [Status::Ok; 2]);
        for (bad, value) in [(0, f32::NAN), (1, f32::INFINITY)] {
            let fine = 1 - bad;
            let mut numbers = start.clone();
            numbers[bad * ITEM + 5] = value;
            let before = float_bits(&numbers);
            let beside = correct(&mut instance, &step(0), &mut numbers).unwrap();
            assert_eq!((beside.items[bad].status, beside.items[fine].status), (Status::NonFinite, Status::Ok));
            assert_eq!(beside.outcome, Outcome::Corrected);
            assert_eq!(beside.items[fine], report.items[fine], "{source}");
            assert!(beside.items[bad].score.is_nan() && beside.items[bad].correction_norm == 0.);
            let after = float_bits(&numbers);
            assert_eq!(after[bad * ITEM..][..ITEM], before[bad * ITEM..][..ITEM], "{source}");
            assert_eq!(after[fine * ITEM..][..ITEM], float_bits(&good)[fine * ITEM..][..ITEM], "{source}");
        }
    }
}

#[test]
fn text_that_is_not_finite_spoils_its_own_item_only() {
    let texts = Texts::of(&[0, 2]);
    let mut good = latents(1, 2);
    let mut instance = running(plain(), &own_config(json!({})), &texts);
    correct(&mut instance, &step(0), &mut good).unwrap();
    let mut pooled = texts.clone();
    pooled.pooled[40] = f32::NAN;
    let mut context = texts.clone();
    context.context[77 * 32 + 9] = f32::INFINITY;
    for spoilt in [pooled, context] {
        for monitor in [false, true] {
            let eta = if monitor { 0. } else { 20. };
            let settings = own_config(json!({"eta": eta, "monitor": monitor}));
            let mut instance = running(plain(), &settings, &spoilt);
            let start = latents(1, 2);
            let mut numbers = start.clone();
            let report = correct(&mut instance, &step(0), &mut numbers).unwrap();
            assert_eq!(statuses(&report), [Status::Ok, Status::NonFinite]);
            let expected = if monitor { &start } else { &good };
            assert_eq!(float_bits(&numbers[..ITEM]), float_bits(&expected[..ITEM]));
            assert_eq!(float_bits(&numbers[ITEM..]), float_bits(&start[ITEM..]));
        }
    }
}

/// A run of two items on a lender, the latents that a faultless step gives, and the means to try a fault.
struct Faults {
    host: Arc<Lender>,
    instance: Instance,
    start: Vec<f32>,
    good: Vec<f32>,
}

impl Faults {
    fn new(more: Value) -> Self {
        let texts = Texts::of(&[0, 2]);
        let host = Arc::new(Lender::new(&texts));
        let mut instance = running(host.clone(), &host_config(more), &texts);
        let start = latents(1, 2);
        let mut good = start.clone();
        correct(&mut instance, &step(0), &mut good).unwrap();
        Self { host, instance, start, good }
    }

    /// A step with that fault; the latents after it, and the host left without an activation.
    fn step(&mut self, fault: Fault) -> (host_api::Result<Report>, Vec<f32>) {
        self.host.set(fault);
        let mut numbers = self.start.clone();
        let result = correct(&mut self.instance, &step(0), &mut numbers);
        assert!(!self.host.holds(), "{fault:?}: the host still keeps an activation");
        (result, numbers)
    }
}

#[test]
fn a_gradient_that_fails_fails_the_step_and_nothing_else() {
    let mut faults = Faults::new(json!({}));
    for (fault, status, words) in [
        (Fault::FeaturesFail, Status::HostFailed, "host features: no room for features"),
        (Fault::FeaturesChannels, Status::ShapeMismatch, "[2, 16, 2, 2], expected [2, 32, h, w]"),
        (Fault::FeaturesRank, Status::ShapeMismatch, "[2, 128], expected [2, 32, h, w]"),
        (Fault::VjpFails, Status::HostFailed, "host vjp: no room for a gradient"),
        (Fault::VjpShort, Status::HostFailed, "2047 values for a view of shape [2, 4, 16, 16]"),
        (Fault::Cancel, Status::Cancelled, "cancelled"),
    ] {
        let (result, numbers) = faults.step(fault);
        let error = result.unwrap_err();
        assert_eq!(error.status, status, "{fault:?}: {error}");
        assert!(error.message.contains(words), "{fault:?}: {error}");
        assert_eq!(float_bits(&numbers), float_bits(&faults.start), "{fault:?}");
        // The next step is as good as any.
        let (result, numbers) = faults.step(Fault::None);
        result.unwrap();
        assert_eq!(float_bits(&numbers), float_bits(&faults.good), "after {fault:?}");
    }
}

#[test]
fn a_gradient_that_is_not_finite_never_reaches_the_latents() {
    let mut faults = Faults::new(json!({}));
    let faults_of_item = |item| [Fault::FeaturesNan(item), Fault::VjpNan(item), Fault::VjpInfinite(item)];
    for (item, fault) in [0, 1].into_iter().flat_map(|item| faults_of_item(item).map(|fault| (item, fault))) {
        let fine = 1 - item;
        let (result, numbers) = faults.step(fault);
        let report = result.unwrap();
        assert_eq!(
            (report.items[item].status, report.items[fine].status),
            (Status::NonFinite, Status::Ok),
            "{fault:?}"
        );
        assert_eq!(report.items[item].correction_norm, 0.);
        let rows = |numbers: &[f32], item: usize| float_bits(&numbers[item * ITEM..][..ITEM]);
        assert_eq!(rows(&numbers, item), rows(&faults.start, item), "{fault:?}");
        assert_eq!(rows(&numbers, fine), rows(&faults.good, fine), "{fault:?}");
    }
}

#[test]
fn a_single_gradient_that_is_not_finite_is_an_error() {
    let texts = Texts::of(&[0]);
    let host = Arc::new(Lender::new(&texts));
    let mut instance = running(host.clone(), &host_config(json!({"max_correction": 0.1})), &texts);
    let start = latents(1, 1);
    for fault in [Fault::FeaturesNan(0), Fault::VjpNan(0), Fault::VjpInfinite(0)] {
        host.set(fault);
        let mut numbers = start.clone();
        let error = correct(&mut instance, &step(0), &mut numbers).unwrap_err();
        assert_eq!(error.status, Status::NonFinite, "{fault:?}: {error}");
        let what = if fault == Fault::FeaturesNan(0) { "features" } else { "gradient" };
        assert!(error.message.contains(what), "{fault:?}: {error}");
        assert_eq!(float_bits(&numbers), float_bits(&start), "{fault:?}");
    }
}

#[test]
fn a_score_that_is_only_monitored_takes_no_gradient_and_says_when_it_is_none() {
    let mut faults = Faults::new(json!({"eta": 0., "monitor": true}));
    assert_eq!(float_bits(&faults.good), float_bits(&faults.start));
    let released = faults.host.released();
    let (result, numbers) = faults.step(Fault::FeaturesNan(1));
    let report = result.unwrap();
    assert_eq!(faults.host.released(), released + 1);
    assert_eq!(statuses(&report), [Status::Ok, Status::NonFinite]);
    assert!(report.items[0].score.is_finite() && report.items[0].gradient_norm.is_nan());
    assert_eq!(float_bits(&numbers), float_bits(&faults.start));
}

#[test]
fn cancelling_before_a_step_leaves_the_latents() {
    let texts = Texts::of(&[0]);
    let host = Arc::new(Plain::default());
    let mut instance = running(host.clone(), &own_config(json!({})), &texts);
    host.cancelled.store(true, std::sync::atomic::Ordering::SeqCst);
    let mut numbers = latents(1, 1);
    assert_eq!(correct(&mut instance, &step(0), &mut numbers).unwrap_err().status, Status::Cancelled);
    assert_eq!(float_bits(&numbers), float_bits(&latents(1, 1)));
    host.cancelled.store(false, std::sync::atomic::Ordering::SeqCst);
    correct(&mut instance, &step(0), &mut numbers).unwrap();
    assert_ne!(float_bits(&numbers), float_bits(&latents(1, 1)));
}
