use gemm::{Parallelism, gemm};

/// A matrix in memory, row-major or the transpose of one that is.
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
        let rows = values.len() / columns;
        assert_eq!(values.len(), rows * columns, "rows of {columns}");
        Self { values, rows, columns, row_stride: columns, column_stride: 1 }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
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

/// `y = scale a b`, or that added to y, row-major; on this thread alone.
pub(super) fn product(y: &mut [f32], before: Before, scale: f32, a: Matrix, b: Matrix) {
    multiply(y, before, scale, a, b, Parallelism::None);
}

/// The same by all threads.
pub(super) fn parallel_product(y: &mut [f32], before: Before, scale: f32, a: Matrix, b: Matrix) {
    multiply(y, before, scale, a, b, Parallelism::Rayon(0));
}

fn multiply(y: &mut [f32], before: Before, scale: f32, a: Matrix, b: Matrix, parallelism: Parallelism) {
    assert!(a.columns == b.rows && y.len() == a.rows * b.columns, "{} values of a product", y.len());
    let stride = |n: usize| n as isize;
    // SAFETY: a matrix's strides stay within its values, by how it is made; y has as many values as the product.
    unsafe {
        gemm(
            a.rows,
            b.columns,
            a.columns,
            y.as_mut_ptr(),
            1,
            stride(b.columns),
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
