//! Views on a device, of a plugin and a host that reach it. The device of these tests is main memory under another name.

mod common;

use std::cell::Cell;
use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use common::{TestHost, model, run, step};
use host_api::host::{Gradient, Host, Instance, Library, Weights};
use host_api::plugin::{HostHandle, Latents, Plugin};
use host_api::{
    Descriptor, Device, DeviceMemory, Dtype, Error, Lent, Memory, Model, Needs, Outcome, Report, Result, Run, Status,
    Step, View, ViewMut,
};

/// The device `cuda:0`. Its driver follows the streams that are copied between.
struct Fake;

thread_local! {
    static COPIES: std::cell::RefCell<Vec<[usize; 2]>> = const { std::cell::RefCell::new(Vec::new()) };
    static CONTEXT: Cell<usize> = const { Cell::new(0) };
}

const PLUGINS: usize = 11;
const HOSTS: usize = 22;

fn on(stream: usize) -> Memory {
    Memory::Cuda { ordinal: 0, stream: std::ptr::without_provenance_mut(stream) }
}

fn stream(memory: Memory) -> usize {
    match memory {
        Memory::Main => 0,
        Memory::Cuda { stream, .. } => stream.addr(),
    }
}

impl DeviceMemory for Fake {
    fn check(&self, view: &View<'_>) -> Result<()> {
        match view.device() {
            Device::Cuda(ordinal) if ordinal != 0 => {
                Err(Error::new(Status::Unsupported, format!("no device {}", view.device())))
            }
            _ => Ok(()),
        }
    }

    fn copy(&self, from: &View<'_>, to: &mut ViewMut<'_>) -> Result<()> {
        assert_ne!((from.memory(), to.memory()), (Memory::Main, Memory::Main), "not asked for");
        COPIES.with_borrow_mut(|copies| copies.push([stream(from.memory()), stream(to.memory())]));
        CONTEXT.set(PLUGINS);
        let (shape, strides) = (to.shape().to_vec(), to.strides().to_vec());
        // SAFETY: the device is main memory.
        let (from, mut to) = unsafe {
            (
                View::of_memory(from.as_ptr(), from.dtype(), from.shape(), Some(from.strides()), Memory::Main)?,
                ViewMut::of_memory(to.as_mut_ptr(), to.dtype(), &shape, Some(&strides), Memory::Main)?,
            )
        };
        to.copy_from(&from);
        Ok(())
    }

    fn context(&self) -> usize {
        CONTEXT.get()
    }

    fn set_context(&self, context: usize) {
        CONTEXT.set(context);
    }
}

/// Numbers on the device, to lend.
fn lend(values: Vec<f32>, shape: &[usize], on: Memory) -> Result<Lent> {
    // SAFETY: the owner keeps what the view is of.
    unsafe {
        let view = View::of_memory(values.as_ptr().cast(), Dtype::F32, shape, None, on)?;
        Ok(Lent::owned(view, values))
    }
}

fn read(view: &View<'_>) -> Result<Vec<f32>> {
    let mut values = vec![0f32; view.len()];
    let mut target = ViewMut::new(&mut values, view.shape())?;
    if view.memory() == Memory::Main {
        target.copy_from(view)
    } else {
        Fake.copy(view, &mut target)?
    }
    Ok(values)
}

/// Doubles latents, or does what its configuration says.
struct Doubler {
    host: HostHandle,
    behaviour: String,
}

impl Plugin for Doubler {
    const DESCRIPTOR: Descriptor = Descriptor { id: "doubler", name: "", version: "", vendor: "", description: "" };

