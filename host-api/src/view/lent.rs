//! Tensors that one side lends to the other.

use std::any::Any;
use std::fmt;

use super::{Element, View};
use crate::error::Result;

/// A view together with what keeps its memory.
pub struct Lent {
    view: View<'static>,
    owner: Box<dyn Any + Send>,
}

// SAFETY: the view's memory is read through the view alone, and its owner may move between threads.
unsafe impl Send for Lent {}

impl Lent {
    /// A row-major tensor in main memory.
    pub fn new<T: Element + Send>(values: Vec<T>, shape: &[usize]) -> Result<Self> {
        let (base, layout) = {
            let view = View::new(&values, shape)?;
            (view.base, view.layout)
        };
        // SAFETY: moving a vector does not move its elements, which live as long as it and are not touched.
        let view = unsafe { View::from_parts(base, layout, super::Memory::Main) };
        Ok(Self { view, owner: Box::new(values) })
    }

    /// A view of memory that `owner` keeps.
    ///
    /// # Safety
    /// Until `owner` is dropped, the view's memory is as [`View::of_memory`] demands.
    pub unsafe fn owned(view: View<'static>, owner: impl Any + Send) -> Self {
        Self { view, owner: Box::new(owner) }
    }

    /// The tensor.
    pub fn view(&self) -> View<'_> {
        self.view
    }

    /// Where view and layout stay while `self` does not move.
    pub(crate) fn as_raw(&self) -> crate::abi::sh_view {
        self.view.as_raw()
    }
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lent({:?}, {:?})", self.view, (*self.owner).type_id())
    }
}
