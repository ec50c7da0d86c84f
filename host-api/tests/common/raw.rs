//! The tables as a C host would use them, for what the safe types cannot get wrong.

use std::ffi::{CStr, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use host_api::abi::*;
use host_api::plugin::entry;

use super::probe::Probes;

/// What the raw host's functions see.
#[derive(Default)]
pub struct RawHostState {
    pub cancel: AtomicBool,
    pub messages: AtomicUsize,
}

fn state<'a>(host: *const sh_host) -> &'a RawHostState {
    // SAFETY: every raw host of these tests is made by `host` below.
    unsafe { &*(*host).instance.cast::<RawHostState>() }
}

unsafe extern "C" fn log(host: *const sh_host, _level: i32, _message: sh_string) {
    state(host).messages.fetch_add(1, Ordering::SeqCst);
}

unsafe extern "C" fn cancelled(host: *const sh_host) -> i32 {
    state(host).cancel.load(Ordering::SeqCst).into()
}

unsafe extern "C" fn extension(_host: *const sh_host, _id: sh_string) -> *const c_void {
    ptr::null()
}

/// A host that is never freed.
pub fn host() -> (&'static mut sh_host, &'static RawHostState) {
    let state: &'static RawHostState = Box::leak(Box::default());
    let host = Box::leak(Box::new(sh_host {
        struct_size: size_of::<sh_host>() as u32,
        reserved: 0,
        instance: ptr::from_ref(state).cast_mut().cast(),
        name: sh_string::from_static("raw host"),
        version: sh_string::from_static("1"),
        log: Some(log),
        cancelled: Some(cancelled),
        extension: Some(extension),
    }));
    (host, state)
}

pub fn no_error() -> sh_error {
    sh_error { struct_size: size_of::<sh_error>() as u32, code: 0, message: [0x55; SH_ERROR_MESSAGE_SIZE] }
}

pub fn message(error: &sh_error) -> String {
    let bytes: Vec<u8> = error.message.iter().map(|&byte| byte.cast_unsigned()).collect();
    CStr::from_bytes_until_nul(&bytes).unwrap().to_str().unwrap().to_owned()
}

/// One instance through its table.
pub struct Raw {
    pub plugin: *const sh_plugin,
    pub host: &'static RawHostState,
}

// SAFETY: the header lets calls come from any thread, and the wrapper under test has to survive two at a time.
unsafe impl Send for Raw {}
// SAFETY: as above.
unsafe impl Sync for Raw {}

/// Calls a member of the table with the plugin before, and an error after, the arguments.
macro_rules! call {
    ($raw:expr, $name:ident $(, $argument:expr)*) => {{
        let mut error = no_error();
        let table = $raw.table();
        // SAFETY: a living instance and arguments that are valid or that the plugin has to refuse.
        let code = unsafe { table.$name.unwrap()($raw.plugin $(, $argument)*, &mut error) };
        Outcome { code, message: if code == SH_OK { String::new() } else { message(&error) } }
    }};
}

/// What a call said.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    pub code: sh_status,
    pub message: String,
}

impl Outcome {
    #[track_caller]
    pub fn ok(self) {
        assert_eq!(self.code, SH_OK, "{}", self.message);
    }

    #[track_caller]
    pub fn is(self, code: sh_status, part: &str) {
        assert_eq!(self.code, code, "{}", self.message);
        assert!(self.message.contains(part), "{part:?} is not in {:?}", self.message);
    }
}

pub fn create_with(id: &str, host: *const sh_host, config: sh_string) -> (Outcome, *const sh_plugin) {
    let (mut plugin, mut error) = (ptr::null(), no_error());
    let create = entry::<Probes>().create.unwrap();
    // SAFETY: pointers to locals, and a host that is valid or has to be refused.
    let code = unsafe { create(sh_string::borrowing(id), host, config, &mut plugin, &mut error) };
    (Outcome { code, message: if code == SH_OK { String::new() } else { message(&error) } }, plugin)
}

