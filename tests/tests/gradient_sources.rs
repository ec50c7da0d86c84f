//! Whoever computes the gradient, the corrected run is the same: the host, the plugin's own U-Net from a file, the plugin's own on
//! the host's weights, or the host between the two halves of a step.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Tensor};
use diffusion::lora::LoraFile;
use diffusion::scheduler::Scheduler;
use diffusion::{LoraEntry, UNet};
use host_api::host::{Host, Instance, Weights};
use host_api::{Lent, Result, Status, Step, View, ViewMut};
use host_demo::{Mode, PluginChoice, Request, RunOutcome, Session};
use serde_json::{Value, json};
use tests::dpt::{
    Texts, correct, create, float_bits, host_config, latents, model, own_config, run as dpt_run, running, step,
    unet_config,
};
use tests::hosts::{Lender as GradientLender, plain};
use tests::{
    FAMILIES, assert_close, committed, device, device_name, plugin_library, relative_error, tiny_unet, values,
};

const TAPS: [&str; 2] = ["mid", "up1"];

struct Setting {
    family: &'static str,
    tap: &'static str,
}

impl Setting {
    fn all() -> impl Iterator<Item = Self> {
        FAMILIES.into_iter().flat_map(|family| TAPS.map(|tap| Self { family, tap }))
    }

    fn name(&self) -> String {
        format!("{} {}", self.family, self.tap)
    }

    fn model(&self) -> PathBuf {
        committed(&format!("{}-tiny", self.family))
    }

    fn config(&self, source: &str) -> Value {
        let adapter = committed(&format!("{}-cases/release_{}.safetensors", self.family, self.tap));
        let mut config = json!({
            "adapter": adapter, "tap": self.tap, "heads": 4, "matching_queries": 5, "eta": 20., "gradient": source,
            "device": device_name(),
        });
        if source == "plugin" {
            config["base_model"] = json!(self.model());
        }
        config
    }

    fn session(&self, source: &str) -> Session {
        let (library, config) = (plugin_library().to_owned(), self.config(source));
        let plugin = PluginChoice { library, config, split: source == "split" };
        Session::load(&self.model(), DType::F32, device(), Some(&plugin)).unwrap()
    }
}

fn request(scheduler: Scheduler, mode: Mode) -> Request {
    let noise = (values(3, (2, 4, 16, 16)) * 1.4).unwrap();
    let prompts = vec!["a red circle left of a blue square".into(), "naïve café".into()];
    Request { mode, ..Request::new(prompts, scheduler, 3, 5., noise) }
}

fn sample(session: &mut Session, request: &Request) -> RunOutcome {
    session.run(request, &mut |_, _| {}).unwrap()
}

#[test]
fn every_source_gives_the_same_run() {
    for setting in Setting::all() {
        // Sigma space once per family is enough.
        let euler = (setting.tap == "mid").then_some((Scheduler::Euler, Mode::ConditionOnly));
        for (scheduler, mode) in [(Scheduler::Ddim, Mode::Paper)].into_iter().chain(euler) {
            let request = request(scheduler, mode);
            let host = sample(&mut setting.session("host"), &request);
            for source in ["plugin", "weights", "split"] {
                let other = sample(&mut setting.session(source), &request);
                let what = format!("{} {source}, {scheduler}", setting.name());
                assert_close(&what, &other.latents, &host.latents, 1e-5);
                for (found, expected) in other.steps.iter().zip(&host.steps) {
                    assert_eq!(found.outcome, expected.outcome, "{what}");
                    for (found, expected) in found.items.iter().zip(&expected.items) {
                        // A cosine is as exact as 1 is.
                        assert!(
                            (found.score.unwrap() - expected.score.unwrap()).abs() < 1e-6,
                            "{what}: {found:?} {expected:?}"
                        );
                        let near =
                            |a: Option<f32>, b: Option<f32>| (a.unwrap() - b.unwrap()).abs() < 1e-4 * b.unwrap().abs();
                        assert!(near(found.gradient_norm, expected.gradient_norm), "{what}: {found:?} {expected:?}");
                    }
                }
            }
        }
    }
}

