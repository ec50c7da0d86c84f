//! Memory for tensors that come and go at every step.
//!
//! A system's allocator gives large blocks back as they are freed, and takes them again page by page: a sixth of a corrected step.
//! [`TensorAllocator`] keeps them for the next tensor of about that size, in large pages where the system has them.

use std::alloc::{GlobalAlloc, Layout, System};

use candle_core::Device;

/// To be a program's, or a shared library's, `#[global_allocator]`. Blocks of 64 kB and more are kept once they are freed, up to a
/// gigabyte together, and as new ones are taken no more than a margin beyond what was once in use; [`release_memory`] gives them
/// back. Others, and all but on Linux, are the system's.
#[derive(Clone, Copy, Debug)]
pub struct TensorAllocator {
    /// In bytes.
    #[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "all memory is the system's there"))]
    margin: usize,
}

/// Bytes that are kept together, at most.
const MOST_KEPT: usize = 1 << 30;

impl TensorAllocator {
    /// With a margin of 64 MB: without any, small models map and unmap at every layer.
    pub const fn new() -> Self {
        Self { margin: 64 << 20 }
    }

    /// Keeps all up to the gigabyte, for training: what it holds from the forward to the backward pass is of many sizes, and the memory
    /// of one does not serve another.
    pub const fn for_training() -> Self {
        Self { margin: MOST_KEPT }
    }
}

impl Default for TensorAllocator {
    fn default() -> Self {
        Self::new()
    }
}

/// Gives the memory that [`TensorAllocator`] keeps back to the system and, of a GPU, what is kept of its memory to the driver.
pub fn release_memory(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        // What fails here fails again, and is reported, where the device is used.
        let _ = crate::device::release_pool(device);
    }
    #[cfg(not(feature = "cuda"))]
    let _ = device;
    #[cfg(target_os = "linux")]
    kept::release();
}

// SAFETY: large layouts are told from others by themselves alone, so memory goes back where it came from; either side is an
// allocator.
unsafe impl GlobalAlloc for TensorAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        #[cfg(target_os = "linux")]
        if let Some(class) = kept::Class::of(layout) {
            return class.alloc(self.margin).0;
        }
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        #[cfg(target_os = "linux")]
        if let Some(class) = kept::Class::of(layout) {
            let (block, fresh) = class.alloc(self.margin);
            if !fresh {
                // SAFETY: a block of this class has at least so many bytes.
                unsafe { block.write_bytes(0, layout.size()) };
            }
            return block;
        }
        // SAFETY: the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        #[cfg(target_os = "linux")]
        if let Some(class) = kept::Class::of(layout) {
            // SAFETY: a block of the same layout, so of this class, that nobody uses any more.
            return unsafe { class.free(block) };
        }
        // SAFETY: the caller's.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        #[cfg(target_os = "linux")]
        {
            // SAFETY: the caller's: the size, rounded up to the alignment, is one of a layout.
            let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
            let classes = (kept::Class::of(layout), kept::Class::of(new));
            if classes != (None, None) {
                if classes.0 == classes.1 {
                    return block;
                }
                // SAFETY: the caller's; the blocks are different ones.
                return unsafe {
                    let moved = self.alloc(new);
                    if !moved.is_null() {
                        moved.copy_from_nonoverlapping(block, layout.size().min(size));
                        self.dealloc(block, layout);
                    }
                    moved
                };
            }
        }
        // SAFETY: the caller's.
        unsafe { System.realloc(block, layout, size) }
    }
}

#[cfg(target_os = "linux")]
mod kept {
    use std::alloc::Layout;
    use std::ptr::null_mut;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::MOST_KEPT;

    /// Below the size from which glibc maps and unmaps every block.
    const LEAST: usize = 1 << 16;
    /// Where all blocks begin, on every system.
    const SMALL_PAGE: usize = 4 << 10;
    /// Where those begin that hold a large page.
    const PAGE: usize = 2 << 20;
    /// Classes from one power of two to the next.
    const STEPS: usize = 8;
    const CLASSES: usize = (usize::BITS as usize - LEAST.ilog2() as usize) * STEPS;