    fn device_memory() -> Option<&'static dyn DeviceMemory> {
        Some(&Fake)
    }

    fn create(host: HostHandle, config: &str) -> Result<Self> {
        Ok(Self { host, behaviour: config.into() })
    }

    fn prepare(&mut self, _model: &Model<'_>, _device: Device) -> Result<()> {
        CONTEXT.set(PLUGINS);
        let Some(weights) = self.host.weights() else { return Ok(()) };
        let found = weights.tensor(0, |tensor| Ok((tensor.memory(), read(tensor)?)))?;
        assert_eq!(found, (on(HOSTS), vec![1., 2.]));
        assert_eq!(CONTEXT.get(), PLUGINS, "the plugin's own, after the host was called");
        Ok(())
    }

    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn begin(&mut self, run: &Run<'_>) -> Result<()> {
        let pooled = run.text.pooled.map(|pooled| read(&pooled)).transpose()?;
        assert!(pooled.is_none_or(|pooled| pooled == [5., 6.]));
        Ok(())
    }

    fn step(&mut self, step: &Step<'_>, latents: &mut Latents<'_>, report: &mut Report) -> Result<()> {
        let numbers = read(&latents.view())?;
        let shape = latents.shape();
        match self.behaviour.as_str() {
            "skip" => {
                report.outcome = Outcome::SkippedStrength;
                return Ok(());
            }
            "gradient" => {
                let gradient = self.host.gradient().expect("a host with one");
                let lent = lend(numbers, &shape, on(PLUGINS))?;
                let activation = gradient.features(step, &lent.view(), "mid", |view| {
                    assert_eq!(view.memory(), on(HOSTS));
                    read(view)
                })?;
                let cotangent = lend(activation, &shape, on(PLUGINS))?;
                let mut found = vec![0f32; latents.item_len() * shape[0]];
                // SAFETY: the device is main memory.
                let mut target =
                    unsafe { ViewMut::of_memory(found.as_mut_ptr().cast(), Dtype::F32, &shape, None, on(PLUGINS)) }?;
                gradient.vjp(&cotangent.view(), &mut target)?;
                return latents.write(lend(found, &shape, on(PLUGINS))?);
            }
            "item by item" => return latents.write_item(0, &numbers[..latents.item_len()]),
            _ => {}
        }
        let doubled: Vec<f32> = numbers.iter().map(|value| 2. * value).collect();
        match self.behaviour.as_str() {
            "other shape" => latents.write(lend(doubled, &[shape[0], shape[1], shape[3], shape[2]], on(PLUGINS))?)?,
            _ => latents.write(lend(doubled, &shape, on(PLUGINS))?)?,
        }
        match self.behaviour.as_str() {
            "first item fails" => report.items[0].status = Status::NonFinite,
            "fails" => return Err(Error::new(Status::OutOfMemory, "as told")),
            _ => {}
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

host_api::plugin_list!(struct Doublers: Doubler);

const SHAPE: [usize; 4] = [2, 1, 1, 2];

fn running(host: Arc<dyn Host>, behaviour: &str, device: Device) -> Instance {
    let mut instance = Library::linked::<Doublers>().unwrap().create("doubler", host, behaviour).unwrap();
    instance.prepare(&Model { latent_channels: 1, ..model() }, device).unwrap();
    instance.begin(&run(2, 2)).unwrap();
    COPIES.take();
    instance
}

fn view_of(values: &mut [f32], strides: &[i64; 4], memory: Memory) -> ViewMut<'static> {
    // SAFETY: the device is main memory; the tests keep the values while they use the view.
    unsafe { ViewMut::of_memory(values.as_mut_ptr().cast::<c_void>(), Dtype::F32, &SHAPE, Some(strides), memory) }
        .unwrap()
}

/// A step from one place to another with gaps between the items: the result and both places.
fn step_apart(behaviour: &str) -> (Result<Report>, [f32; 4], [f32; 6]) {
    let mut instance = running(Arc::new(TestHost::default()), behaviour, Device::Cuda(0));
    let (mut input, mut output) = ([1f32, 2., 3., 4.], [-1f32; 6]);
    let result = {
        let from = view_of(&mut input, &[2, 2, 2, 1], on(7));
        let mut to = view_of(&mut output, &[4, 2, 2, 1], on(8));
        instance.step(&step(0, 2), &from.as_view(), &mut to)
    };
    (result, input, output)
}

#[test]
fn a_step_that_succeeds_is_copied_on_the_device() {
    let (report, input, output) = step_apart("");
    assert_eq!(report.unwrap().outcome, Outcome::Corrected);
    assert_eq!((input, output), ([1., 2., 3., 4.], [2., 4., -1., -1., 6., 8.]));
    // Read by the plugin, and written as a whole.
    assert_eq!(COPIES.take(), [[7, 0], [PLUGINS, 8]]);
    let (_, _, output) = step_apart("skip");
    assert_eq!(output, [1., 2., -1., -1., 3., 4.]);
    assert_eq!(COPIES.take(), [[7, 0], [7, 8]]);
    let (report, _, output) = step_apart("first item fails");
    assert_eq!(report.unwrap().items[0].status, Status::NonFinite);
    assert_eq!(output, [1., 2., -1., -1., 6., 8.]);
    assert_eq!(COPIES.take(), [[7, 0], [7, 8], [PLUGINS, 8]]);
}

#[test]
fn in_place_only_what_changes_is_written() {
    for (behaviour, expected, copies) in
        [("", [2f32, 4., 6., 8.], 2), ("first item fails", [1., 2., 6., 8.], 2), ("skip", [1., 2., 3., 4.], 1)]
    {
        let mut instance = running(Arc::new(TestHost::default()), behaviour, Device::Cuda(0));
        let mut numbers = [1f32, 2., 3., 4.];
        instance.step_in_place(&step(0, 2), &mut view_of(&mut numbers, &[2, 2, 2, 1], on(7))).unwrap();
        assert_eq!(numbers, expected, "{behaviour}");
        assert_eq!(COPIES.take().len(), copies, "{behaviour}");
    }
}

#[test]
fn a_step_that_fails_writes_nothing() {
    for (behaviour, status, words) in [
        ("fails", Status::OutOfMemory, "as told"),
        ("other shape", Status::ShapeMismatch, "[2, 1, 2, 1]"),
        ("item by item", Status::Internal, "main memory"),
    ] {
        let (result, input, output) = step_apart(behaviour);
        let error = result.unwrap_err();
        assert!(error.status == status && error.message.contains(words), "{behaviour}: {error}");
        assert_eq!((input, output), ([1., 2., 3., 4.], [-1.; 6]), "{behaviour}");
    }
}

#[test]
fn views_elsewhere_than_prepare_said_are_refused() {
    let mut numbers = [1f32, 2., 3., 4.];
    let other = Memory::Cuda { ordinal: 1, stream: std::ptr::null_mut() };
    for (prepared, memory, status, words) in [
        (Device::Cuda(0), Memory::Main, Status::InvalidArgument, &["latents on cpu", "cuda:0"][..]),
        (Device::Cpu, on(7), Status::InvalidArgument, &["latents on cuda:0", "cpu"]),
        (Device::Cuda(0), other, Status::Unsupported, &["latents", "cuda:1"]),
    ] {
        let mut instance = running(Arc::new(TestHost::default()), "", prepared);
        let error = instance.step_in_place(&step(0, 2), &mut view_of(&mut numbers, &[2, 2, 2, 1], memory)).unwrap_err();
        assert_eq!(error.status, status, "{error}");
        assert!(words.iter().all(|word| error.message.contains(word)), "{error}");
    }
    let mut instance = running(Arc::new(TestHost::default()), "", Device::Cuda(0));
    let mut out = [0f32; 4];
    let latents = view_of(&mut numbers, &[2, 2, 2, 1], on(7));
    let mut out_view = ViewMut::new(&mut out, &SHAPE).unwrap();
    let error = instance.step(&step(0, 2), &latents.as_view(), &mut out_view).unwrap_err();
    assert!(error.message.contains("out on cpu"), "{error}");
    assert_eq!((numbers, out), ([1., 2., 3., 4.], [0.; 4]));
}

#[test]
fn text_may_be_on_the_device_or_not() {
    let mut pooled = vec![5f32, 6.];
    let lent = lend(pooled.clone(), &[2, 1], on(9)).unwrap();
    for view in [lent.view(), ViewMut::new(&mut pooled, &[2, 1]).unwrap().as_view()] {
        let mut instance = running(Arc::new(TestHost::default()), "", Device::Cuda(0));
        instance.end().unwrap();
        let mut run = run(2, 2);
        run.text.pooled = Some(view);
        instance.begin(&run).unwrap();
    }
}

/// Features are the latents plus one, the gradient is twice the cotangent. Notes which context is current when it is called.
#[derive(Default)]
struct Lender {
    contexts: Mutex<Vec<usize>>,
    reaches: bool,
}

impl Lender {
    fn called(&self) {
        self.contexts.lock().unwrap().push(CONTEXT.replace(99));
    }
}

impl Host for Lender {
    fn name(&self) -> &str {
        "lender"
    }
    fn version(&self) -> &str {
        "1"
    }
    fn log(&self, _level: log::Level, _message: &str) {}
    fn device_memory(&self) -> Option<&'static dyn DeviceMemory> {
        if self.reaches { Some(&Fake) } else { None }
    }
    fn gradient(&self) -> Option<&dyn Gradient> {
        Some(self)
    }
    fn weights(&self) -> Option<&dyn Weights> {
        Some(self)
    }
}