/// PyTorch's runs (Eq. 9) with the sources that parity_runs does not try.
#[test]
fn parity_of_paper_runs_on_the_hosts_weights_and_in_halves() {
    for setting in Setting::all() {
        let stem = format!("{}-cases/correction_{}.safetensors", setting.family, setting.tap);
        let tensors = candle_core::safetensors::load(committed(&stem), device()).unwrap();
        let prompts = vec!["a red circle left of a blue square".to_owned(); 2];
        let request = Request::new(prompts, Scheduler::Ddim, 6, 5., tensors["start"].clone());
        for source in ["weights", "split"] {
            let found = sample(&mut setting.session(source), &request);
            let expected = tensors["latents.paper"].get(5).unwrap();
            assert_close(&format!("{} {source}", setting.name()), &found.latents, &expected, 1e-3);
        }
    }
}

/// The host merges LoRAs of its own into its U-Net; the plugin's own U-Net on the host's weights sees them, one from a file does
/// not.
#[test]
fn weights_with_a_host_side_lora_give_the_host_gradients_numbers() {
    for setting in Setting::all() {
        let lora = [(committed(&format!("{}-cases/lora_peft.safetensors", setting.family)), 2.)];
        let request = request(Scheduler::Ddim, Mode::Paper);
        let run = |source: &str, lora: &[(PathBuf, f64)]| {
            let mut session = setting.session(source);
            session.set_lora(lora).unwrap();
            sample(&mut session, &request)
        };
        let [host, weights, split] = ["host", "weights", "split"].map(|source| run(source, &lora));
        let without = run("weights", &[]);
        for other in [&weights, &split] {
            assert_close(&setting.name(), &other.latents, &host.latents, 1e-5);
            for (found, expected) in other.steps.iter().zip(&host.steps) {
                let norm = |step: &host_demo::StepRecord| f64::from(step.items[0].gradient_norm.unwrap());
                assert!((norm(found) / norm(expected) - 1.).abs() < 1e-4);
            }
        }
        assert!(relative_error(&without.latents, &host.latents) > 1e-2, "{}", setting.name());
        // A file knows nothing of the host's LoRA.
        assert!(relative_error(&run("plugin", &lora).latents, &host.latents) > 1e-3, "{}", setting.name());
    }
}

/// A host that lends weights alone and counts what is read.
struct WeightLender {
    unet: Mutex<UNet>,
    read: AtomicUsize,
    fault: Mutex<Fault>,
}

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    Nan,
    Shape,
    Missing,
    Extra,
}

const SPOILT: &str = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight";

impl WeightLender {
    fn new() -> Arc<Self> {
        Self::with(Fault::None)
    }

    fn with(fault: Fault) -> Arc<Self> {
        let unet = Mutex::new(tiny_unet("sd1", DType::F32));
        Arc::new(Self { unet, read: AtomicUsize::new(0), fault: Mutex::new(fault) })
    }

    fn taken(&self) -> usize {
        self.read.swap(0, Ordering::SeqCst)
    }
}

impl Host for WeightLender {
    fn name(&self) -> &str {
        "weight lender"
    }
    fn version(&self) -> &str {
        "1"
    }
    fn log(&self, _level: log::Level, _message: &str) {}
    fn weights(&self) -> Option<&dyn Weights> {
        Some(self)
    }
}

