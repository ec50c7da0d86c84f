//! Vectors of f32, as wide as the machine that runs has them.

use pulp::{Arch, Simd, WithSimd};

/// Runs `task` with the widest vectors of this machine.
pub(super) fn widest<T: WithSimd>(task: T) -> T::Output {
    arch().dispatch(task)
}

#[cfg(not(all(test, target_arch = "x86_64")))]
fn arch() -> Arch {
    Arch::new()
}

/// Of a process of tests, what `VECTORS` says: `avx2` or `scalar`, to see what machines with less run.
#[cfg(all(test, target_arch = "x86_64"))]
fn arch() -> Arch {
    static ARCH: std::sync::OnceLock<Arch> = std::sync::OnceLock::new();
    *ARCH.get_or_init(|| match std::env::var("VECTORS").as_deref() {
        Err(_) => Arch::new(),
        Ok("avx2") => Arch::V3(pulp::x86::V3::try_new().expect("a machine with AVX2")),
        Ok("scalar") => Arch::Scalar,
        Ok(other) => panic!("VECTORS is `{other}`, expected `avx2` or `scalar`"),
    })
}

/// Values in a vector of [`widest`].
pub(super) fn lanes() -> usize {
    struct Lanes;
    impl WithSimd for Lanes {
        type Output = usize;

        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }
    widest(Lanes)
}

/// What the kernels do with vectors. All of it must be inlined, into functions that are compiled for the instructions at hand:
/// neither closures nor iterators may stand between.
pub(super) trait Vectors: Simd {
    /// # Safety
    /// `at` points to as many values as a vector holds.
    #[inline(always)]
    unsafe fn load(self, at: *const f32) -> Self::f32s {
        // SAFETY: the caller's; a vector of f32 is as many f32 in a row.
        unsafe { at.cast::<Self::f32s>().read_unaligned() }
    }

    /// # Safety
    /// `at` points to room for as many values as a vector holds, which nobody else uses.
    #[inline(always)]
    unsafe fn store(self, at: *mut f32, values: Self::f32s) {
        // SAFETY: the caller's; a vector of f32 is as many f32 in a row.
        unsafe { at.cast::<Self::f32s>().write_unaligned(values) }
    }

    /// `factor x`.
    #[inline(always)]
    fn scaled(self, factor: f32, x: Self::f32s) -> Self::f32s {
        self.mul_f32s(self.splat_f32s(factor), x)
    }

    /// `factor x + y`.
    #[inline(always)]
    fn scaled_plus(self, factor: f32, x: Self::f32s, y: Self::f32s) -> Self::f32s {
        self.mul_add_f32s(self.splat_f32s(factor), x, y)
    }

    /// A vector from `values[at..]`, with zeros beyond the end.
    ///
    /// # Safety
    /// `at` is not beyond the end.
    #[inline(always)]
    unsafe fn load_up_to(self, values: &[f32], at: usize) -> Self::f32s {
        // SAFETY: the caller's, and the length is looked at.
        unsafe {
            if values.len() - at >= Self::F32_LANES {
                self.load(values.as_ptr().add(at))
            } else {
                self.partial_load_f32s(values.get_unchecked(at..))
            }
        }
    }

    /// The first `count` values of a vector.
    ///
    /// # Safety
    /// There is room for them, which nobody else uses.
    #[inline(always)]
    unsafe fn store_up_to(self, at: *mut f32, count: usize, values: Self::f32s) {
        // SAFETY: the caller's.
        unsafe {
            if count == Self::F32_LANES {
                self.store(at, values);
            } else {
                self.mask_store_ptr_f32s(self.mask_between_m32s(0, count as u32), at, values);
            }
        }
    }

    /// # Safety
    /// There is room for as many values, which nobody else uses.
    #[inline(always)]
    unsafe fn store_all(self, to: *mut f32, values: &[f32]) {
        for at in (0..values.len()).step_by(Self::F32_LANES) {
            let count = Self::F32_LANES.min(values.len() - at);
            // SAFETY: the caller's.
            unsafe { self.store_up_to(to.add(at), count, self.load_up_to(values, at)) };
        }
    }
}

impl<S: Simd> Vectors for S {}

/// Values in a line of the cache.
pub(super) const LINE: usize = 16;

/// Asks for a `1 / parts` of values, which need not be memory of ours, to be fetched into the second-level cache.
#[inline(always)]
pub(super) fn prefetch(values: *const f32, count: usize, part: usize, parts: usize) {
    let lines = count.div_ceil(LINE * parts);
    for line in part * lines..((part + 1) * lines).min(count.div_ceil(LINE)) {
        prefetch_line(values.wrapping_add(line * LINE));
    }
}

/// Asks likewise for what is in a line of the cache with a value.
#[inline(always)]
pub(super) fn prefetch_line(value: *const f32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch reads nothing and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(value.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = value;
}

/// [`prefetch_line`] into the first-level cache.
#[inline(always)]
pub(super) fn prefetch_line_close(value: *const f32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(value.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = value;
}
