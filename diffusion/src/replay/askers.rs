//! Which threads use the devices' streams, so that none does while another captures one.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

struct Askers {
    threads: usize,
    capturing: bool,
}

static ASKERS: Mutex<Askers> = Mutex::new(Askers { threads: 0, capturing: false });
static CAPTURED: Condvar = Condvar::new();

thread_local! {
    /// Of this thread, one within the other.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

fn askers() -> MutexGuard<'static, Askers> {
    ASKERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While it lives, nobody captures a stream but this thread.
#[must_use]
pub struct Asking(PhantomData<*const ()>);

/// To be held by a thread that asks a CUDA device for work, or frees its tensors, while others may use a [`super::Replay`]. Waits for
/// one that is being captured, some milliseconds. May be held several times.
pub fn asking() -> Asking {
    if DEPTH.get() == 0 {
        let mut askers = askers();
        while askers.capturing {
            askers = CAPTURED.wait(askers).unwrap_or_else(PoisonError::into_inner);
        }
        askers.threads += 1;
    }
    DEPTH.set(DEPTH.get() + 1);
    Asking(PhantomData)
}

impl Drop for Asking {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
        if DEPTH.get() == 0 {
            askers().threads -= 1;
        }
    }
}

/// Does `work` while nobody else asks; `None` where somebody does. It does not wait: they may wait for what this thread holds.
#[cfg(feature = "cuda")]
pub(super) fn alone<T>(work: impl FnOnce() -> T) -> Option<T> {
    struct Captured;
    impl Drop for Captured {
        fn drop(&mut self) {
            askers().capturing = false;
            CAPTURED.notify_all();
        }
    }
    let _asking = asking();
    {
        let mut askers = askers();
        if askers.threads > 1 {
            return None;
        }
        askers.capturing = true;
    }
    let _captured = Captured;
    Some(work())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_asks_as_often_as_it_likes_and_others_are_seen() {
        let (outer, inner) = (asking(), asking());
        drop(outer);
        assert!(askers().threads >= 1);
        std::thread::spawn(|| drop(asking())).join().unwrap();
        drop(inner);
        assert_eq!(DEPTH.get(), 0);
    }
}