impl Weights for WeightLender {
    fn revision(&self) -> u64 {
        self.unet.lock().unwrap().revision()
    }
    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.unet.lock().unwrap().weights().keys().cloned().collect();
        match *self.fault.lock().unwrap() {
            Fault::Missing => names.retain(|name| name != SPOILT),
            Fault::Extra => names.push("mid_block.strange.weight".into()),
            _ => {}
        }
        names
    }
    fn tensor_revision(&self, name: &str) -> Result<u64> {
        let unet = self.unet.lock().unwrap();
        let fault = *self.fault.lock().unwrap();
        // The faults come with a revision of their own.
        let spoilt = name == SPOILT && fault != Fault::None;
        Ok(if spoilt { u64::MAX } else { unet.weights().get(name).map_or(1, |weight| weight.revision) })
    }
    fn tensor(&self, name: &str) -> Result<Lent> {
        self.read.fetch_add(1, Ordering::SeqCst);
        let unet = self.unet.lock().unwrap();
        let Some(weight) = unet.weights().get(name) else { return Lent::new(vec![0f32], &[1]) };
        let mut values: Vec<f32> = weight.tensor.flatten_all().unwrap().to_vec1().unwrap();
        let mut shape = weight.tensor.dims().to_vec();
        match *self.fault.lock().unwrap() {
            Fault::Nan if name == SPOILT => values[3] = f32::NAN,
            Fault::Shape if name == SPOILT => shape = vec![shape[0] / 2, shape[1] * 2],
            _ => {}
        }
        Lent::new(values, &shape)
    }
}

fn weights_config() -> Value {
    host_config(json!({"gradient": "weights"}))
}

fn lora() -> Vec<LoraEntry> {
    LoraFile::open(&committed("sd1-cases/lora_peft.safetensors"), device()).unwrap().entries
}

fn corrected(instance: &mut Instance, index: usize) -> Vec<f32> {
    let mut numbers = latents(1, 2);
    correct(instance, &step(index), &mut numbers).unwrap();
    numbers
}

#[test]
fn a_change_of_the_hosts_weights_is_seen_at_the_next_step() {
    let (host, texts) = (WeightLender::new(), Texts::of(&[0, 2]));
    let mut instance = running(host.clone(), &weights_config(), &texts);
    let all = host.taken();
    assert!(all > 100);
    let before = corrected(&mut instance, 0);
    assert_eq!(float_bits(&corrected(&mut instance, 0)), float_bits(&before));
    assert_eq!(host.taken(), 0, "nothing has changed");

    host.unet.lock().unwrap().merge_lora(&lora(), 1.).unwrap();
    let merged = corrected(&mut instance, 0);
    // Of the four projections two lie before the tap: those of down_blocks.0 and mid_block.
    assert_eq!(host.taken(), 2, "what has changed is read, nothing else");
    assert_ne!(float_bits(&merged), float_bits(&before));
    // The same weights from the beginning are the same numbers.
    let other = WeightLender::new();
    other.unet.lock().unwrap().merge_lora(&lora(), 1.).unwrap();
    assert_eq!(float_bits(&corrected(&mut running(other, &weights_config(), &texts), 0)), float_bits(&merged));

    host.unet.lock().unwrap().restore_lora();
    assert_eq!(float_bits(&corrected(&mut instance, 0)), float_bits(&before));
    // Between runs as well.
    host.unet.lock().unwrap().merge_lora(&lora(), 1.).unwrap();
    instance.end().unwrap();
    instance.begin(&dpt_run(2, texts.text())).unwrap();
    assert_eq!(float_bits(&corrected(&mut instance, 0)), float_bits(&merged));
}