impl Weights for Lender {
    fn revision(&self) -> u64 {
        1
    }
    fn names(&self) -> Vec<String> {
        vec!["a".into()]
    }
    fn tensor_revision(&self, _name: &str) -> Result<u64> {
        Ok(1)
    }
    fn tensor(&self, _name: &str) -> Result<Lent> {
        self.called();
        lend(vec![1., 2.], &[2], on(HOSTS))
    }
}

impl Gradient for Lender {
    fn features(&self, _step: &Step<'_>, latents: &View<'_>, _tap: &str) -> Result<Lent> {
        self.called();
        let numbers = read(latents)?.iter().map(|value| value + 1.).collect();
        lend(numbers, latents.shape(), on(HOSTS))
    }
    fn vjp(&self, cotangent: &View<'_>, gradient: &mut ViewMut<'_>) -> Result<()> {
        self.called();
        let numbers = read(cotangent)?.iter().map(|value| value * 2.).collect();
        Fake.copy(&lend(numbers, cotangent.shape(), on(HOSTS))?.view(), gradient)
    }
    fn release(&self) {
        self.called();
    }
}

#[test]
fn weights_features_and_gradients_cross_on_the_device_and_each_side_finds_its_context() {
    CONTEXT.set(5);
    let host = Arc::new(Lender { reaches: true, ..Lender::default() });
    let mut instance = running(host.clone(), "gradient", Device::Cuda(0));
    let mut numbers = [1f32, 2., 3., 4.];
    instance.step_in_place(&step(0, 2), &mut view_of(&mut numbers, &[2, 2, 2, 1], on(7))).unwrap();
    assert_eq!(numbers, [4., 6., 8., 10.]);
    assert_eq!(CONTEXT.get(), 5);
    drop(instance);
    assert_eq!(CONTEXT.get(), 5);
    assert_eq!(*host.contexts.lock().unwrap(), [5, 5, 5], "tensor, features, vjp");
    // Each on the stream of who owns it.
    assert_eq!(COPIES.take(), [[7, 0], [PLUGINS, 0], [HOSTS, 0], [PLUGINS, 0], [HOSTS, PLUGINS], [PLUGINS, 7]]);
}

#[test]
fn a_host_that_reaches_main_memory_alone_refuses_the_rest() {
    let host = Arc::new(Lender::default());
    let mut instance = running(host, "gradient", Device::Cuda(0));
    let mut numbers = [1f32, 2., 3., 4.];
    let error = instance.step_in_place(&step(0, 2), &mut view_of(&mut numbers, &[2, 2, 2, 1], on(7))).unwrap_err();
    assert_eq!(error.status, Status::HostFailed);
    assert!(error.message.contains("latents: on cuda:0, but only main memory"), "{error}");
    assert_eq!(numbers, [1., 2., 3., 4.]);
}
