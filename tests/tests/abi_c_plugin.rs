//! The Rust host with a plugin written in C from the header alone.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use half::{bf16, f16};
use host_api::host::{Door, Host, Instance, Library};
use host_api::plugin::ParamKind;
use host_api::{Device, Element, Model, Outcome, Prediction, Run, Space, Status, Step, Text, View, ViewMut};
use tests::cc;

#[derive(Default)]
struct Listener(Mutex<Vec<String>>);

impl Host for Listener {
    fn name(&self) -> &str {
        "listener"
    }
    fn version(&self) -> &str {
        "1"
    }
    fn log(&self, _level: log::Level, message: &str) {
        self.0.lock().unwrap().push(message.to_owned());
    }
}

fn library(name: &str) -> Library {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).unwrap();
    Library::open(cc::library("tiny_plugin", false, &folder)).unwrap()
}

fn prepared(library: &Library, config: &str) -> Instance {
    let mut instance = library.create("tiny", Arc::new(Listener::default()), config).unwrap();
    let model = Model {
        family: "sd1",
        prediction: Prediction::Epsilon,
        unet_in_channels: 4,
        latent_channels: 2,
        alphas_cumprod: &[0.5],
        unet_config: None,
    };
    instance.prepare(&model, Device::Cpu).unwrap();
    instance
}

fn run(batch: usize) -> Run<'static> {
    Run { batch, steps: 1, guidance_scale: 1.0, text: Text::default() }
}

const STEP: Step<'static> = Step {
    index: 0,
    count: 1,
    sub_evaluation: 0,
    timestep: 0.0,
    alpha_bar: 0.5,
    space: Space::Vp,
    extra_inputs: false,
    text: None,
};

#[test]
fn descriptor_parameters_and_errors_cross() {
    let library = library("c_plugin_descriptor");
    assert_eq!(library.door(), Door::C);
    assert_eq!(library.descriptors()[0].id, "tiny");
    let host = Arc::new(Listener::default());
    let error = library.create("tiny", host.clone(), "{}").unwrap_err();
    assert_eq!((error.status, error.message.as_str()), (Status::InvalidConfig, "expected {\"strength\": 0 to 4}"));
    assert_eq!(library.create("other", host.clone(), "").unwrap_err().status, Status::NotFound);
    let mut instance = library.create("tiny", host.clone(), "").unwrap();
    assert_eq!(*host.0.lock().unwrap(), ["tiny: created"]);
    assert_eq!(instance.begin(&run(1)).unwrap_err().status, Status::InvalidState);

    let params = instance.params().unwrap().unwrap();
    let list = params.list().unwrap();
    assert_eq!(list[0].name, "strength");
    assert_eq!(list[0].kind, ParamKind::Float { minimum: 0.0, maximum: 4.0 });
    assert!(list[0].live);
    params.set("strength", 2.0).unwrap();
    assert_eq!(params.get("strength").unwrap(), 2.0);
    assert_eq!(params.set("strength", 5.0).unwrap_err().status, Status::InvalidArgument);
    assert_eq!(params.set("other", 1.0).unwrap_err().status, Status::NotFound);
    assert!(params.schema().unwrap().contains("strength"));
    assert!(instance.lora().unwrap().is_none());
}

/// Doubles `[2, 2, 1, 3]` latents that lie shuffled and in reverse, out of place and in place.
fn doubles<T: Element + PartialEq + std::fmt::Debug>(library: &Library) {
    let mut instance = prepared(library, r#"{"strength": 2}"#);
    instance.begin(&run(2)).unwrap();
    let stored: Vec<T> = (0..12).map(|i| T::from_f32((i as f32 - 5.0) * 0.3)).collect();
    let (shape, strides) = ([2, 2, 1, 3], [-1, 2, 40, 4]);
    let input = View::strided(&stored, &shape, &strides, 1).unwrap();
    let mut target = vec![T::from_f32(0.0); 12];
    let report = instance.step(&STEP, &input, &mut ViewMut::new(&mut target, &shape).unwrap()).unwrap();
    assert_eq!((report.outcome, report.items.len()), (Outcome::Corrected, 2));
    assert!(report.items.iter().all(|item| item.status == Status::Ok && item.correction_norm > 0.0));
    let expected: Vec<T> = input.to_vec().iter().map(|value| T::from_f32(value * 2.0)).collect();
    assert_eq!(target, expected);

    let mut in_place = stored.clone();
    instance.step_in_place(&STEP, &mut ViewMut::strided(&mut in_place, &shape, &strides, 1).unwrap()).unwrap();
    let expected: Vec<T> = stored.iter().map(|value| T::from_f32(value.to_f32() * 2.0)).collect();
    assert_eq!(in_place, expected);
}

#[test]
fn strided_views_of_every_dtype_are_corrected() {
    let library = library("c_plugin_views");
    doubles::<f32>(&library);
    doubles::<f16>(&library);
    doubles::<bf16>(&library);
}

/// The plugin's own conversion of halves, over all of them.
#[test]
fn halves_are_rounded_as_ieee_says() {
    let library = library("c_plugin_halves");
    let mut instance = prepared(&library, r#"{"strength": 0.3}"#);
    instance.begin(&run(1)).unwrap();
    let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).filter(|value| value.is_finite()).collect();
    let shape = [1, 2, 1, all.len() / 2];
    let mut out = vec![f16::ZERO; all.len()];
    instance.step(&STEP, &View::new(&all, &shape).unwrap(), &mut ViewMut::new(&mut out, &shape).unwrap()).unwrap();
    for (before, after) in all.iter().zip(&out) {
        assert_eq!(after.to_bits(), f16::from_f32(before.to_f32() * 0.3).to_bits(), "{before}");
    }
}

#[test]
fn an_empty_batch_is_no_error() {
    let library = library("c_plugin_empty");
    let mut instance = prepared(&library, "");
    instance.begin(&run(0)).unwrap();
    let report = instance.step_in_place(&STEP, &mut ViewMut::new(&mut [0f32; 0], &[0, 2, 1, 3]).unwrap()).unwrap();
    assert_eq!((report.outcome, report.items.len()), (Outcome::SkippedEmpty, 0));
}

#[test]
fn an_item_that_is_not_finite_is_left_alone() {
    let library = library("c_plugin_finite");
    let mut instance = prepared(&library, r#"{"strength": 3}"#);
    instance.begin(&run(2)).unwrap();
    let mut latents = [1.0f32, 2.0, f32::MAX, 4.0];
    let report = instance.step_in_place(&STEP, &mut ViewMut::new(&mut latents, &[2, 2, 1, 1]).unwrap()).unwrap();
    assert_eq!(report.items.iter().map(|item| item.status).collect::<Vec<_>>(), [Status::Ok, Status::NonFinite]);
    assert_eq!(latents, [3.0, 6.0, f32::MAX, 4.0]);
}