#[test]
fn what_the_host_lends_is_checked() {
    for (fault, status, words) in [
        (Fault::Nan, Status::InvalidData, "holds NaN or infinity"),
        (Fault::Shape, Status::InvalidData, "expected [32, 32]"),
        (Fault::Missing, Status::InvalidData, "is missing"),
        (Fault::Extra, Status::InvalidData, "mid_block.strange.weight"),
    ] {
        let mut instance = create(WeightLender::with(fault), &weights_config()).unwrap();
        let config = unet_config(&committed("sd1-tiny"));
        let error = instance.prepare(&model(&config), host_api::Device::Cpu).unwrap_err();
        assert!(error.status == status && error.message.contains(words), "{error}");
        assert!(error.message.contains("weight lender"), "{error}");
        if fault != Fault::Extra {
            assert!(error.message.contains(SPOILT), "{error}");
        }
    }
    // Without the configuration nobody knows what the tensors mean.
    let mut instance = create(WeightLender::new(), &weights_config()).unwrap();
    let blind = host_api::Model { unet_config: None, ..model("") };
    let error = instance.prepare(&blind, host_api::Device::Cpu).unwrap_err();
    assert!(error.status == Status::Unsupported && error.message.contains("U-Net's configuration"), "{error}");
    // A host that lends nothing.
    let mut instance = create(plain(), &weights_config()).unwrap();
    let config = unet_config(&committed("sd1-tiny"));
    let error = instance.prepare(&model(&config), host_api::Device::Cpu).unwrap_err();
    assert!(error.status == Status::Unsupported && error.message.contains("weights/1"), "{error}");

    // Spoilt in the middle of a run: that step fails, the latents stay, and the next good revision counts.
    let (host, texts) = (WeightLender::new(), Texts::of(&[0, 2]));
    let mut instance = running(host.clone(), &weights_config(), &texts);
    let before = corrected(&mut instance, 0);
    *host.fault.lock().unwrap() = Fault::Nan;
    host.unet.lock().unwrap().merge_lora(&[], 1.).unwrap();
    let mut numbers = latents(1, 2);
    let error = correct(&mut instance, &step(0), &mut numbers).unwrap_err();
    assert!(error.message.contains(SPOILT), "{error}");
    assert_eq!(float_bits(&numbers), float_bits(&latents(1, 2)));
    *host.fault.lock().unwrap() = Fault::None;
    host.unet.lock().unwrap().merge_lora(&[], 1.).unwrap();
    assert_eq!(float_bits(&corrected(&mut instance, 0)), float_bits(&before));
}

/// Without a word in the configuration: a base model's, else the host's gradient, else its weights.
#[test]
fn the_source_is_chosen_by_what_there_is() {
    let texts = Texts::of(&[0, 2]);
    let needs = |host: Arc<dyn Host>, config: Value| {
        let mut instance = create(host, &config).unwrap();
        let config = unet_config(&committed("sd1-tiny"));
        instance.prepare(&model(&config), host_api::Device::Cpu).map(|()| {
            let needs = instance.needs().unwrap();
            (needs.gradient, needs.weights, needs.context)
        })
    };
    assert_eq!(needs(Arc::new(GradientLender::new(&texts)), host_config(json!({}))).unwrap(), (true, false, false));
    assert_eq!(needs(WeightLender::new(), host_config(json!({}))).unwrap(), (false, true, true));
    assert_eq!(needs(WeightLender::new(), own_config(json!({}))).unwrap(), (false, false, false));
    let message = needs(plain(), host_config(json!({}))).unwrap_err().message;
    for word in ["gradient/1", "base_model", "\"weights\"", "\"split\""] {
        assert!(message.contains(word), "{message}");
    }
}

/// Features of the tiny U-Net and the way back, as a host with an autograd of its own has them.
fn halves(instance: &mut Instance, texts: &Texts, step: &Step, numbers: &mut [f32]) -> Result<host_api::Report> {
    let unet = tiny_unet("sd1", DType::F32);
    let context = Tensor::from_slice(&texts.context, &texts.shape, device()).unwrap();
    let keys = unet.text(&context).unwrap();
    let z = Tensor::from_slice(numbers, (numbers.len() / 1024, 4, 16, 16), device()).unwrap();
    let tap = unet.config().tap("mid").unwrap();
    let (features, tape) = unet.forward_to(&z, &vec![step.timestep; z.dim(0).unwrap()], &keys, tap).unwrap();
    let shape = features.dims().to_vec();
    let features: Vec<f32> = features.flatten_all().unwrap().to_vec1().unwrap();
    let mut cotangent = vec![0f32; features.len()];
    let mut split = instance.split()?.unwrap();
    split.score(step, &View::new(&features, &shape)?, &mut ViewMut::new(&mut cotangent, &shape)?)?;
    let cotangent = Tensor::from_vec(cotangent, shape, device()).unwrap();
    let gradient: Vec<f32> = unet.vjp(tape, &cotangent).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let before = numbers.to_vec();
    let views = (View::new(&before, z.dims())?, View::new(&gradient, z.dims())?);
    split.apply(step, &views.0, &views.1, &mut ViewMut::new(numbers, z.dims())?)
}

