//! What hosts and plugins lend each other: the host's weights and its progress bar, and the two halves of a plugin's step.

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::probe::Probes;
use common::{TestHost, model, run, step};
use half::{bf16, f16};
use host_api::host::{Host, Instance, Library, Weights};
use host_api::plugin::{HostHandle, Latents, Plugin};
use host_api::{
    Descriptor, Device, Dtype, Error, Lent, Model, Needs, Outcome, Report, Result, Run, Status, Step, View, ViewMut,
};

/// A plugin that adds up the host's weights, and whose step has two halves.
struct Borrower {
    host: HostHandle,
    behaviour: String,
    sum: f32,
}

impl Plugin for Borrower {
    const DESCRIPTOR: Descriptor =
        Descriptor { id: "borrower", name: "Borrower", version: "1", vendor: "tests", description: "" };
    const SPLIT: bool = true;

    fn create(host: HostHandle, config: &str) -> Result<Self> {
        if let Some(weights) = host.weights() {
            assert_eq!(weights.revision().unwrap_err().status, Status::InvalidState, "not in create");
        }
        Ok(Self { host, behaviour: config.into(), sum: 0. })
    }

    fn prepare(&mut self, _model: &Model<'_>, _device: Device) -> Result<()> {
        let Some(weights) = self.host.weights() else { return Ok(()) };
        let elsewhere = weights.clone();
        let outside = std::thread::spawn(move || elsewhere.revision()).join().unwrap();
        assert_eq!(outside.unwrap_err().status, Status::InvalidState, "not on another thread");
        let names = weights.names()?;
        for index in 0..names.len() {
            let values = weights.tensor(index, |tensor| Ok(tensor.to_vec()))?;
            self.sum += values.iter().sum::<f32>() + weights.tensor_revision(index)? as f32 * 1000.;
            self.host.progress("add up", index + 1, names.len());
        }
        if self.behaviour == "one too many" {
            weights.tensor(names.len(), |_| Ok(()))?;
        }
        Ok(())
    }

    fn needs(&self) -> Needs {
        Needs { weights: self.behaviour == "needs weights", ..Needs::default() }
    }

    fn begin(&mut self, _run: &Run<'_>) -> Result<()> {
        self.host.weights().map_or(Ok(()), |weights| weights.revision().map(drop))
    }

    fn step(&mut self, _step: &Step<'_>, latents: &mut Latents<'_>, _report: &mut Report) -> Result<()> {
        latents.write_item(0, &vec![self.sum; latents.item_len()])
    }

    fn score(
        &mut self,
        step: &Step<'_>,
        features: Option<&View<'_>>,
        cotangent: Option<Dtype>,
        report: &mut Report,
    ) -> Result<Option<Lent>> {
        if step.index == 1 {
            report.outcome = Outcome::SkippedInterval;
        }
        match self.behaviour.as_str() {
            "score panics" => panic!("score, as told"),
            "score fails" => return Err(Error::new(Status::NonFinite, "score, as told")),
            "short cotangent" => return Lent::new(vec![0f32], &[1]).map(Some),
            _ => {}
        }
        let Some(features) = features else { return Ok(None) };
        let numbers = features.to_vec();
        report.items[0].score = numbers.iter().sum();
        let doubled = || Lent::new(numbers.iter().map(|value| 2. * value).collect(), features.shape());
        cotangent.map(|_| doubled()).transpose()
    }

    fn apply(
        &mut self,
        _step: &Step<'_>,
        latents: &mut Latents<'_>,
        gradient: &View<'_>,
        report: &mut Report,
    ) -> Result<()> {
        for item in 0..latents.shape()[0] {
            let (z, gradient) = (latents.read_item(item), gradient.item(item).to_vec());
            let sum: Vec<f32> = z.iter().zip(gradient).map(|(z, g)| z + g).collect();
            latents.write_item(item, &sum)?;
        }
        if self.behaviour == "second item fails" {
            report.items[1].status = Status::NonFinite;
        }
        if self.behaviour == "apply fails" {
            return Err(Error::new(Status::Internal, "apply, as told"));
        }
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        Ok(())
    }

    fn memory(&self) -> u64 {
        0
    }
}

host_api::plugin_list!(struct Borrowers: Borrower);

/// A host with three tensors of different types.
#[derive(Default)]
struct Lender {
    revision: AtomicU64,
    fault: &'static str,
    progress: Mutex<Vec<(String, u64, u64)>>,
}

