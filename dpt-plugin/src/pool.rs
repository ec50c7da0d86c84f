use candle_core::Device;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::{Error, Result};

/// The threads that a plugin computes on.
pub(crate) enum Pool {
    /// Those of the process, as many as it has cores.
    Shared,
    Own(ThreadPool),
    /// The one that asks: a GPU computes.
    Caller,
}

impl Pool {
    pub(crate) fn new(threads: Option<usize>, device: &Device) -> Result<Self> {
        if !device.is_cpu() {
            return Ok(Self::Caller);
        }
        let build = |threads| {
            let name = |index| format!("dpt-{index}");
            let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build();
            pool.map_err(|e| Error::Config(format!("`threads` is {threads}: {e}")))
        };
        threads.map_or(Ok(Self::Shared), |threads| build(threads).map(Self::Own))
    }

    /// Computes on a thread of the pool, which takes part in parallel work; the host's thread would sleep until it is done. Nothing
    /// that calls the host belongs here: it expects its own thread.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match self {
            Self::Own(pool) => pool.install(work),
            Self::Shared => rayon::scope(|_| work()),
            Self::Caller => work(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_runs_on_as_many_threads_as_are_asked_for() {
        for threads in [1, 3] {
            let pool = Pool::new(Some(threads), &Device::Cpu).unwrap();
            assert_eq!(pool.run(rayon::current_num_threads), threads);
        }
        let all = rayon::scope(|_| rayon::current_num_threads());
        assert_eq!(Pool::new(None, &Device::Cpu).unwrap().run(rayon::current_num_threads), all);
    }
}
