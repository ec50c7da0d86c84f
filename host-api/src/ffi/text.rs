//! `sh_text`, written and read.

use std::ptr;

use crate::abi::{sh_string, sh_text, sh_view};
use crate::error::{Error, Result};
use crate::ffi;
use crate::types::Text;
use crate::view::{Reach, View};

/// What a [`Text`] borrows on the plugin's side: copies of the host's arrays.
#[derive(Default)]
pub(crate) struct TextParts<'a> {
    context: Option<View<'a>>,
    pooled: Option<View<'a>>,
    end_of_text: Option<Vec<i64>>,
    prompts: Option<Vec<String>>,
}

impl<'a> TextParts<'a> {
    /// # Safety
    /// `text` points to an `sh_text` whose pointers are null or valid for a batch of `batch`, for `'a`.
    pub(crate) unsafe fn from_raw(text: *const sh_text, batch: usize, reach: Reach) -> Result<Self> {
        // SAFETY: the caller's promise.
        let text = unsafe { ffi::read_struct(text, "text") }?;
        if text.reserved != 0 {
            return Err(Error::invalid_argument("text: reserved is not 0"));
        }
        let mut parts = Self::default();
        if !text.context.is_null() {
            // SAFETY: the caller's promise.
            let context = unsafe { View::from_raw(text.context, "text context", reach) }?;
            parts.context = Some(with_batch(context, 3, "[B, S, D]", batch, "text context")?);
        }
        if !text.pooled.is_null() {
            // SAFETY: the caller's promise.
            let pooled = unsafe { View::from_raw(text.pooled, "pooled text", reach) }?;
            parts.pooled = Some(with_batch(pooled, 2, "[B, D]", batch, "pooled text")?);
        }
        if !text.end_of_text.is_null() {
            // SAFETY: not null, so `batch` positions by the caller's promise.
            let positions = unsafe { ffi::read_array(text.end_of_text, batch as u64, "end_of_text") }?;
            let length = parts.context.map_or(i64::MAX, |context| context.shape()[1] as i64);
            if let Some(position) = positions.iter().find(|&&position| position < 0 || position >= length) {
                let message = format!("end_of_text {position} is outside the context");
                return Err(Error::invalid_argument(message));
            }
            parts.end_of_text = Some(positions);
        }
        if !text.prompts.is_null() {
            // SAFETY: not null, so `batch` strings by the caller's promise.
            let prompts = unsafe { ffi::read_array(text.prompts, batch as u64, "prompts") }?;
            // SAFETY: the caller's promise for each string.
            let prompts = prompts.into_iter().map(|prompt| unsafe { ffi::read_string(prompt, "prompt") });
            parts.prompts = Some(prompts.collect::<Result<_>>()?);
        }
        Ok(parts)
    }

    pub(crate) fn text(&self) -> Text<'_> {
        Text {
            context: self.context,
            pooled: self.pooled,
            end_of_text: self.end_of_text.as_deref(),
            prompts: self.prompts.as_deref(),
        }
    }
}

fn with_batch<'a>(view: View<'a>, rank: usize, form: &str, batch: usize, what: &str) -> Result<View<'a>> {
    let shape = view.shape();
    if shape.len() != rank || shape[0] != batch {
        return Err(Error::shape_mismatch(format!("{what} has shape {shape:?}, expected {form} with B = {batch}")));
    }
    Ok(view)
}

/// What an `sh_text` points to. Built from a [`Text`] that has to outlive it.
pub(crate) struct RawText {
    context: Option<sh_view>,
    pooled: Option<sh_view>,
    end_of_text: *const i64,
    prompts: Option<Vec<sh_string>>,
}

impl RawText {
    /// Refuses arrays that the other side, which counts to `batch`, would read past.
    pub(crate) fn new(text: &Text<'_>, batch: usize) -> Result<Self> {
        let lengths = [text.end_of_text.map(<[_]>::len), text.prompts.map(<[_]>::len)];
        if let Some(length) = lengths.into_iter().flatten().find(|&length| length != batch) {
            return Err(Error::shape_mismatch(format!("{length} texts for a batch of {batch}")));
        }
        Ok(Self {
            context: text.context.as_ref().map(View::as_raw),
            pooled: text.pooled.as_ref().map(View::as_raw),
            end_of_text: text.end_of_text.map_or(ptr::null(), <[_]>::as_ptr),
            prompts: text.prompts.map(|prompts| prompts.iter().map(|prompt| sh_string::borrowing(prompt)).collect()),
        })
    }

    /// Points into `self`, which has to stay where it is while the result is used.
    pub(crate) fn as_raw(&self) -> sh_text {
        sh_text {
            struct_size: ffi::struct_size::<sh_text>(),
            reserved: 0,
            context: self.context.as_ref().map_or(ptr::null(), ptr::from_ref),
            pooled: self.pooled.as_ref().map_or(ptr::null(), ptr::from_ref),
            end_of_text: self.end_of_text,
            prompts: self.prompts.as_ref().map_or(ptr::null(), Vec::as_ptr),
        }
    }
}
