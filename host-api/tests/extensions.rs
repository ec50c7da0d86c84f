//! Parameters, LoRA and the host's gradient through the safe types.

mod common;

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use common::probe::{Probes, lora, params};
use common::{TestHost, run, scratch, step};
use half::bf16;
use host_api::host::{Gradient, Host, Instance, Library};
use host_api::plugin::{LoraLayout, ParamKind};
use host_api::{Device, Error, Model, Result, Status, Step, Text, View, ViewMut};
use safetensors::SafeTensors;

fn create(host: Arc<dyn Host>, behaviour: &str) -> Instance {
    Library::linked::<Probes>().unwrap().create("probe", host, behaviour).unwrap()
}

fn prepared(host: Arc<dyn Host>, behaviour: &str) -> Instance {
    let mut instance = create(host, behaviour);
    instance.prepare(&Model { latent_channels: 2, ..common::model() }, Device::Cpu).unwrap();
    instance
}

#[test]
fn parameters_cross_whole() {
    let instance = create(Arc::new(TestHost::default()), "");
    let handle = instance.params().unwrap().unwrap();
    assert_eq!(handle.list().unwrap(), params().specs());
    assert_eq!(handle.schema().unwrap(), r#"{"type":"object"}"#);
    for (name, wrong) in
        [("amount", 8.5), ("amount", f64::NAN), ("count", 2.5), ("on", 2.0), ("tap", 2.0), ("tap", -1.0)]
    {
        let before = handle.get(name).unwrap();
        assert_eq!(handle.set(name, wrong).unwrap_err().status, Status::InvalidArgument, "{name} = {wrong}");
        assert_eq!(handle.get(name).unwrap(), before);
    }
    handle.set("tap", 0.0).unwrap();
    assert_eq!(handle.get("tap").unwrap(), 0.0);
    assert!(matches!(&handle.list().unwrap()[3].kind, ParamKind::Choice(names) if names == &["first", "second"]));
}

#[test]
fn only_live_parameters_change_after_prepare() {
    let instance = prepared(Arc::new(TestHost::default()), "");
    let handle = instance.params().unwrap().unwrap();
    let error = handle.set("count", 4.0).unwrap_err();
    assert_eq!(error.status, Status::InvalidState);
    assert!(error.message.contains("count") && error.message.contains("CREATED"), "{error}");
    assert_eq!(handle.get("count").unwrap(), 3.0);
    handle.set("amount", -2.0).unwrap();
    assert_eq!(handle.get("amount").unwrap(), -2.0);
}

#[test]
fn parameters_can_be_turned_during_a_step() {
    let host = Arc::new(TestHost::default());
    let mut instance = prepared(host.clone(), "step waits");
    let handle = instance.params().unwrap().unwrap();
    instance.begin(&run(1, 1)).unwrap();
    std::thread::scope(|scope| {
        let stepping = scope.spawn(move || {
            let mut latents = [0.0f32; 2];
            let mut view = ViewMut::new(&mut latents, &[1, 2, 1, 1]).unwrap();
            instance.step_in_place(&step(0, 1), &mut view).unwrap_err().status
        });
        while !host.messages.lock().unwrap().iter().any(|(_, message)| message == "waiting") {
            std::thread::yield_now();
        }
        handle.set("amount", 5.0).unwrap();
        assert_eq!(handle.get("amount").unwrap(), 5.0);
        assert_eq!(handle.set("count", 5.0).unwrap_err().status, Status::Busy);
        host.cancel.store(true, Ordering::Relaxed);
        assert_eq!(stepping.join().unwrap(), Status::Cancelled);
    });
    assert_eq!(handle.get("amount").unwrap(), 5.0, "the handle keeps the instance alive");
}

#[test]
fn merging_adds_the_product_and_rounds_once() {
    let instance = create(Arc::new(TestHost::default()), "");
    let handle = instance.lora().unwrap().unwrap();
    assert_eq!(handle.entries().unwrap(), lora().entries());
    // down = [[-2, -1, 0], [1, 2, 3]], up = [[3, 2], [1, 0], [-1, -2], [-3, -4]], scale = 0.5, by hand:
    let product = [-4.0, 1.0, 6.0, -2.0, -1.0, 0.0, 0.0, -3.0, -6.0, 2.0, -5.0, -12.0];
    let mut weight = vec![10.0f32; 12];
    handle.merge(0, 2.0, &mut ViewMut::new(&mut weight, &[4, 3]).unwrap()).unwrap();
    assert_eq!(weight, product.map(|value| 10.0 + value));
    // Transposed bf16 memory: 1 + 0.25 * 0.5 * product, rounded once.
    let mut narrow = vec![bf16::ONE; 12];
    handle.merge(0, 0.25, &mut ViewMut::strided(&mut narrow, &[4, 3], &[1, 4], 0).unwrap()).unwrap();
    for (index, value) in product.iter().enumerate() {
        assert_eq!(narrow[index % 3 * 4 + index / 3], bf16::from_f32(1.0 + 0.125 * value), "{index}");
    }
    let mut wrong = ViewMut::new(&mut weight, &[3, 4]).unwrap();
    assert_eq!(handle.merge(0, 1.0, &mut wrong).unwrap_err().status, Status::ShapeMismatch);
    assert_eq!(handle.merge(2, 1.0, &mut wrong).unwrap_err().status, Status::InvalidArgument);
    assert_eq!(handle.merge(0, f64::NAN, &mut wrong).unwrap_err().status, Status::InvalidArgument);
}

#[test]
fn written_files_have_the_names_and_numbers() {
    let handle = create(Arc::new(TestHost::default()), "").lora().unwrap().unwrap();
    let folder = scratch("lora_files");
    for (layout, prefix, down, up) in [
        (LoraLayout::Peft, "unet.mid_block.attentions.0.to_q", "lora_A", "lora_B"),
        (LoraLayout::Kohya, "lora_unet_mid_block_attentions_0_to_q", "lora_down", "lora_up"),
    ] {
        let path = folder.join("lora.safetensors");
        handle.write(&path, layout).unwrap(); // the second time over the first file
        let bytes = std::fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), if layout == LoraLayout::Kohya { 6 } else { 4 });
        let numbers = |name: &str| {
            let tensor = file.tensor(&format!("{prefix}.{name}")).unwrap();
            let numbers = tensor.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
            (tensor.shape().to_vec(), numbers.collect::<Vec<f32>>())
        };
        let entry = lora().entries()[0].clone();
        assert_eq!(numbers(&format!("{down}.weight")), (vec![2, 3], entry.down));
        assert_eq!(numbers(&format!("{up}.weight")), (vec![4, 2], entry.up));
        if layout == LoraLayout::Kohya {
            assert_eq!(numbers("alpha"), (vec![], vec![1.0]), "scale 0.5 times rank 2");
        }
    }
    let error = handle.write(&folder.join("missing/lora.safetensors"), LoraLayout::Peft).unwrap_err();
    assert_eq!(error.status, Status::NotFound);
    std::fs::create_dir(folder.join("taken")).unwrap();
    handle.write(&folder.join("taken"), LoraLayout::Peft).unwrap_err();
    let mut left: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["lora.safetensors", "taken"], "nothing is left of the failed writes");
}

