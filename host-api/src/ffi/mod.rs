//! Between C structs and safe types. Everything from the other side is copied and checked here.

pub(crate) mod error;
pub(crate) mod report;
pub(crate) mod sampling;
pub(crate) mod text;
pub(crate) mod view;

use std::ffi::c_char;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::abi::sh_string;
use crate::error::{Error, Result, Status};

/// Runs `f`; a panic becomes [`Status::Panic`] with the panic's message.
pub(crate) fn catch<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
        std::mem::forget(payload); // its drop could panic again
        Err(Error::new(Status::Panic, format!("panic: {}", text.as_deref().unwrap_or("(no message)"))))
    })
}

/// The size of a struct as its `struct_size` states it.
pub(crate) const fn struct_size<T>() -> u32 {
    size_of::<T>() as u32
}

fn check_pointer<T>(pointer: *const T, what: &str) -> Result<()> {
    if pointer.is_null() {
        return Err(Error::invalid_argument(format!("{what} is NULL")));
    }
    if !pointer.is_aligned() {
        return Err(Error::invalid_argument(format!("{what} is not aligned to {}", align_of::<T>())));
    }
    Ok(())
}

/// Checks the pointer and the `struct_size` at the start of what it points to.
///
/// # Safety
/// `pointer` is null or points to a struct that starts with `struct_size`.
pub(crate) unsafe fn check_struct<T>(pointer: *const T, what: &str) -> Result<()> {
    check_pointer(pointer, what)?;
    // SAFETY: not null, aligned, and the struct starts with a u32.
    let size = unsafe { pointer.cast::<u32>().read() };
    if (size as usize) < size_of::<T>() {
        let message = format!("{what}: struct_size {size} is less than {}", size_of::<T>());
        return Err(Error::invalid_argument(message));
    }
    Ok(())
}

/// A copy of a struct that starts with `struct_size`, as far as this build knows it.
///
/// # Safety
/// As [`check_struct`], and the struct is as large as it says.
pub(crate) unsafe fn read_struct<T: Copy>(pointer: *const T, what: &str) -> Result<T> {
    // SAFETY: the caller's promise.
    unsafe { check_struct(pointer, what) }?;
    // SAFETY: not null, aligned, and at least as large as T.
    Ok(unsafe { pointer.read() })
}

/// A copy of `count` elements; empty when `count` is 0.
///
/// # Safety
/// `pointer` is null or points to `count` elements.
pub(crate) unsafe fn read_array<T: Copy>(pointer: *const T, count: u64, what: &str) -> Result<Vec<T>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    check_pointer(pointer, what)?;
    let count = usize::try_from(count).ok().filter(|count| count.checked_mul(size_of::<T>()).is_some_and(fits_isize));
    let count = count.ok_or_else(|| Error::invalid_argument(format!("{what} is too long")))?;
    // SAFETY: not null, aligned, `count` elements by the caller's promise; copied before this returns.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) }.to_vec())
}

fn fits_isize(bytes: usize) -> bool {
    isize::try_from(bytes).is_ok()
}

/// A copy of a string.
///
/// # Safety
/// `data` is null or points to `size` bytes.
pub(crate) unsafe fn read_string(string: sh_string, what: &str) -> Result<String> {
    // SAFETY: the caller's promise.
    let bytes = unsafe { read_array::<c_char>(string.data, string.size, what) }?;
    let bytes = bytes.into_iter().map(|byte| byte.cast_unsigned()).collect();
    String::from_utf8(bytes).map_err(|_| Error::invalid_argument(format!("{what} is not UTF-8")))
}