impl Host for Lender {
    fn name(&self) -> &str {
        "lender"
    }
    fn version(&self) -> &str {
        "1"
    }
    fn log(&self, _level: log::Level, _message: &str) {}
    fn weights(&self) -> Option<&dyn Weights> {
        Some(self)
    }
    fn progress(&self, task: &str, done: u64, total: u64) {
        self.progress.lock().unwrap().push((task.into(), done, total));
    }
}

impl Weights for Lender {
    fn revision(&self) -> u64 {
        self.revision.load(Ordering::SeqCst)
    }
    fn names(&self) -> Vec<String> {
        ["a.weight", "b.weight", "c.weight"].map(str::to_owned).to_vec()
    }
    fn tensor_revision(&self, name: &str) -> Result<u64> {
        if self.fault == "revision" { Err(Error::new(Status::NotFound, format!("no {name}"))) } else { Ok(7) }
    }
    fn tensor(&self, name: &str) -> Result<Lent> {
        match (self.fault, name) {
            ("fails", "b.weight") => Err(Error::new(Status::OutOfMemory, "no room for b")),
            ("panics", "b.weight") => panic!("b, as told"),
            ("shape", "b.weight") => Lent::new(vec![1f32; 2], &[3]),
            (_, "a.weight") => Lent::new(vec![1f32, 2., 3., 4.], &[2, 2]),
            (_, "b.weight") => Lent::new(vec![f16::from_f32(0.5); 2], &[2]),
            _ => Lent::new(vec![bf16::from_f32(100.)], &[]),
        }
    }
}

fn create(host: Arc<dyn Host>, behaviour: &str) -> Instance {
    Library::linked::<Borrowers>().unwrap().create("borrower", host, behaviour).unwrap()
}

fn small() -> Model<'static> {
    Model { latent_channels: 1, ..model() }
}

fn running(host: Arc<dyn Host>, behaviour: &str) -> Instance {
    let mut instance = create(host, behaviour);
    instance.prepare(&small(), Device::Cpu).unwrap();
    instance.begin(&run(2, 2)).unwrap();
    instance
}

const SHAPE: [usize; 4] = [2, 1, 1, 2];

#[test]
fn weights_of_every_type_cross_with_their_revisions() {
    let host = Arc::new(Lender::default());
    let mut instance = running(host.clone(), "");
    let mut latents = [0f32; 4];
    instance.step_in_place(&step(0, 2), &mut ViewMut::new(&mut latents, &SHAPE).unwrap()).unwrap();
    assert_eq!(latents, [10. + 1. + 100. + 3. * 7000., 21111., 0., 0.]);
    let expected = [1, 2, 3].map(|done| ("add up".to_owned(), done, 3));
    assert_eq!(*host.progress.lock().unwrap(), expected);
}

#[test]
fn a_host_that_fails_to_lend_is_an_error_of_the_call() {
    for (fault, behaviour, status, words) in [
        ("fails", "", Status::HostFailed, "no room for b"),
        ("panics", "", Status::HostFailed, "b, as told"),
        ("shape", "", Status::HostFailed, "b.weight"),
        ("revision", "", Status::HostFailed, "no a.weight"),
        ("", "one too many", Status::HostFailed, "tensor 3 of 3"),
    ] {
        let mut instance = create(Arc::new(Lender { fault, ..Lender::default() }), behaviour);
        let error = instance.prepare(&small(), Device::Cpu).unwrap_err();
        assert!(error.status == status && error.message.contains(words), "{fault}: {error}");
    }
}

#[test]
fn what_a_plugin_needs_must_be_lent() {
    let mut instance = create(Arc::new(TestHost::default()), "needs weights");
    instance.prepare(&small(), Device::Cpu).unwrap();
    assert!(instance.needs().unwrap().weights);
    let error = instance.begin(&run(1, 1)).unwrap_err();
    assert!(error.status == Status::Unsupported && error.message.contains("weights/1"), "{error}");
    let mut instance = create(Arc::new(Lender::default()), "needs weights");
    instance.prepare(&small(), Device::Cpu).unwrap();
    instance.begin(&run(1, 1)).unwrap();
}