impl Raw {
    pub fn create(config: &str) -> Self {
        let (host, state) = host();
        let (outcome, plugin) = create_with("probe", host, sh_string::borrowing(config));
        outcome.ok();
        Self { plugin, host: state }
    }

    /// In a run of `steps` steps of `batch` items with two channels.
    pub fn running(config: &str, batch: u32, steps: u32) -> Self {
        let raw = Self::create(config);
        raw.prepare(&model()).ok();
        raw.begin(&run(batch, steps)).ok();
        raw
    }

    pub fn table(&self) -> sh_plugin {
        // SAFETY: a living instance.
        unsafe { *self.plugin }
    }

    pub fn prepare(&self, model: *const sh_model) -> Outcome {
        call!(self, prepare, model, sh_device { device_type: SH_DEVICE_CPU, device_id: 0 })
    }

    pub fn needs(&self, needs: *mut sh_needs) -> Outcome {
        call!(self, needs, needs)
    }

    pub fn begin(&self, run: *const sh_run) -> Outcome {
        call!(self, begin, run)
    }

    pub fn step(
        &self,
        step: *const sh_step,
        from: *const sh_view,
        to: *const sh_view,
        report: *mut sh_report,
    ) -> Outcome {
        call!(self, step, step, from, to, report)
    }

    pub fn end(&self) -> Outcome {
        call!(self, end)
    }

    pub fn memory(&self) -> u64 {
        // SAFETY: a living instance.
        unsafe { self.table().memory.unwrap()(self.plugin) }
    }

    pub fn extension(&self, id: &str) -> *const c_void {
        // SAFETY: a living instance.
        unsafe { self.table().extension.unwrap()(self.plugin, sh_string::borrowing(id)) }
    }

    pub fn destroy(self) {
        // SAFETY: a living instance, not used afterwards.
        unsafe { self.table().destroy.unwrap()(self.plugin) };
    }
}

pub fn model() -> sh_model {
    static ALPHAS: [f64; 2] = [0.9, 0.1];
    sh_model {
        struct_size: size_of::<sh_model>() as u32,
        prediction: SH_PREDICTION_EPSILON,
        family: sh_string::from_static("sd1"),
        unet_in_channels: 4,
        latent_channels: 2,
        alphas_cumprod: ALPHAS.as_ptr(),
        alphas_cumprod_count: 2,
        unet_config: sh_string::EMPTY,
    }
}

pub fn run(batch: u32, steps: u32) -> sh_run {
    let struct_size = size_of::<sh_run>() as u32;
    sh_run { struct_size, batch, steps, reserved: 0, guidance_scale: 7.5, text: ptr::null() }
}

pub fn step(index: u32, count: u32) -> sh_step {
    sh_step {
        struct_size: size_of::<sh_step>() as u32,
        index,
        count,
        sub_evaluation: 0,
        timestep: 12.5,
        alpha_bar: 0.5,
        space: SH_SPACE_VP,
        flags: 0,
        text: ptr::null(),
    }
}

pub fn report(items: &mut [sh_item_report]) -> sh_report {
    sh_report {
        struct_size: size_of::<sh_report>() as u32,
        item_size: size_of::<sh_item_report>() as u32,
        items: items.as_mut_ptr(),
        item_count: items.len() as u64,
        seconds: -1.0,
        outcome: 0,
        reserved: 0,
    }
}

/// A row-major f32 view; `shape` and `data` have to outlive it.
pub fn view(data: *mut f32, shape: &mut [i64]) -> sh_view {
    sh_view {
        struct_size: size_of::<sh_view>() as u32,
        flags: 0,
        tensor: sh_tensor {
            data: data.cast(),
            device: sh_device { device_type: SH_DEVICE_CPU, device_id: 0 },
            ndim: shape.len() as i32,
            dtype: sh_dtype { code: 2, bits: 32, lanes: 1 },
            shape: shape.as_mut_ptr(),
            strides: ptr::null_mut(),
            byte_offset: 0,
        },
        stream: ptr::null_mut(),
    }
}