    /// Blocks of one size. Sizes are eighths of powers of two.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub(super) struct Class {
        index: usize,
        size: usize,
    }

    /// A block that is kept; its first bytes say which one is next.
    struct Block {
        next: *mut Block,
    }

    struct Kept {
        first: [*mut Block; CLASSES],
        bytes: usize,
        /// Bytes of the blocks in use, and the most that they have been.
        used: usize,
        most_used: usize,
    }

    // SAFETY: nobody else has pointers to the blocks.
    unsafe impl Send for Kept {}

    static KEPT: Mutex<Kept> = Mutex::new(Kept { first: [null_mut(); CLASSES], bytes: 0, used: 0, most_used: 0 });

    fn kept() -> MutexGuard<'static, Kept> {
        KEPT.lock().unwrap_or_else(PoisonError::into_inner)
    }

    impl Class {
        /// `None` for layouts that are the system's.
        pub(super) fn of(layout: Layout) -> Option<Self> {
            let size = layout.size();
            if size < LEAST || layout.align() > SMALL_PAGE {
                return None;
            }
            let octave = size.ilog2();
            let step = 1usize << (octave - STEPS.ilog2());
            // Of a size in this octave, 0 to STEPS; the last is the first of the next octave.
            let steps = (size - (1 << octave)).div_ceil(step);
            let index = (octave - LEAST.ilog2()) as usize * STEPS + steps;
            Some(Self { index, size: (1usize << octave).checked_add(steps * step)? })
        }

        fn at(index: usize) -> Self {
            let (octave, steps) = (LEAST << (index / STEPS), index % STEPS);
            Self { index, size: octave + octave / STEPS * steps }
        }

        /// A block, or null where the system has none, and whether it is new and zero. If it is new, no more is kept besides than
        /// `margin` beyond what was once in use.
        pub(super) fn alloc(self, margin: usize) -> (*mut u8, bool) {
            let mut kept = kept();
            let used = kept.used.saturating_add(self.size);
            let block = kept.first[self.index];
            if block.is_null() {
                // What is kept of other sizes makes room.
                let most_kept = kept.most_used.saturating_sub(used);
                kept.release_down_to(most_kept.max(margin));
                let block = self.map();
                if !block.is_null() {
                    kept.count(used);
                }
                return (block, true);
            }
            kept.count(used);
            // SAFETY: a kept block's first bytes are a `Block`.
            kept.first[self.index] = unsafe { (*block).next };
            kept.bytes -= self.size;
            (block.cast(), false)
        }

        /// Keeps a block, for which the largest ones that are kept may have to go.
        ///
        /// # Safety
        /// The block is of this class, and nobody uses it.
        pub(super) unsafe fn free(self, block: *mut u8) {
            let mut kept = kept();
            kept.used -= self.size;
            let block = block.cast::<Block>();
            // SAFETY: the caller's; a block is large enough and aligned to more.
            unsafe { block.write(Block { next: kept.first[self.index] }) };
            kept.first[self.index] = block;
            kept.bytes += self.size;
            kept.release_down_to(MOST_KEPT);
        }

        fn map(self) -> *mut u8 {
            let aligned = if self.size < PAGE { 0 } else { PAGE };
            let Some(size) = self.size.checked_add(aligned) else { return null_mut() };
            // SAFETY: new memory; of what was mapped, the parts before and after the block are given back.
            unsafe {
                let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                let mapped = libc::mmap(null_mut(), size, protection, flags, -1, 0);
                if mapped == libc::MAP_FAILED {
                    return null_mut();
                }
                if aligned == 0 {
                    return mapped.cast();
                }
                let before = mapped.cast::<u8>().align_offset(PAGE);
                let block = mapped.byte_add(before);
                if before > 0 {
                    libc::munmap(mapped, before);
                }
                if before < PAGE {
                    libc::munmap(block.byte_add(self.size), PAGE - before);
                }
                libc::madvise(block, self.size, libc::MADV_HUGEPAGE);
                block.cast()
            }
        }

        /// # Safety
        /// The block is of this class, and nobody uses it.
        unsafe fn unmap(self, block: *mut u8) {
            // SAFETY: the caller's.
            unsafe { libc::munmap(block.cast(), self.size) };
        }
    }

    impl Kept {
        fn count(&mut self, used: usize) {
            self.used = used;
            self.most_used = self.most_used.max(used);
        }

        /// Gives back the largest blocks, until no more than `bytes` are kept.
        fn release_down_to(&mut self, bytes: usize) {
            for (index, first) in self.first.iter_mut().enumerate().rev() {
                while self.bytes > bytes && !first.is_null() {
                    let class = Class::at(index);
                    let block = *first;
                    // SAFETY: a kept block's first bytes are a `Block`, and it is of this class.
                    unsafe {
                        *first = (*block).next;
                        class.unmap(block.cast());
                    }
                    self.bytes -= class.size;
                }
            }
        }
    }

    pub(super) fn release() {
        kept().release_down_to(0);
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        const MARGIN: usize = 64 << 20;

        fn class(size: usize) -> Class {
            Class::of(Layout::from_size_align(size, 4).unwrap()).unwrap()
        }

        #[test]
        fn sizes_are_eighths_of_powers_of_two() {
            assert_eq!(Class::of(Layout::from_size_align(LEAST - 1, 4).unwrap()), None);
            for size in (LEAST..LEAST * 90).step_by(4097) {
                let class = class(size);
                assert!(class.size >= size && class.size <= size + size / STEPS, "{size}: {class:?}");
                assert_eq!(class, self::class(class.size), "its own size is of the class");
                assert_eq!(class, Class::at(class.index));
            }
            assert_eq!(class(isize::MAX as usize - 3).size, 1 << 63, "as large as a layout can be");
        }

        #[test]
        fn blocks_come_back_until_they_are_released() {
            // Of a size that no other test has.
            let class = class(37 << 20);
            let (block, fresh) = class.alloc(MARGIN);
            assert!(fresh && block.addr().is_multiple_of(PAGE));
            // SAFETY: the block is ours, up to its last byte.
            unsafe {
                block.write_bytes(1, class.size);
                class.free(block);
            }
            assert_eq!(class.alloc(MARGIN), (block, false));
            // SAFETY: it is ours again.
            unsafe { class.free(block) };
            release();
            let (block, fresh) = class.alloc(MARGIN);
            // SAFETY: ours once more, and new.
            unsafe {
                assert!(fresh && *block == 0 && *block.add(class.size - 1) == 0);
                class.free(block);
            }
        }

        /// A large one makes room for others.
        #[test]
        fn the_largest_go_first() {
            let (small, large) = (class(1 << 20), class(3 << 20));
            let bytes = small.size + large.size;
            let mut kept = Kept { first: [null_mut(); CLASSES], bytes, used: 0, most_used: bytes };
            for class in [small, large] {
                kept.first[class.index] = class.map().cast();
                // SAFETY: a block of our own.
                unsafe { kept.first[class.index].write(Block { next: null_mut() }) };
            }
            kept.release_down_to(2 << 20);
            assert!(kept.first[large.index].is_null() && !kept.first[small.index].is_null());
            assert_eq!(kept.bytes, small.size);
            kept.release_down_to(0);
            assert!(kept.first[small.index].is_null() && kept.bytes == 0);
        }

        /// What cannot be had is null, not a crash.
        #[test]
        fn more_than_there_is() {
            assert!(class(1 << 62).alloc(MARGIN).0.is_null());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small, large, larger and small again: what was written stays, and what is asked to be zero is.
    #[test]
    fn blocks_keep_their_values_as_they_grow() {
        let layout = |size| Layout::from_size_align(size, 64).unwrap();
        let sizes = [1000, 3 << 20, (3 << 20) + 4096, 9 << 20, 5 << 20, 2000];
        // SAFETY: layouts are those that the blocks were made by.
        unsafe {
            let mut block = TensorAllocator::new().alloc(layout(sizes[0]));
            block.write_bytes(7, sizes[0]);
            for pair in sizes.windows(2) {
                block = TensorAllocator::new().realloc(block, layout(pair[0]), pair[1]);
                assert!(std::slice::from_raw_parts(block, 1000).iter().all(|value| *value == 7), "{pair:?}");
            }
            TensorAllocator::new().dealloc(block, layout(2000));
            for _ in 0..2 {
                let block = TensorAllocator::new().alloc_zeroed(layout(9 << 20));
                assert!(std::slice::from_raw_parts(block, 9 << 20).iter().all(|value| *value == 0));
                block.write_bytes(1, 9 << 20);
                TensorAllocator::new().dealloc(block, layout(9 << 20));
            }
        }
        release_memory(&Device::Cpu);
    }
}
