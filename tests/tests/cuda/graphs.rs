//! A run's steps as CUDA graphs: each is what it is done the plain way, and one graph serves a run.

use std::sync::Arc;
use std::thread;

use host_api::host::{Host, Instance};
use host_api::{ItemReport, Status};
use log::Level::{Debug, Warn};
use serde_json::{Value, json};
use tests::dpt::{STEPS, Texts, correct, difference, host_config, latents, norm, own_config, run, running, step};
use tests::hosts::{Lender, Log, Plain};

/// Step `index`, asked for by a thread of its own. In the last, one item's latents are not finite.
fn done(instance: &mut Instance, index: usize) -> (Vec<f32>, Vec<ItemReport>) {
    let mut numbers = latents(10 * index as u32, 2);
    if index == STEPS - 1 {
        numbers[7] = f32::NAN;
    }
    let report = thread::scope(|scope| scope.spawn(|| correct(instance, &step(index), &mut numbers)).join().unwrap());
    (numbers, report.unwrap().items)
}

/// Two runs with other texts.
fn are_the_same(config: &Value, host: impl Fn() -> (Arc<dyn Host>, Arc<Log>), tolerance: f64) {
    let texts = [Texts::of(&[0, 2]), Texts::of(&[1, 3])];
    let of = |graphs: bool| {
        let (host, log) = host();
        let mut instance = running(host, &tests::dpt::with(config.clone(), json!({"cuda_graphs": graphs})), &texts[0]);
        let mut all: Vec<_> = (0..STEPS).map(|index| done(&mut instance, index)).collect();
        instance.end().unwrap();
        instance.begin(&run(2, texts[1].text())).unwrap();
        all.extend((0..STEPS).map(|index| done(&mut instance, index)));
        let count =
            |level| log.messages().iter().filter(|(l, text)| *l == level && text.contains("CUDA graph")).count();
        assert_eq!((count(Debug), count(Warn)), (if graphs { 2 } else { 0 }, 0), "{:?}", log.messages());
        all
    };
    for (i, ((found, reports), (expected, others))) in of(true).iter().zip(&of(false)).enumerate() {
        for (item, (report, other)) in reports.iter().zip(others).enumerate() {
            let range = item * 1024..(item + 1) * 1024;
            assert_eq!(report.status, other.status, "step {i}");
            if report.status == Status::NonFinite {
                continue;
            }
            let before = &latents(10 * (i % STEPS) as u32, 2)[range.clone()];
            let [found, expected] = [found, expected].map(|latents| difference(&latents[range.clone()], before));
            let error = norm(&difference(&found, &expected)) / norm(&expected);
            assert!(error < tolerance, "{config}: step {i}, item {item}: {error:.1e}");
            assert!((report.score - other.score).abs() < tolerance as f32, "{config}: step {i}");
        }
    }
}

#[test]
fn of_the_plugins_own_unet() {
    for (dtype, tolerance) in [("f32", 1e-4), ("f16", 1e-2), ("bf16", 5e-2)] {
        let host = || {
            let host = Arc::new(Plain::default());
            (host.clone() as Arc<dyn Host>, host.log.clone())
        };
        are_the_same(&own_config(json!({"dtype": dtype})), host, tolerance);
    }
}

/// There the adapter alone.
#[test]
fn of_a_host_that_lends_its_unet() {
    let texts = Texts::of(&[0, 2]);
    let host = || {
        let host = Arc::new(Lender::new(&texts));
        (host.clone() as Arc<dyn Host>, host.log.clone())
    };
    are_the_same(&host_config(json!({})), host, 1e-4);
}
