/// Says how many threads candle takes, all processors, unless the user does. Without it candle reads the processor's
/// description from the system at every product of matrices.
///
/// # Safety
/// To be called before anything starts a thread: another that reads the environment at the same time would race.
pub unsafe fn settle_threads() {
    if std::env::var_os("RAYON_NUM_THREADS").is_none() {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        // SAFETY: no other thread runs, as the caller promises.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
    }
}
