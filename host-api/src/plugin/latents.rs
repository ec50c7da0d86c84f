//! The latents of a step, as a plugin sees them.

use crate::error::{Error, Result, Status};
use crate::view::{Dtype, View, ViewMut};

/// A batch of latents `[B, C, h, w]`. Reads give what the host passed; writes are kept until the step has succeeded.
#[derive(Debug)]
pub struct Latents<'a> {
    input: View<'a>,
    shape: [usize; 4],
    writes: Vec<Option<Vec<f32>>>,
}

impl<'a> Latents<'a> {
    /// `input` has rank 4.
    pub(crate) fn new(input: View<'a>, shape: [usize; 4]) -> Self {
        Self { input, shape, writes: vec![None; shape[0]] }
    }

    /// `[B, C, h, w]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The host's element type, to which writes are rounded.
    pub fn dtype(&self) -> Dtype {
        self.input.dtype()
    }

    /// Elements of one item: `C * h * w`.
    pub fn item_len(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// The whole batch in row-major order, as the host passed it.
    pub fn read(&self) -> Vec<f32> {
        self.input.to_vec()
    }

    /// One item in row-major order, as the host passed it.
    ///
    /// # Panics
    /// When `index` is not less than B.
    pub fn read_item(&self, index: usize) -> Vec<f32> {
        self.input.item(index).to_vec()
    }

    /// Replaces one item. Fails with [`Status::NonFinite`] when a value is not finite in the host's element type.
    pub fn write_item(&mut self, index: usize, values: &[f32]) -> Result<()> {
        if index >= self.shape[0] {
            return Err(Error::invalid_argument(format!("item {index} of a batch of {}", self.shape[0])));
        }
        if values.len() != self.item_len() {
            let message = format!("{} values for an item of {}", values.len(), self.item_len());
            return Err(Error::shape_mismatch(message));
        }
        let dtype = self.dtype();
        if let Some(value) = values.iter().find(|&&value| !dtype.round(value).is_finite()) {
            let message = format!("item {index} would hold {value}, which is not finite in {dtype:?}");
            return Err(Error::new(Status::NonFinite, message));
        }
        self.writes[index] = Some(values.to_vec());
        Ok(())
    }

    /// Whether anything was written.
    pub(crate) fn is_written(&self) -> bool {
        self.writes.iter().any(Option::is_some)
    }

    /// Writes to `out` what was written for items that `keep` accepts, and the other items as they were. Cannot fail, so
    /// that a step is seen whole or not at all.
    pub(crate) fn commit(self, out: &mut ViewMut<'_>, in_place: bool, keep: impl Fn(usize) -> bool) {
        for (index, write) in self.writes.iter().enumerate() {
            let mut item = out.item_mut(index);
            match write.as_ref().filter(|_| keep(index)) {
                Some(values) => item.fill(values),
                None if in_place => {}
                None => item.copy_from(&self.input.item(index)),
            }
        }
    }
}
