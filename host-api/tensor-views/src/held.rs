use std::ops::Deref;

/// Tensors that are freed in whatever thread, and when nobody captures their device's stream.
pub struct Held<T>(Option<T>);

impl<T> Held<T> {
    /// Holds them.
    pub fn new(tensors: T) -> Self {
        Self(Some(tensors))
    }
}

impl<T> Deref for Held<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("until it is dropped")
    }
}

impl<T> Drop for Held<T> {
    fn drop(&mut self) {
        let _asking = diffusion::asking();
        self.0 = None;
    }
}
