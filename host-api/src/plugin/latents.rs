//! The latents of a step, as a plugin sees them.

use crate::error::{Error, Result, Status};
use crate::view::{Dtype, Lent, Memory, Reach, View, ViewMut};

/// A batch of latents `[B, C, h, w]`. Reads give what the host passed; writes are kept until the step has succeeded.
///
/// A plugin that reaches main memory alone reads and writes numbers, item by item; one that reaches devices takes the
/// [`view`](Self::view) and [`write`](Self::write)s whole batches.
#[derive(Debug)]
pub struct Latents<'a> {
    input: View<'a>,
    shape: [usize; 4],
    writes: Writes,
}

#[derive(Debug)]
enum Writes {
    Items(Vec<Option<Vec<f32>>>),
    Batch(Box<Lent>),
}

impl<'a> Latents<'a> {
    /// `input` has rank 4.
    pub(crate) fn new(input: View<'a>, shape: [usize; 4]) -> Self {
        Self { input, shape, writes: Writes::Items(vec![None; shape[0]]) }
    }

    /// `[B, C, h, w]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The host's element type, to which writes are rounded.
    pub fn dtype(&self) -> Dtype {
        self.input.dtype()
    }

    /// What the host passed.
    pub fn view(&self) -> View<'a> {
        self.input
    }

    /// Elements of one item: `C * h * w`.
    pub fn item_len(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// The whole batch in row-major order, as the host passed it.
    ///
    /// # Panics
    /// When it is not in main memory.
    pub fn read(&self) -> Vec<f32> {
        self.input.to_vec()
    }

    /// One item in row-major order, as the host passed it.
    ///
    /// # Panics
    /// When `index` is not less than B, and when the latents are not in main memory.
    pub fn read_item(&self, index: usize) -> Vec<f32> {
        self.input.item(index).to_vec()
    }

    /// Replaces one item. Fails with [`Status::NonFinite`] when a value is not finite in the host's element type.
    pub fn write_item(&mut self, index: usize, values: &[f32]) -> Result<()> {
        let items = match &mut self.writes {
            Writes::Items(items) if self.input.memory() == Memory::Main => items,
            _ => {
                let message = "items are written to latents in main memory, and not after a whole batch";
                return Err(Error::new(Status::Internal, message));
            }
        };
        if index >= self.shape[0] {
            return Err(Error::invalid_argument(format!("item {index} of a batch of {}", self.shape[0])));
        }
        let length = self.shape[1..].iter().product::<usize>();
        if values.len() != length {
            let message = format!("{} values for an item of {length}", values.len());
            return Err(Error::shape_mismatch(message));
        }
        let dtype = self.input.dtype();
        if let Some(value) = values.iter().find(|&&value| !dtype.round(value).is_finite()) {
            let message = format!("item {index} would hold {value}, which is not finite in {dtype:?}");
            return Err(Error::new(Status::NonFinite, message));
        }
        items[index] = Some(values.to_vec());
        Ok(())
    }

    /// Replaces all items but those that the report gives a status, by numbers of the host's element type that are finite.
    pub fn write(&mut self, batch: Lent) -> Result<()> {
        let view = batch.view();
        if view.shape() != self.shape {
            let message = format!("a batch of shape {:?} for latents of {:?}", view.shape(), self.shape);
            return Err(Error::shape_mismatch(message));
        }
        if view.dtype() != self.dtype() {
            let message = format!("a batch of {:?} for latents of {:?}", view.dtype(), self.dtype());
            return Err(Error::new(Status::DtypeMismatch, message));
        }
        self.writes = Writes::Batch(Box::new(batch));
        Ok(())
    }

    /// Whether anything was written.
    pub(crate) fn is_written(&self) -> bool {
        match &self.writes {
            Writes::Items(items) => items.iter().any(Option::is_some),
            Writes::Batch(_) => true,
        }
    }

    /// Writes to `out` what was written for items that `keep` accepts, and the other items as they were. In main memory this
    /// cannot fail, so that a step is seen whole or not at all; on a device it fails where the device does.
    pub(crate) fn commit(
        self,
        out: &mut ViewMut<'_>,
        in_place: bool,
        reach: Reach,
        keep: impl Fn(usize) -> bool,
    ) -> Result<()> {
        if !self.is_written() {
            return if in_place { Ok(()) } else { reach.copy(&self.input, out) };
        }
        match &self.writes {
            Writes::Batch(batch) if (0..self.shape[0]).all(&keep) => return reach.copy(&batch.view(), out),
            _ => {}
        }
        for index in 0..self.shape[0] {
            let mut item = out.item_mut(index);
            let before = self.input.item(index);
            match &self.writes {
                Writes::Batch(batch) if keep(index) => reach.copy(&batch.view().item(index), &mut item)?,
                Writes::Items(items) if keep(index) && items[index].is_some() => {
                    item.fill(items[index].as_deref().expect("looked at above"));
                }
                _ if in_place => {}
                _ => reach.copy(&before, &mut item)?,
            }
        }
        Ok(())
    }
}
