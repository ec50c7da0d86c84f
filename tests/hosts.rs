//! Hosts for the plugin: one that lends nothing, and one that lends a U-Net and fails when told to.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Tensor};
use diffusion::{Tape, TextKeys, UNet};
use host_api::host::{Gradient, Host};
use host_api::{DeviceMemory, Error, Lent, Result, Status, Step, View, ViewMut};

use crate::dpt::Texts;
use crate::{device, tiny_unet};

/// What a [`Lender`] does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// `features` fails.
    FeaturesFail,
    /// `features` has half the channels that the tap has.
    FeaturesChannels,
    /// `features` lacks a dimension.
    FeaturesRank,
    /// One item's features are NaN.
    FeaturesNan(usize),
    /// `vjp` fails.
    VjpFails,
    /// `vjp` gives one number too few.
    VjpShort,
    /// One number of one item's gradient is NaN.
    VjpNan(usize),
    /// One number of one item's gradient is infinite.
    VjpInfinite(usize),
    /// The user cancels while `features` computes.
    Cancel,
}

/// What a host was told.
#[derive(Default)]
pub struct Log(Mutex<Vec<(log::Level, String)>>);

impl Log {
    /// All of it, in order.
    pub fn messages(&self) -> Vec<(log::Level, String)> {
        self.0.lock().unwrap().clone()
    }

    fn add(&self, level: log::Level, message: &str) {
        self.0.lock().unwrap().push((level, message.to_owned()));
    }
}

/// A host without extensions.
#[derive(Default)]
pub struct Plain {
    /// Whether the user wants to stop.
    pub cancelled: AtomicBool,
    /// What it was told.
    pub log: Arc<Log>,
}

/// A [`Plain`] host that nobody cancels.
pub fn plain() -> Arc<dyn Host> {
    Arc::new(Plain::default())
}

impl Host for Plain {
    fn name(&self) -> &str {
        "plain"
    }
    fn version(&self) -> &str {
        "1"
    }
    fn log(&self, level: log::Level, message: &str) {
        self.log.add(level, message);
    }
    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }
}

/// A host that lends the tiny U-Net, without any LoRA, for one text.
pub struct Lender {
    unet: UNet,
    text: TextKeys,
    tape: Mutex<Option<Tape>>,
    fault: Mutex<Fault>,
    cancelled: AtomicBool,
    released: AtomicUsize,
    /// What it was told.
    pub log: Arc<Log>,
}

impl Lender {
    /// For runs with that text.
    pub fn new(texts: &Texts) -> Self {
        let unet = tiny_unet("sd1", DType::F32);
        let context = Tensor::from_slice(&texts.context, &texts.shape, device()).unwrap();
        let text = unet.text(&context).unwrap();
        Self {
            unet,
            text,
            tape: Mutex::default(),
            fault: Mutex::new(Fault::None),
            cancelled: AtomicBool::default(),
            released: AtomicUsize::default(),
            log: Arc::default(),
        }
    }

    /// What to do wrong from now on.
    pub fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
        self.cancelled.store(false, Ordering::SeqCst);
    }

    /// Whether an activation is kept for a gradient that was not asked for.
    pub fn holds(&self) -> bool {
        self.tape.lock().unwrap().is_some()
    }

    /// How often an activation was released without a gradient.
    pub fn released(&self) -> usize {
        self.released.load(Ordering::SeqCst)
    }

    fn fault(&self) -> Fault {
        *self.fault.lock().unwrap()
    }
}

impl Host for Lender {
    fn name(&self) -> &str {
        "lender"
    }
    fn version(&self) -> &str {
        "1"
    }
    fn log(&self, level: log::Level, message: &str) {
        self.log.add(level, message);
    }
    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }
    fn device_memory(&self) -> Option<&'static dyn DeviceMemory> {
        tensor_views::device_memory()
    }
    fn gradient(&self) -> Option<&dyn Gradient> {
        Some(self)
    }
}

/// The numbers of item `index` among those of `batch` items.
fn item(values: &mut [f32], index: usize, batch: usize) -> &mut [f32] {
    let length = values.len() / batch;
    &mut values[index * length..][..length]
}

impl Gradient for Lender {
    fn features(&self, step: &Step<'_>, latents: &View<'_>, tap: &str) -> Result<Lent> {
        let fault = self.fault();
        if fault == Fault::FeaturesFail {
            return Err(Error::new(Status::OutOfMemory, "no room for features"));
        }
        self.cancelled.store(fault == Fault::Cancel, Ordering::SeqCst);
        let tap = self.unet.config().tap(tap).map_err(|e| Error::new(Status::NotFound, e.to_string()))?;
        let latents = tensor_views::read(latents, device())?.to_dtype(DType::F32).unwrap();
        let batch = latents.dim(0).unwrap();
        let (features, tape) = self.unet.forward_to(&latents, &vec![step.timestep; batch], &self.text, tap).unwrap();
        *self.tape.lock().unwrap() = Some(tape);
        if fault == Fault::None {
            return tensor_views::lend(&features);
        }
        let mut shape = features.dims().to_vec();
        let mut numbers = features.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        match fault {
            Fault::FeaturesChannels => {
                shape[1] /= 2;
                numbers.truncate(shape.iter().product());
            }
            Fault::FeaturesRank => shape = vec![batch, numbers.len() / batch],
            Fault::FeaturesNan(index) => item(&mut numbers, index, batch).fill(f32::NAN),
            _ => {}
        }
        Lent::new(numbers, &shape)
    }

    fn vjp(&self, cotangent: &View<'_>, out: &mut ViewMut<'_>) -> Result<()> {
        let tape = self.tape.lock().unwrap().take().expect("features came before");
        let batch = cotangent.shape()[0];
        let cotangent = tensor_views::read(cotangent, device())?.to_dtype(DType::F32).unwrap();
        // A host may scale the whole batch by its largest number.
        let numbers = cotangent.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(numbers.iter().all(|v| v.is_finite()), "a cotangent that is not finite");
        let gradient = self.unet.vjp(tape, &cotangent).unwrap();
        if self.fault() == Fault::None {
            return tensor_views::write(&gradient, out);
        }
        let mut gradient = gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        match self.fault() {
            Fault::VjpFails => return Err(Error::new(Status::OutOfMemory, "no room for a gradient")),
            Fault::VjpShort => {
                gradient.pop();
            }
            Fault::VjpNan(index) => item(&mut gradient, index, batch)[3] = f32::NAN,
            Fault::VjpInfinite(index) => item(&mut gradient, index, batch)[3] = f32::INFINITY,
            _ => {}
        }
        out.write(&gradient)
    }

    fn release(&self) {
        self.tape.lock().unwrap().take();
        self.released.fetch_add(1, Ordering::SeqCst);
    }
}