/// Features are twice the latents; the gradient is three times the cotangent.
struct Line {
    failing: &'static str,
    calls: Arc<Mutex<Vec<String>>>,
}

impl Line {
    fn called(&self, call: String) -> Result<()> {
        let name = call.split(' ').next().unwrap().to_owned();
        self.calls.lock().unwrap().push(call);
        match self.failing {
            failing if failing == format!("{name} panics") => panic!("{name}, as told"),
            failing if failing == format!("{name} fails") => Err(Error::new(Status::OutOfMemory, "no room")),
            _ => Ok(()),
        }
    }
}

impl Gradient for Line {
    fn features(&self, step: &Step<'_>, latents: &View<'_>, tap: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let prompts = step.text.and_then(|text| text.prompts.map(|prompts| prompts.join("|"))).unwrap_or_default();
        self.called(format!("features {tap} {} {prompts}", step.timestep))?;
        let numbers = latents.to_vec().iter().map(|value| value * 2.0).collect();
        let shape = if self.failing == "shape is wrong" { vec![1, 1] } else { latents.shape().to_vec() };
        Ok((shape, numbers))
    }
    fn vjp(&self, cotangent: &View<'_>) -> Result<Vec<f32>> {
        self.called("vjp".into())?;
        Ok(cotangent.to_vec().iter().map(|value| value * 3.0).collect())
    }
    fn release(&self) {
        self.called("release".into()).unwrap();
    }
}

