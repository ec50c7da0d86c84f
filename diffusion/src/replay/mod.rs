//! Work that is asked for again and again with other numbers. On a GPU a step is hundreds of kernels, most of which take less time
//! than launching them; as one CUDA graph they are launched together.

mod askers;
#[cfg(feature = "cuda")]
mod graph;
#[cfg(all(test, feature = "cuda"))]
mod tests;

use std::fmt::Display;

use candle_core::Tensor;

pub use askers::{Asking, asking};

use crate::{Error, Result};

/// On CUDA: work is done as it is the first time, captured as a graph the second, and from then on launched as that graph. Elsewhere
/// it is done as it is every time.
///
/// Capturing takes in whatever is asked of the device's stream: threads that use it at the same time say so by [`asking`], and where
/// others do, capturing is put off. A driver refuses to synchronize the whole device at that moment, also what does so on its way, such as
/// destroying a cuBLAS handle: nothing should be captured where other threads of the process do that.
///
/// Where no graph can be made or launched (memory for it may be short), work is done as it is from then on, and [`Replay::outcome`]
/// tells why.
pub struct Replay {
    captures: bool,
    outcome: Option<Result<()>>,
    #[cfg(feature = "cuda")]
    state: graph::State,
}

/// How work is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// As it is.
    Now,
    /// To be launched later: nothing but tensor operations may happen.
    Captured,
}

impl Replay {
    /// Of nothing so far. Unless it `captures`, work is done as it is every time.
    pub fn new(captures: bool) -> Self {
        Self {
            captures,
            outcome: None,
            #[cfg(feature = "cuda")]
            state: graph::State::default(),
        }
    }

    /// Begins anew, for other work.
    pub fn forget(&mut self) {
        *self = Self::new(self.captures);
    }

    /// That a graph was made, or why none will be; once.
    pub fn outcome(&mut self) -> Option<Result<()>> {
        self.outcome.take()
    }

    /// `work` of these inputs, its results copies of their own.
    ///
    /// It must depend on nothing but the inputs, and on tensors that stay what and where they are as long as this is used; and it
    /// must not read numbers back, bring them from main memory or, after a first time, keep any tensor. With inputs of other shapes or
    /// dtypes it is captured anew.
    pub fn run<const I: usize, const O: usize, E: From<Error> + Display>(
        &mut self,
        inputs: [&Tensor; I],
        mut work: impl FnMut([&Tensor; I], Pass) -> std::result::Result<[Tensor; O], E>,
    ) -> std::result::Result<[Tensor; O], E> {
        #[cfg(feature = "cuda")]
        if let Some(device) = graph::device_of(&inputs).filter(|_| self.captures) {
            let Self { state, outcome, .. } = self;
            let mut work =
                |inputs: &[&Tensor], pass| work(inputs.try_into().expect("as many as were given"), pass).map(Vec::from);
            let results = state.run(&device, &inputs, &mut work, outcome)?;
            return Ok(results.try_into().expect("as many as the work made"));
        }
        work(inputs, Pass::Now)
    }
}
