//! The device context that is current on a thread which calls across the interface. Each side may make its own current, and each
//! finds what was its own: a function leaves its caller's, and a caller's functions are called with the caller's.

use std::cell::Cell;

use super::{DeviceMemory, Reach};

thread_local! {
    /// The caller's context, inside a call.
    static CALLERS: Cell<Option<usize>> = const { Cell::new(None) };
}

/// A call from the other side. Puts the caller's context back when it is dropped.
pub(crate) struct Inside {
    memory: Option<&'static dyn DeviceMemory>,
    callers: usize,
    outer: Option<usize>,
}

/// A call to the other side, inside a call from it. Puts one's own context back when it is dropped.
pub(crate) struct Outside {
    memory: &'static dyn DeviceMemory,
    own: usize,
}

impl Reach {
    /// Begins a call from the other side.
    pub(crate) fn inside(self) -> Inside {
        let callers = self.0.map_or(0, DeviceMemory::context);
        let outer = self.0.and_then(|_| CALLERS.replace(Some(callers)));
        Inside { memory: self.0, callers, outer }
    }

    /// Begins a call to the other side; on a thread that it has not called from, its context is unknown and not touched.
    pub(crate) fn outside(self) -> Option<Outside> {
        let (memory, callers) = (self.0?, CALLERS.get()?);
        let own = memory.context();
        memory.set_context(callers);
        Some(Outside { memory, own })
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        if let Some(memory) = self.memory {
            memory.set_context(self.callers);
            CALLERS.set(self.outer);
        }
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        self.memory.set_context(self.own);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Result;
    use crate::{View, ViewMut};

    thread_local!(static CURRENT: Cell<usize> = const { Cell::new(0) });

    struct Driver;

    impl DeviceMemory for Driver {
        fn check(&self, _view: &View<'_>) -> Result<()> {
            Ok(())
        }
        fn copy(&self, _from: &View<'_>, _to: &mut ViewMut<'_>) -> Result<()> {
            Ok(())
        }
        fn context(&self) -> usize {
            CURRENT.get()
        }
        fn set_context(&self, context: usize) {
            CURRENT.set(context);
        }
    }

    #[test]
    fn each_side_finds_its_own_context() {
        let reach = Reach(Some(&Driver));
        assert!(reach.outside().is_none(), "nobody has called");
        for callers in [0, 7] {
            CURRENT.set(callers);
            let call = reach.inside();
            CURRENT.set(1);
            {
                let _back = reach.outside().unwrap();
                assert_eq!(CURRENT.get(), callers);
                // The other side calls again, from a context that it chose meanwhile.
                CURRENT.set(9);
                let again = reach.inside();
                CURRENT.set(1);
                drop(again);
                assert_eq!(CURRENT.get(), 9);
            }
            assert_eq!(CURRENT.get(), 1);
            drop(reach.outside());
            drop(call);
            assert_eq!(CURRENT.get(), callers);
            assert!(reach.outside().is_none(), "the call is over");
        }
    }
}