#[test]
fn the_halves_give_the_bits_of_a_step() {
    let texts = Texts::of(&[0, 2]);
    let lender: Arc<dyn Host> = Arc::new(GradientLender::new(&texts));
    let mut whole = running(lender, &host_config(json!({})), &texts);
    let mut split = running(plain(), &host_config(json!({"gradient": "split"})), &texts);
    for index in 0..2 {
        let mut numbers = latents(1, 2);
        halves(&mut split, &texts, &step(index), &mut numbers).unwrap();
        assert_eq!(float_bits(&numbers), float_bits(&corrected(&mut whole, index)));
    }
    // A step needs a source that this configuration does not have.
    let error = correct(&mut split, &step(0), &mut latents(1, 2)).unwrap_err();
    assert!(error.status == Status::Unsupported && error.message.contains("split/1"), "{error}");
}

#[test]
fn one_bad_item_fails_alone_in_either_half() {
    let texts = Texts::of(&[0, 2]);
    let mut instance = running(plain(), &host_config(json!({"gradient": "split"})), &texts);
    let mut split = instance.split().unwrap().unwrap();
    let features: Vec<f32> = values(1, 2 * 32 * 2 * 2).to_vec1().unwrap();
    let shape = [2, 32, 2, 2];
    let score = |split: &mut host_api::host::InstanceSplit, features: &[f32]| {
        let mut cotangent = vec![7f32; features.len()];
        let mut view = ViewMut::new(&mut cotangent, &shape).unwrap();
        let report = split.score(&step(0), &View::new(features, &shape).unwrap(), &mut view);
        (report, cotangent)
    };
    let (good, expected) = score(&mut split, &features);
    let mut spoilt = features.clone();
    spoilt[5] = f32::NAN;
    let (report, cotangent) = score(&mut split, &spoilt);
    let statuses: Vec<_> = report.unwrap().items.iter().map(|item| item.status).collect();
    assert_eq!(statuses, [Status::NonFinite, Status::Ok]);
    assert!(cotangent[..128].iter().all(|value| *value == 0.));
    assert_close(
        "the other item",
        &Tensor::new(&cotangent[128..], device()).unwrap(),
        &Tensor::new(&expected[128..], device()).unwrap(),
        1e-5,
    );
    assert!(good.unwrap().items.iter().all(|item| item.score.abs() <= 1.));
    // Of another width than the adapter's.
    let narrow = View::new(&features, &[2, 16, 4, 2]).unwrap();
    let mut target = vec![7f32; features.len()];
    let error = split.score(&step(0), &narrow, &mut ViewMut::new(&mut target, &[2, 16, 4, 2]).unwrap()).unwrap_err();
    assert!(error.status == Status::ShapeMismatch && target.iter().all(|value| *value == 7.), "{error}");

    let numbers = latents(1, 2);
    let mut gradient = vec![0.01f32; numbers.len()];
    gradient[1500] = f32::INFINITY;
    let mut out = numbers.clone();
    let shape = [2, 4, 16, 16];
    let views = (View::new(&numbers, &shape).unwrap(), View::new(&gradient, &shape).unwrap());
    let report = split.apply(&step(0), &views.0, &views.1, &mut ViewMut::new(&mut out, &shape).unwrap()).unwrap();
    assert_eq!((report.items[0].status, report.items[1].status), (Status::Ok, Status::NonFinite));
    assert_ne!(float_bits(&out[..1024]), float_bits(&numbers[..1024]));
    assert_eq!(float_bits(&out[1024..]), float_bits(&numbers[1024..]));
}
