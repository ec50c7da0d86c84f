//! Element copies through raw pointers: the only place that touches a view's memory.
//!
//! No reference into that memory is ever made, so input and output may be the same.

use half::{bf16, f16};

use super::layout::Layout;
use super::{Dtype, Element};

/// # Safety
/// `base` plus every offset of `layout` is aligned and readable.
pub(crate) unsafe fn read(base: *const u8, layout: &Layout) -> Vec<f32> {
    // SAFETY: the caller's promise, with the element type that the layout names.
    unsafe {
        match layout.dtype {
            Dtype::F32 => read_as::<f32>(base.cast(), layout),
            Dtype::F16 => read_as::<f16>(base.cast(), layout),
            Dtype::Bf16 => read_as::<bf16>(base.cast(), layout),
        }
    }
}

/// # Safety
/// `base` plus every offset of `layout` is aligned and writable; `values` has `layout.count` elements.
pub(crate) unsafe fn write(base: *mut u8, layout: &Layout, values: &[f32]) {
    assert_eq!(values.len(), layout.count, "one value per element of {:?}", layout.shape());
    // SAFETY: the caller's promise, with the element type that the layout names.
    unsafe {
        match layout.dtype {
            Dtype::F32 => write_as::<f32>(base.cast(), layout, values),
            Dtype::F16 => write_as::<f16>(base.cast(), layout, values),
            Dtype::Bf16 => write_as::<bf16>(base.cast(), layout, values),
        }
    }
}

/// Copies bit for bit; the two may overlap.
///
/// # Safety
/// As [`read`] for `from` and [`write`] for `to`.
pub(crate) unsafe fn copy(from: *const u8, from_layout: &Layout, to: *mut u8, to_layout: &Layout) {
    assert_eq!((from_layout.shape(), from_layout.dtype), (to_layout.shape(), to_layout.dtype));
    // SAFETY: the caller's promise; integers of the element's size have its alignment.
    unsafe {
        match from_layout.dtype.size() {
            4 => copy_as::<u32>(from.cast(), from_layout, to.cast(), to_layout),
            _ => copy_as::<u16>(from.cast(), from_layout, to.cast(), to_layout),
        }
    }
}

/// # Safety
/// As [`read`], for elements of type `T`.
pub(crate) unsafe fn elements<T: Element>(base: *const T, layout: &Layout) -> Vec<T> {
    let mut values = Vec::with_capacity(layout.count);
    // SAFETY: the offset is one of the layout's.
    layout.for_each_offset(|offset| values.push(unsafe { base.wrapping_offset(offset as isize).read() }));
    values
}

unsafe fn read_as<T: Element>(base: *const T, layout: &Layout) -> Vec<f32> {
    let mut values = Vec::with_capacity(layout.count);
    // SAFETY: the offset is one of the layout's.
    layout.for_each_offset(|offset| values.push(unsafe { base.wrapping_offset(offset as isize).read() }.to_f32()));
    values
}

unsafe fn write_as<T: Element>(base: *mut T, layout: &Layout, values: &[f32]) {
    let mut values = values.iter();
    layout.for_each_offset(|offset| {
        if let Some(value) = values.next() {
            // SAFETY: the offset is one of the layout's.
            unsafe { base.wrapping_offset(offset as isize).write(T::from_f32(*value)) };
        }
    });
}

unsafe fn copy_as<T: Copy>(from: *const T, from_layout: &Layout, to: *mut T, to_layout: &Layout) {
    let mut bits = Vec::with_capacity(from_layout.count);
    // SAFETY: the offset is one of the layout's.
    from_layout.for_each_offset(|offset| bits.push(unsafe { from.wrapping_offset(offset as isize).read() }));
    let mut bits = bits.into_iter();
    to_layout.for_each_offset(|offset| {
        if let Some(bits) = bits.next() {
            // SAFETY: the offset is one of the layout's.
            unsafe { to.wrapping_offset(offset as isize).write(bits) };
        }
    });
}
