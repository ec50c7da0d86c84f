//! One instance: the plugin, its state, and the rules of who may call what when.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use super::extensions::{LoraTable, ParamsTable};
use super::handle::HostHandle;
use super::slot::HostSlot;
use super::{Plugin, reach, tables};
use crate::abi::{sh_needs, sh_plugin};
use crate::error::{Error, Result, Status};
use crate::ffi;
use crate::types::{Device, Model, Needs, Run};

/// The states of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    Created,
    Prepared,
    Running,
    Poisoned,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "CREATED",
            Self::Prepared => "PREPARED",
            Self::Running => "RUNNING",
            Self::Poisoned => "POISONED",
        })
    }
}

/// What the wrapper remembers of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct RunShape {
    pub(super) batch: usize,
    pub(super) steps: usize,
}

/// What only one call at a time may touch.
pub(super) struct Core<P> {
    pub(super) plugin: P,
    pub(super) run: Option<RunShape>,
    pub(super) latent_channels: usize,
    /// Where the latents are, as the last prepare said.
    pub(super) device: Device,
    /// Taps that `needs` has named since the last prepare; hosts hold pointers to them.
    taps: Vec<Box<str>>,
}

/// One instance behind an `sh_plugin`.
pub(super) struct Instance<P> {
    /// What the host holds; `table.instance` points to the whole.
    pub(super) table: sh_plugin,
    state: AtomicU8,
    core: Mutex<Core<P>>,
    memory: AtomicU64,
    pub(super) host: Arc<HostSlot>,
    pub(super) params: Option<ParamsTable>,
    pub(super) lora: Option<LoraTable>,
}

impl<P: Plugin> Instance<P> {
    /// Creates the plugin and asks for its extensions.
    pub(super) fn create(host: Arc<HostSlot>, config: &str) -> Result<Self> {
        let plugin = P::create(HostHandle::new(host.clone()), config)?;
        let params = plugin.params().map(ParamsTable::new);
        let lora = plugin.lora().map(LoraTable::new);
        let memory = AtomicU64::new(plugin.memory());
        Ok(Self {
            table: tables::plugin::<P>(),
            state: AtomicU8::new(State::Created as u8),
            core: Mutex::new(Core { plugin, run: None, latent_channels: 0, device: Device::Cpu, taps: Vec::new() }),
            memory,
            host,
            params,
            lora,
        })
    }

