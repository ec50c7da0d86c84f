//! Where views are, and what it takes to reach memory that is not main memory.

use std::ffi::c_void;

use super::{View, ViewMut};
use crate::error::{Error, Result, Status};
use crate::types::Device;

/// Where the elements of a view are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// In main memory.
    Main,
    /// On a CUDA device.
    Cuda {
        /// Of the device.
        ordinal: usize,
        /// The `cudaStream_t` in whose order the elements are read and written. Null is the legacy default stream.
        stream: *mut c_void,
    },
}

impl Memory {
    /// The device that the memory belongs to.
    pub fn device(self) -> Device {
        match self {
            Self::Main => Device::Cpu,
            Self::Cuda { ordinal, .. } => Device::Cuda(ordinal),
        }
    }

    pub(super) fn expect_main(self) {
        assert_eq!(self, Self::Main, "the elements are not in main memory");
    }
}

/// Access to the memory of devices, of one who gives or takes views there. This crate knows no device: whoever has none of this
/// takes views in main memory alone.
pub trait DeviceMemory: Sync {
    /// Refuses a view on a device that cannot be reached, and one that is not where it says. Also asked of views of main memory.
    fn check(&self, view: &View<'_>) -> Result<()>;

    /// Copies bit for bit between views of the same shape and dtype that do not overlap, at least one of them on a device: after
    /// what their streams hold, and before what they will hold later. With a view of main memory, when this returns.
    fn copy(&self, from: &View<'_>, to: &mut ViewMut<'_>) -> Result<()>;

    /// What the driver calls this thread's current context; 0 for none.
    fn context(&self) -> usize;

    /// Makes a context of [`DeviceMemory::context`] this thread's current one.
    fn set_context(&self, context: usize);
}

/// The memory that one side of the interface can reach.
#[derive(Clone, Copy)]
pub(crate) struct Reach(pub(crate) Option<&'static dyn DeviceMemory>);

impl Reach {
    /// Main memory alone.
    pub(crate) const MAIN: Self = Self(None);

    /// Whether views on `device` are taken at all.
    pub(crate) fn check_device(self, device: Device) -> Result<()> {
        match (device, self.0) {
            (Device::Cuda(_), None) => {
                Err(Error::new(Status::Unsupported, format!("on {device}, but only main memory can be reached here")))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn check(self, view: &View<'_>) -> Result<()> {
        self.check_device(view.device())?;
        self.0.map_or(Ok(()), |memory| memory.check(view))
    }

    /// Copies between views of the same shape that do not overlap. In main memory, numbers of another dtype are rounded.
    pub(crate) fn copy(self, from: &View<'_>, to: &mut ViewMut<'_>) -> Result<()> {
        if from.shape() != to.shape() {
            let message = format!("{:?} cannot be copied to a view of shape {:?}", from.shape(), to.shape());
            return Err(Error::shape_mismatch(message));
        }
        let main = (from.memory(), to.memory()) == (Memory::Main, Memory::Main);
        match self.0 {
            _ if from.is_empty() => {}
            _ if main && from.dtype() == to.dtype() => to.copy_from(from),
            _ if main => to.fill(&from.to_vec()),
            _ if from.dtype() != to.dtype() => {
                let message = format!("{:?} cannot be copied to a view of {:?} on a device", from.dtype(), to.dtype());
                return Err(Error::new(Status::DtypeMismatch, message));
            }
            Some(memory) => memory.copy(from, to)?,
            None => self.check(from).and_then(|()| self.check(&to.as_view()))?,
        }
        Ok(())
    }
}
