//! Shape and strides: how elements lie around the first one.

use super::Dtype;
use crate::error::{Error, Result, Status};

/// Most dimensions of a view.
pub(crate) const MAX_DIMS: usize = 8;

/// Shape, strides in elements and element type. All offsets in bytes fit an `isize`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) dtype: Dtype,
    pub(crate) ndim: usize,
    pub(crate) shape: [usize; MAX_DIMS],
    pub(crate) strides: [i64; MAX_DIMS],
    /// The shape as DLPack wants it.
    pub(crate) raw_shape: [i64; MAX_DIMS],
    /// Number of elements.
    pub(crate) count: usize,
}

impl Layout {
    /// Row-major when `strides` is `None`.
    pub(crate) fn new(dtype: Dtype, shape: &[usize], strides: Option<&[i64]>) -> Result<Self> {
        if shape.len() > MAX_DIMS {
            return Err(Error::invalid_argument(format!(
                "a view has at most {MAX_DIMS} dimensions, not {}",
                shape.len()
            )));
        }
        if strides.is_some_and(|strides| strides.len() != shape.len()) {
            return Err(Error::invalid_argument("a view needs one stride per dimension"));
        }
        let too_large = || Error::invalid_argument(format!("a view of shape {shape:?} is too large"));
        let mut layout = Self { dtype, ndim: shape.len(), shape: [1; 8], strides: [1; 8], raw_shape: [1; 8], count: 1 };
        let mut row_major = 1i64;
        for axis in (0..shape.len()).rev() {
            let extent = i64::try_from(shape[axis]).map_err(|_| too_large())?;
            layout.shape[axis] = shape[axis];
            layout.raw_shape[axis] = extent;
            layout.strides[axis] = strides.map_or(row_major, |strides| strides[axis]);
            row_major = row_major.checked_mul(extent.max(1)).ok_or_else(too_large)?;
        }
        // Results are read as f32, so four bytes per element have to fit whatever the type is.
        if row_major > isize::MAX as i64 / 4 {
            return Err(too_large());
        }
        layout.count = if shape.contains(&0) { 0 } else { row_major as usize };
        let size = dtype.size() as i64;
        let (mut low, mut high) = (0i64, 0i64);
        for axis in 0..layout.ndim {
            if layout.count == 0 || layout.shape[axis] == 1 {
                continue; // a stride that is never taken may be anything
            }
            let reach = layout.strides[axis].checked_mul(layout.raw_shape[axis] - 1).and_then(|r| r.checked_mul(size));
            let reach = reach.ok_or_else(too_large)?;
            let side = if reach < 0 { &mut low } else { &mut high };
            *side = side.checked_add(reach).ok_or_else(too_large)?;
        }
        if low.checked_sub(high).is_none_or(|span| span.checked_sub(size).is_none()) {
            return Err(too_large());
        }
        Ok(layout)
    }

