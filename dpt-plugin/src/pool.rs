use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::{Error, Result};

/// The threads that a plugin computes on.
pub(crate) struct Pool {
    /// `None`: those of the process, as many as it has cores.
    own: Option<ThreadPool>,
}

impl Pool {
    pub(crate) fn new(threads: Option<usize>) -> Result<Self> {
        let build = |threads| {
            let name = |index| format!("dpt-{index}");
            let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build();
            pool.map_err(|e| Error::Config(format!("`threads` is {threads}: {e}")))
        };
        Ok(Self { own: threads.map(build).transpose()? })
    }

    /// Computes on a thread of the pool, which takes part in parallel work; the host's thread would sleep until it is done. Nothing
    /// that calls the host belongs here: it expects its own thread.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.own {
            Some(pool) => pool.install(work),
            None => rayon::scope(|_| work()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_runs_on_as_many_threads_as_are_asked_for() {
        for threads in [1, 3] {
            let pool = Pool::new(Some(threads)).unwrap();
            assert_eq!(pool.run(rayon::current_num_threads), threads);
        }
        let all = rayon::scope(|_| rayon::current_num_threads());
        assert_eq!(Pool::new(None).unwrap().run(rayon::current_num_threads), all);
    }
}
