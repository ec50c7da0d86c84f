/// Computes on a thread of the pool, which takes part in parallel work; the host's thread would sleep until it is done. Nothing
/// that calls the host belongs here: it expects its own thread.
pub(crate) fn on_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}
