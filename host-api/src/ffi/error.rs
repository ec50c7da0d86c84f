//! `sh_error`, written and read.

use crate::abi::{SH_ERROR_MESSAGE_SIZE, sh_error, sh_status};
use crate::error::{Error, Result, Status};
use crate::ffi;

/// An empty error to hand to the other side.
pub(crate) fn empty() -> sh_error {
    sh_error { struct_size: ffi::struct_size::<sh_error>(), code: 0, message: [0; SH_ERROR_MESSAGE_SIZE] }
}

/// The longest prefix of `text` that fits with its terminator and ends at a character.
fn cut(text: &str) -> &str {
    let longest = text.len().min(SH_ERROR_MESSAGE_SIZE - 1);
    let end = (0..=longest).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    &text[..end]
}

/// Whether an error can be filled: null is fine, a struct that is too small is not.
///
/// # Safety
/// `error` is null or points to an `sh_error`.
pub(crate) unsafe fn check(error: *mut sh_error) -> Result<()> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: the caller's promise.
    unsafe { ffi::check_struct(error.cast_const(), "error") }
}

/// Fills `*error` and returns the code of a finished call.
///
/// # Safety
/// `error` is null or points to an `sh_error` that [`check`] accepted.
pub(crate) unsafe fn finish(result: Result<()>, error: *mut sh_error) -> sh_status {
    let Err(failure) = result else { return Status::Ok.code() };
    if !error.is_null() {
        let mut message = [0; SH_ERROR_MESSAGE_SIZE];
        // A NUL inside would end the text early for a C reader.
        for (to, from) in message.iter_mut().zip(cut(&failure.message).bytes()) {
            *to = if from == 0 { b' ' } else { from }.cast_signed();
        }
        // SAFETY: `error` is aligned and large enough; members are written one by one, so a larger struct keeps its tail.
        unsafe {
            (&raw mut (*error).code).write(failure.status.code());
            (&raw mut (*error).message).write(message);
        }
    }
    failure.status.code()
}

/// What a call of the other side said: its code and the message in `error`.
pub(crate) fn read(code: sh_status, error: &sh_error) -> Result<()> {
    if code == Status::Ok.code() {
        return Ok(());
    }
    let bytes: Vec<u8> = error.message.iter().take_while(|&&byte| byte != 0).map(|byte| byte.cast_unsigned()).collect();
    let mut message = String::from_utf8_lossy(&bytes).into_owned();
    let status = Status::from_code(code);
    if status.code() != code {
        message = format!("unknown status {code}: {message}");
    }
    Err(Error::new(status, message))
}
