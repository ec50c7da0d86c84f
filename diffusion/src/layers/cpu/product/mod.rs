//! Products of matrices, whose operands are laid out for the innermost loops in the cache, and no more of them than must be: values of
//! `a` next to each other along the inner size are read where they lie.
//!
//! A sum goes along the inner size by blocks that depend on nothing else, so a row's product is the same to the bit whatever rows are
//! computed with it.

mod pack;
mod task;

use rayon::prelude::*;

use super::memory::{Shared, written};
use super::simd::{lanes, widest};
use super::tile::{ROWS, panels};
use pack::{PackPanel, Panel};
use task::{Scratch, Task};

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

    /// Whether the values of a row lie next to each other; else those of a column do.
    fn is_row_major(&self) -> bool {
        self.column_stride == 1
    }

    /// Where a value lies that may be beyond the end.
    fn at(&self, row: usize, column: usize) -> *const f32 {
        self.values.as_ptr().wrapping_add(row * self.row_stride + column * self.column_stride)
    }
}

/// What becomes of the values that a product is written over.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Before {
    Replaced,
    AddedTo,
}

/// What is added to every row or to every column.
#[derive(Clone, Copy)]
enum Bias<'a> {
    /// A value for each column.
    ToRows(&'a [f32]),
    /// A value for each row.
    ToColumns(&'a [f32]),
}

/// `a b`, and what is to be added to it.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    a: Matrix<'a>,
    b: Matrix<'a>,
    bias: Option<Bias<'a>>,
    /// Of the result's shape.
    added: Option<Matrix<'a>>,
}

/// Values along the inner size that are multiplied at a time, at most: a panel of b, two vectors wide, stays in the first-level cache.
const DEPTH: usize = 192;
/// Rows of a task, at most, where b was laid out before.
const ROWS_OF_SHARED: usize = 8 * ROWS;
/// And where the task lays it out: enough for that to cost little.
const ROWS_OF_OWN: usize = 40 * ROWS;

impl<'a> Product<'a> {
    /// Panics where the inner sizes are not the same.
    pub(super) fn new(a: Matrix<'a>, b: Matrix<'a>) -> Self {
        assert_eq!(a.columns, b.rows, "the inner sizes of a product");
        Self { a, b, bias: None, added: None }
    }

    /// Adds a row to every row.
    pub(super) fn plus_row(self, row: Option<&'a [f32]>) -> Self {
        assert!(row.is_none_or(|row| row.len() == self.b.columns), "values of a bias");
        Self { bias: row.map(Bias::ToRows), ..self }
    }

    /// Adds a column to every column.
    pub(super) fn plus_column(self, column: Option<&'a [f32]>) -> Self {
        assert!(column.is_none_or(|column| column.len() == self.a.rows), "values of a bias");
        Self { bias: column.map(Bias::ToColumns), ..self }
    }

    /// Adds as many values as the product has, in whole rows.
    pub(super) fn plus(self, values: Option<&'a [f32]>) -> Self {
        assert!(values.is_none_or(|values| values.len() == self.len()), "values of a product");
        let matrix = |values| Matrix::part(values, self.a.rows, self.b.columns, self.b.columns);
        Self { added: values.map(matrix), ..self }
    }

    /// Values of the result.
    fn len(&self) -> usize {
        self.a.rows * self.b.columns
    }

    fn t(self) -> Self {
        let bias = self.bias.map(|bias| match bias {
            Bias::ToRows(values) => Bias::ToColumns(values),
            Bias::ToColumns(values) => Bias::ToRows(values),
        });
        Self { a: self.b.t(), b: self.a.t(), bias, added: self.added.map(Matrix::t) }
    }

    /// The result, in whole rows.
    pub(super) fn compute(self) -> Vec<f32> {
        // SAFETY: all of it is written.
        unsafe { written(self.len(), |y| self.write(y, 0)) }
    }

    /// Writes the result from `at` on.
    ///
    /// # Safety
    /// There is room for it, which nobody else uses.
    pub(super) unsafe fn write(self, y: &Shared, at: usize) {
        if self.len() == 0 {
            return;
        }
        let transposed = self.t().effort() + self.len() < self.effort();
        let product = if transposed { self.t() } else { self };
        let columns = product.b.columns;
        let at_least = 4 * rayon::current_num_threads();
        let most = if product.shares_b() { ROWS_OF_SHARED } else { ROWS_OF_OWN };
        let each = product.a.rows.div_ceil(product.a.rows.div_ceil(most)).next_multiple_of(ROWS);
        let groups = product.a.rows.div_ceil(each);
        let wide = 2 * lanes();
        let width = match product.shares_b() {
            true => columns,
            false => columns.div_ceil(at_least.div_ceil(groups)).next_multiple_of(wide),
        };
        let parts = columns.div_ceil(width);
        let panels = product.shares_b().then(|| product.panels());
        (0..groups * parts).into_par_iter().for_each_init(Scratch::default, |scratch, task| {
            let (row, column) = (task % groups * each, task / groups * width);
            widest(Task {
                product: &product,
                transposed,
                panels: panels.as_deref(),
                rows: row..product.a.rows.min(row + each),
                columns: column..columns.min(column + width),
                y: y.at(at),
                scratch,
            });
        });
    }

    /// Whether tasks take turns with the same panels of b: they are dear to make where b must be transposed for them.
    fn shares_b(&self) -> bool {
        !self.b.is_row_major()
    }

    /// How long it takes, about: the values that are multiplied by a tile's row, and those that are moved before.
    fn effort(&self) -> usize {
        let columns = self.b.columns.next_multiple_of(lanes());
        let products = self.a.rows.next_multiple_of(4) * columns / (2 * lanes());
        let of_a = if self.a.is_row_major() { 0 } else { self.a.rows };
        let of_b = if self.b.is_row_major() { columns } else { 4 * columns };
        self.a.columns * (products + (of_a + of_b) / 16)
    }

    /// Blocks of the inner size, at least one: how many, and of how many values but for the last.
    fn blocks(&self) -> (usize, usize) {
        let count = self.a.columns.div_ceil(DEPTH).max(1);
        (count, self.a.columns.div_ceil(count))
    }

    /// Columns of b in panels, which are as many as fill whole vectors.
    fn padded_columns(&self) -> usize {
        self.b.columns.next_multiple_of(lanes())
    }

    /// All panels of b: `[block, panel, value of the block, column]`.
    fn panels(&self) -> Vec<f32> {
        let (blocks, depth) = self.blocks();
        let all: Vec<_> = panels(self.b.columns, lanes()).collect();
        let padded = self.padded_columns();
        let pack = |out: &Shared| {
            (0..blocks * all.len()).into_par_iter().with_min_len(2).for_each(|index| {
                let ((first, width), k) = (all[index % all.len()], index / all.len() * depth);
                let panel = Panel { first, width, k: k..self.a.columns.min(k + depth) };
                let out = out.at(panel.at(padded));
                widest(PackPanel { b: self.b, panel, out });
            });
        };
        // SAFETY: the panels of a block follow each other, and fill it.
        unsafe { written(self.a.columns * padded, pack) }
    }
}
