//! The sampler-hook ABI.
pub mod abi;
mod error;
pub mod export;
mod ffi;
pub mod plugin;
mod types;
mod view;

pub use error::{Error, Result, Status};
pub use types::{Descriptor, Device, ItemReport, Model, Needs, Outcome, Prediction, Report, Run, Space, Step, Text};
pub use view::{Dtype, Element, View, ViewMut};