    pub(super) fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            0 => State::Created,
            1 => State::Prepared,
            2 => State::Running,
            _ => State::Poisoned,
        }
    }

    /// Fails when `call` is not legal now. Answers before arguments are looked at; [`Instance::lock`] decides.
    pub(super) fn check_state(&self, call: &str, legal: &[State]) -> Result<()> {
        self.lock(call, legal).map(drop)
    }

    fn set_state(&self, state: State) {
        self.state.store(state as u8, Ordering::Release);
    }

    pub(super) fn poison(&self) {
        self.set_state(State::Poisoned);
    }

    /// Fails when an earlier call ended in a panic.
    pub(super) fn check_poisoned(&self) -> Result<()> {
        match self.state() {
            State::Poisoned => Err(Error::new(Status::Poisoned, "an earlier call panicked; only destroy is left")),
            _ => Ok(()),
        }
    }

    /// The one call at a time, in one of the `legal` states.
    pub(super) fn lock(&self, call: &str, legal: &[State]) -> Result<MutexGuard<'_, Core<P>>> {
        let core = match self.core.try_lock() {
            Ok(core) => core,
            Err(TryLockError::WouldBlock) => {
                let message = format!("{call}: another call on this instance is in progress");
                return Err(Error::new(Status::Busy, message));
            }
            Err(TryLockError::Poisoned(_)) => {
                return Err(Error::new(Status::Poisoned, "an earlier call panicked; only destroy is left"));
            }
        };
        self.check_poisoned()?;
        let state = self.state();
        if !legal.contains(&state) {
            let legal: Vec<String> = legal.iter().map(State::to_string).collect();
            let message = format!("{call} in state {state}; it is legal in {}", legal.join(", "));
            return Err(Error::new(Status::InvalidState, message));
        }
        Ok(core)
    }

    pub(super) fn prepare(&self, model: &Model<'_>, device: Device) -> Result<()> {
        let mut core = self.lock("prepare", &[State::Created, State::Prepared])?;
        reach::<P>().check_device(device).map_err(|error| error.context("the latents will be"))?;
        let lent = self.host.enter_call();
        core.plugin.prepare(model, device)?;
        drop(lent);
        core.taps.clear();
        core.latent_channels = model.latent_channels;
        core.device = device;
        self.remember_memory(&core);
        self.set_state(State::Prepared);
        Ok(())
    }

    /// Fills the members of `needs` but `struct_size`.
    pub(super) fn needs(&self) -> Result<sh_needs> {
        use crate::abi::{SH_NEEDS_CONTEXT, SH_NEEDS_GRADIENT, SH_NEEDS_POOLED, SH_NEEDS_WEIGHTS, sh_string};
        let mut core = self.lock("needs", &[State::Prepared, State::Running])?;
        let Needs { gradient, context, pooled, weights, tap } = core.plugin.needs();
        let flag = |wanted: bool, flag: u32| if wanted { flag } else { 0 };
        let flags = flag(gradient, SH_NEEDS_GRADIENT) | flag(context, SH_NEEDS_CONTEXT) | flag(pooled, SH_NEEDS_POOLED);
        let flags = flags | flag(weights, SH_NEEDS_WEIGHTS);
        let known = core.taps.iter().position(|known| **known == *tap);
        let index = known.unwrap_or_else(|| {
            core.taps.push(tap.into());
            core.taps.len() - 1
        });
        Ok(sh_needs {
            struct_size: ffi::struct_size::<sh_needs>(),
            flags,
            tap: sh_string::borrowing(&core.taps[index]),
        })
    }

    /// Starts a run; a batch of 0 never reaches the plugin.
    pub(super) fn begin(&self, run: &Run<'_>) -> Result<()> {
        let mut core = self.lock("begin", &[State::Prepared])?;
        if run.batch > 0 {
            self.check_needs(&core.plugin.needs(), run)?;
            let lent = self.host.enter_call();
            core.plugin.begin(run)?;
            drop(lent);
        }
        core.run = Some(RunShape { batch: run.batch, steps: run.steps });
        self.remember_memory(&core);
        self.set_state(State::Running);
        Ok(())
    }

    fn check_needs(&self, needs: &Needs, run: &Run<'_>) -> Result<()> {
        let text = &run.text;
        if needs.gradient && !self.host.has_gradient() {
            let message = "this plugin needs the host extension sampler-hook.gradient/1, which the host does not have";
            return Err(Error::new(Status::Unsupported, message));
        }
        if needs.weights && !self.host.has_weights() {
            let message = "this plugin needs the host extension sampler-hook.weights/1, which the host does not have";
            return Err(Error::new(Status::Unsupported, message));
        }
        if needs.context && text.context.is_none() {
            return Err(Error::invalid_argument("this plugin needs the text's context"));
        }
        if needs.pooled && text.pooled.is_none() && (text.context.is_none() || text.end_of_text.is_none()) {
            return Err(Error::invalid_argument("this plugin needs the pooled text, or context and end_of_text"));
        }
        Ok(())
    }

    pub(super) fn end(&self) -> Result<()> {
        let mut core = self.lock("end", &[State::Running])?;
        if core.run.is_some_and(|run| run.batch > 0) {
            core.plugin.end()?;
        }
        core.run = None;
        self.remember_memory(&core);
        self.set_state(State::Prepared);
        Ok(())
    }

    pub(super) fn remember_memory(&self, core: &Core<P>) {
        self.memory.store(core.plugin.memory(), Ordering::Relaxed);
    }

    /// Bytes held now, or at the end of the last call when one is in progress; 0 when poisoned.
    pub(super) fn memory(&self) -> u64 {
        if let Ok(core) = self.core.try_lock()
            && self.state() != State::Poisoned
        {
            self.remember_memory(&core);
        }
        if self.state() == State::Poisoned { 0 } else { self.memory.load(Ordering::Relaxed) }
    }

    /// Drops the plugin and lets go of the host, whatever the plugin's drop does.
    pub(super) fn destroy(self) {
        let Self { core, host, params, lora, .. } = self;
        let core = core.into_inner().unwrap_or_else(PoisonError::into_inner);
        let dropped = ffi::catch(|| {
            drop((core, params, lora));
            Ok(())
        });
        if let Err(error) = dropped {
            host.log(log::Level::Error, &format!("destroy: {}", error.message));
        }
        host.close();
    }
}