    /// The extents.
    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape[..self.ndim]
    }

    /// The strides in elements.
    pub(crate) fn strides(&self) -> &[i64] {
        &self.strides[..self.ndim]
    }

    /// Smallest and largest offset in elements; `None` without elements.
    pub(crate) fn reach(&self) -> Option<(i64, i64)> {
        (self.count > 0).then(|| {
            (0..self.ndim).filter(|&axis| self.shape[axis] > 1).fold((0, 0), |(low, high), axis| {
                let reach = self.strides[axis] * (self.raw_shape[axis] - 1);
                (low + reach.min(0), high + reach.max(0))
            })
        })
    }

    /// Offset of the `index`-th slice along the first axis, and the layout of such a slice.
    pub(crate) fn item(&self, index: usize) -> (i64, Self) {
        assert!(self.ndim > 0 && index < self.shape[0], "item {index} of a view of shape {:?}", self.shape());
        let mut item = *self;
        item.ndim -= 1;
        item.count = self.count / self.shape[0];
        item.shape.rotate_left(1);
        item.raw_shape.rotate_left(1);
        item.strides.rotate_left(1);
        (if index == 0 { 0 } else { self.strides[0] * index as i64 }, item)
    }

    /// Whether the elements follow each other without gaps.
    pub(crate) fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        for axis in (0..self.ndim).rev() {
            if self.shape[axis] > 1 && self.strides[axis] != expected {
                return false;
            }
            expected *= self.raw_shape[axis];
        }
        true
    }

    /// Calls `f` with the offset of each element in row-major order.
    pub(crate) fn for_each_offset(&self, mut f: impl FnMut(i64)) {
        if self.count == 0 {
            return;
        }
        let (rows, row) = if self.ndim == 0 {
            (0, (1, 0))
        } else {
            (self.ndim - 1, (self.shape[self.ndim - 1], self.strides[self.ndim - 1]))
        };
        let mut index = [0usize; MAX_DIMS];
        let mut start = 0i64;
        loop {
            let mut offset = start;
            for i in 0..row.0 {
                if i > 0 {
                    offset += row.1;
                }
                f(offset);
            }
            let mut axis = rows;
            loop {
                if axis == 0 {
                    return;
                }
                axis -= 1;
                index[axis] += 1;
                if index[axis] < self.shape[axis] {
                    start += self.strides[axis];
                    break;
                }
                start -= self.strides[axis].wrapping_mul(self.raw_shape[axis] - 1);
                index[axis] = 0;
            }
        }
    }

    /// Whether two indices lead to the same element.
    fn overlaps_itself(&self) -> bool {
        let Some((low, high)) = self.reach() else { return false };
        let mut axes: Vec<(u64, u64)> = (0..self.ndim)
            .filter(|&axis| self.shape[axis] > 1)
            .map(|axis| (self.strides[axis].unsigned_abs(), self.shape[axis] as u64))
            .collect();
        axes.sort_unstable();
        let mut span = 0;
        let nested = axes.iter().all(|&(stride, extent)| {
            let clear = stride > span;
            span += stride * (extent - 1);
            clear
        });
        if nested {
            return false;
        }
        if self.count as u64 > high.abs_diff(low) + 1 {
            return true; // more elements than places
        }
        let mut offsets = Vec::with_capacity(self.count);
        self.for_each_offset(|offset| offsets.push(offset));
        offsets.sort_unstable();
        offsets.windows(2).any(|pair| pair[0] == pair[1])
    }

    /// Refuses to write through a layout in which elements share memory.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.overlaps_itself() {
            let strides = &self.strides[..self.ndim];
            let message = format!("elements of a writable view overlap: shape {:?}, strides {strides:?}", self.shape());
            return Err(Error::invalid_argument(message));
        }
        Ok(())
    }

    /// Whether `self` at address `a` and `other` at `b` are the very same elements in the same order.
    fn is_same(&self, a: usize, other: &Self, b: usize) -> bool {
        let strides_agree =
            (0..self.ndim).all(|axis| self.shape[axis] <= 1 || self.strides[axis] == other.strides[axis]);
        a == b && self.dtype == other.dtype && self.shape() == other.shape() && strides_agree
    }

    fn addresses(&self, base: usize) -> Vec<usize> {
        let mut addresses = Vec::with_capacity(self.count);
        self.for_each_offset(|offset| {
            addresses.push(base.wrapping_add_signed(offset as isize * self.dtype.size() as isize))
        });
        addresses
    }

    /// Whether a step may read `self` at `a` and write `other` at `b`: `true` for the very same memory, `false` for
    /// memory apart, an error for anything between. Both have the same dtype and a valid address range.
    pub(crate) fn same_memory(&self, a: usize, other: &Self, b: usize) -> Result<bool> {
        if self.count == 0 || self.is_same(a, other, b) {
            return Ok(true);
        }
        let range = |layout: &Self, base: usize| {
            layout.reach().map(|(low, high)| {
                let size = layout.dtype.size() as isize;
                (
                    base.wrapping_add_signed(low as isize * size),
                    base.wrapping_add_signed(high as isize * size) + size as usize,
                )
            })
        };
        let (Some((a_low, a_high)), Some((b_low, b_high))) = (range(self, a), range(other, b)) else {
            return Ok(false);
        };
        if a_high <= b_low || b_high <= a_low {
            return Ok(false);
        }
        let mut read = self.addresses(a);
        read.sort_unstable();
        if other.addresses(b).iter().any(|address| read.binary_search(address).is_ok()) {
            let message = "the output overlaps the latents without being the same memory";
            return Err(Error::new(Status::InvalidArgument, message));
        }
        Ok(false)
    }
}
