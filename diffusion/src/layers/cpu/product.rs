use gemm::{Parallelism, gemm};

use super::memory::{Shared, written};

/// A matrix in memory: part of one that is row-major, or the transpose of such a part.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Whole rows of `columns` values.
    pub(super) fn new(values: &'a [f32], columns: usize) -> Self {
        assert!(columns > 0 && values.len().is_multiple_of(columns), "rows of {columns} in {} values", values.len());
        let rows = values.len() / columns;
        Self::part(values, rows, columns, columns)
    }

    /// `rows` of `columns` values each, `stride` apart, from the first value on.
    pub(super) fn part(values: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        let last = rows.saturating_sub(1).checked_mul(stride).and_then(|last| last.checked_add(columns));
        let fits = rows == 0 || last.is_some_and(|reach| reach <= values.len());
        assert!(columns <= stride && fits, "{rows} rows of {columns}, {stride} apart");
        Self { values, rows, columns, row_stride: stride, column_stride: 1 }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// Of a matrix that is not a transpose.
    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        assert!(self.column_stride == 1 && row < self.rows, "row {row} of {}", self.rows);
        &self.values[row * self.row_stride..][..self.columns]
    }

    pub(super) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// What becomes of the values that a product is written over.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Before {
    Replaced,
    AddedTo,
}

/// `y = scale a b`, or that added to y, in whole rows; on this thread alone.
pub(super) fn product(y: &mut [f32], before: Before, scale: f32, a: Matrix, b: Matrix) {
    assert_eq!(y.len(), a.rows * b.columns, "values of a product");
    // SAFETY: y has as many values as the product, whose rows follow each other.
    unsafe { multiply(y.as_mut_ptr(), b.columns, before, scale, a, b, Parallelism::None) };
}

/// `a b`, in whole rows, added to `y` where it is given; by all threads.
pub(super) fn parallel_product(y: Option<Vec<f32>>, a: Matrix, b: Matrix) -> Vec<f32> {
    let multiply = |y: &Shared, before| {
        // SAFETY: y has room for as many values as the product, whose rows follow each other.
        unsafe { multiply(y.at(0), b.columns, before, 1., a, b, Parallelism::Rayon(0)) }
    };
    // SAFETY: the product is written over all of it, or added to it.
    unsafe { onto(y, a.rows * b.columns, multiply) }
}

/// `count` values as `write` leaves them, which adds to those of `y` where it is given.
///
/// # Safety
/// `write` writes every value, and reads none where it is to replace them.
pub(super) unsafe fn onto(y: Option<Vec<f32>>, count: usize, write: impl FnOnce(&Shared, Before)) -> Vec<f32> {
    match y {
        Some(mut y) => {
            assert_eq!(y.len(), count, "values of a product");
            write(&Shared::of(&mut y), Before::AddedTo);
            y
        }
        // SAFETY: the caller's.
        None => unsafe { written(count, |y| write(y, Before::Replaced)) },
    }
}

/// # Safety
/// Nothing else reads or writes the rows of y, which are `y_stride` apart, until it is done.
unsafe fn multiply(
    y: *mut f32,
    y_stride: usize,
    before: Before,
    scale: f32,
    a: Matrix,
    b: Matrix,
    parallelism: Parallelism,
) {
    assert_eq!(a.columns, b.rows, "the inner sizes of a product");
    let stride = |n: usize| n as isize;
    // SAFETY: a matrix's strides stay within its values, as was asserted when it was made; y is the caller's to answer for.
    unsafe {
        gemm(
            a.rows,
            b.columns,
            a.columns,
            y,
            1,
            stride(y_stride),
            before == Before::AddedTo,
            a.values.as_ptr(),
            stride(a.column_stride),
            stride(a.row_stride),
            b.values.as_ptr(),
            stride(b.column_stride),
            stride(b.row_stride),
            1.,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}
