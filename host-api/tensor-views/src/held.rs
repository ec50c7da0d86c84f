use std::ops::Deref;

use candle_core::Device;

use crate::{bind, device_memory};

/// Tensors that are freed in whatever thread, whatever its current context is, and when nobody captures their device's stream.
pub struct Held<T> {
    /// Until this is dropped.
    tensors: Option<T>,
    device: Device,
}

impl<T> Held<T> {
    /// Holds tensors of a device.
    pub fn new(tensors: T, device: &Device) -> Self {
        Self { tensors: Some(tensors), device: device.clone() }
    }
}

impl<T> Deref for Held<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.tensors.as_ref().expect("until it is dropped")
    }
}

impl<T> Drop for Held<T> {
    fn drop(&mut self) {
        let memory = device_memory().filter(|_| !self.device.is_cpu());
        let context = memory.map(|memory| (memory, memory.context()));
        let _asking = bind(&self.device);
        self.tensors = None;
        if let Some((memory, context)) = context {
            memory.set_context(context);
        }
    }
}