/// One step with that host; the result, the latents after it, and the calls that the host saw.
fn gradient_step(failing: &'static str, leave_activation: bool) -> (Result<f32>, [f32; 4], Vec<String>) {
    let calls = Arc::new(Mutex::new(Vec::new()));
    let line = Line { failing, calls: calls.clone() };
    let host = Arc::new(TestHost { gradient: Some(Box::new(line)), ..TestHost::default() });
    let mut instance = prepared(host, "gradient");
    let needs = instance.needs().unwrap();
    assert_eq!((needs.gradient, needs.tap.as_str()), (true, "mid"));
    instance.params().unwrap().unwrap().set("on", f64::from(u8::from(leave_activation))).unwrap();
    instance.begin(&run(2, 1)).unwrap();
    let mut latents = [1.0f32, 2.0, 3.0, 4.0];
    let mut view = ViewMut::new(&mut latents, &[2, 2, 1, 1]).unwrap();
    let prompts = ["a cat".to_owned(), "ein Kätzchen".to_owned()];
    let step = Step { text: Some(Text { prompts: Some(&prompts), ..Text::default() }), ..step(0, 1) };
    let result = instance.step_in_place(&step, &mut view).map(|report| report.items[0].gradient_norm);
    drop(instance);
    let calls = calls.lock().unwrap().clone();
    (result, latents, calls)
}

const FEATURES: &str = "features mid 1 a cat|ein Kätzchen";

#[test]
fn the_hosts_gradient_makes_the_round_trip() {
    let (result, latents, calls) = gradient_step("", false);
    assert_eq!(result.unwrap(), (36.0f32 * (1.0 + 4.0 + 9.0 + 16.0)).sqrt());
    assert_eq!(latents, [7.0, 14.0, 21.0, 28.0]);
    assert_eq!(calls, [FEATURES, "vjp"]);
}

#[test]
fn an_activation_that_is_left_is_released() {
    let (result, latents, calls) = gradient_step("", true);
    assert_eq!(result.unwrap_err().status, Status::Internal);
    assert_eq!(latents, [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(calls, [FEATURES, "release"]);
}

#[test]
fn the_hosts_failures_reach_the_caller() {
    for (failing, part) in [
        ("features fails", "host features: no room"),
        ("features panics", "host features: panic: features, as told"),
        ("shape is wrong", "host features: shape [1, 1] does not fit"),
        ("vjp fails", "host vjp: no room"),
        ("vjp panics", "host vjp: panic: vjp, as told"),
    ] {
        let (result, latents, _) = gradient_step(failing, false);
        let error = result.unwrap_err();
        assert_eq!(error.status, Status::HostFailed, "{failing}: {error}");
        assert!(error.message.contains(part), "{failing}: {error}");
        assert_eq!(latents, [1.0, 2.0, 3.0, 4.0]);
    }
}

#[test]
fn begin_says_what_the_host_lacks() {
    for (behaviour, status) in
        [("gradient", Status::Unsupported), ("context", Status::InvalidArgument), ("pooled", Status::InvalidArgument)]
    {
        let mut instance = prepared(Arc::new(TestHost::default()), behaviour);
        let error = instance.begin(&run(1, 1)).unwrap_err();
        assert_eq!(error.status, status, "{error}");
        assert!(error.message.contains(behaviour), "{error}");
    }
    let context = [0.0f32; 6];
    let mut run = run(1, 1);
    run.text.context = Some(View::new(&context, &[1, 2, 3]).unwrap());
    run.text.end_of_text = Some(&[1]);
    prepared(Arc::new(TestHost::default()), "pooled").begin(&run).unwrap();
    run.text.end_of_text = Some(&[2]);
    let error = prepared(Arc::new(TestHost::default()), "pooled").begin(&run).unwrap_err();
    assert!(error.message.contains("end_of_text 2"), "{error}");
    run.text = Text { context: Some(View::new(&context, &[2, 1, 3]).unwrap()), ..Text::default() };
    let error = prepared(Arc::new(TestHost::default()), "context").begin(&run).unwrap_err();
    assert_eq!(error.status, Status::ShapeMismatch);
    run.text = Text { prompts: Some(&[]), ..Text::default() };
    assert_eq!(prepared(Arc::new(TestHost::default()), "").begin(&run).unwrap_err().status, Status::ShapeMismatch);
}