#[test]
fn the_halves_of_a_step_do_what_the_plugin_says() {
    let mut instance = running(Arc::new(TestHost::default()), "");
    let mut split = instance.split().unwrap().unwrap();
    assert_eq!(split.outcome(&step(0, 2)).unwrap().outcome, Outcome::Corrected);
    assert_eq!(split.outcome(&step(1, 2)).unwrap().outcome, Outcome::SkippedInterval);

    // Features channels last, a cotangent in half precision with gaps.
    let features = [1f32, 3., 2., 4., 5., 7., 6., 8.];
    let features = View::strided(&features, &[2, 2, 1, 2], &[4, 1, 4, 2], 0).unwrap();
    let mut numbers = [f16::from_f32(-1.); 16];
    let mut cotangent = ViewMut::strided(&mut numbers, &[2, 2, 1, 2], &[8, 4, 4, 2], 1).unwrap();
    let report = split.score(&step(0, 2), &features, &mut cotangent).unwrap();
    assert_eq!((report.outcome, report.items[0].score), (Outcome::Corrected, 36.));
    assert_eq!(cotangent.to_vec(), [2., 4., 6., 8., 10., 12., 14., 16.]);
    assert_eq!(numbers.iter().filter(|value| value.to_f32() == -1.).count(), 8);

    let (latents, gradient) = ([1f32, 2., 3., 4.], [0.5f32, 0.25, -1., 8.]);
    let mut out = [0f32; 4];
    let views = (View::new(&latents, &SHAPE).unwrap(), View::new(&gradient, &SHAPE).unwrap());
    split.apply(&step(0, 2), &views.0, &views.1, &mut ViewMut::new(&mut out, &SHAPE).unwrap()).unwrap();
    assert_eq!(out, [1.5, 2.25, 2., 12.]);
}

#[test]
fn a_half_that_fails_changes_nothing() {
    let latents = [1f32, 2., 3., 4.];
    for (behaviour, status) in
        [("score fails", Status::NonFinite), ("short cotangent", Status::Internal), ("score panics", Status::Panic)]
    {
        let mut instance = running(Arc::new(TestHost::default()), behaviour);
        let mut cotangent = [9f32; 4];
        let mut split = instance.split().unwrap().unwrap();
        let view = View::new(&latents, &SHAPE).unwrap();
        let error = split.score(&step(0, 2), &view, &mut ViewMut::new(&mut cotangent, &SHAPE).unwrap()).unwrap_err();
        assert_eq!((error.status, cotangent), (status, [9.; 4]), "{behaviour}");
    }
    let apply = |behaviour: &str, shape: &[usize]| {
        let mut instance = running(Arc::new(TestHost::default()), behaviour);
        let mut out = latents;
        let gradient = vec![1f32; shape.iter().product()];
        let views = (View::new(&latents, &SHAPE).unwrap(), View::new(&gradient, shape).unwrap());
        let mut split = instance.split().unwrap().unwrap();
        let done = split.apply(&step(0, 2), &views.0, &views.1, &mut ViewMut::new(&mut out, &SHAPE).unwrap());
        (done.map_err(|error| error.status), out)
    };
    assert_eq!(apply("apply fails", &SHAPE).1, latents);
    let (refused, out) = apply("", &[2, 1, 2, 1]);
    assert_eq!((refused.unwrap_err(), out), (Status::ShapeMismatch, latents));
    let (report, out) = apply("second item fails", &SHAPE);
    assert_eq!((report.unwrap().items[1].status, out), (Status::NonFinite, [2., 3., 3., 4.]));
}

#[test]
fn views_and_states_of_the_halves_are_checked() {
    let mut instance = running(Arc::new(TestHost::default()), "");
    let (three, numbers) = ([0f32; 3], [0f32; 4]);
    let mut target = [0f32; 4];
    let mut score = |step: &Step, features: View, shape: &[usize]| {
        let mut cotangent = ViewMut::new(&mut target, shape).unwrap();
        instance.split().unwrap().unwrap().score(step, &features, &mut cotangent).unwrap_err().status
    };
    let whole = || View::new(&numbers, &SHAPE).unwrap();
    assert_eq!(score(&step(0, 2), View::new(&three, &[3, 1, 1, 1]).unwrap(), &SHAPE), Status::ShapeMismatch);
    assert_eq!(score(&step(0, 2), whole(), &[2, 2]), Status::ShapeMismatch);
    assert_eq!(score(&step(0, 3), whole(), &SHAPE), Status::InvalidArgument);
    instance.end().unwrap();
    let mut split = instance.split().unwrap().unwrap();
    assert_eq!(split.outcome(&step(0, 2)).unwrap_err().status, Status::InvalidState);
    // A plugin that does not have them says so by not having the extension.
    let mut probe = Library::linked::<Probes>().unwrap().create("probe", Arc::new(TestHost::default()), "").unwrap();
    assert!(probe.split().unwrap().is_none());
}
