//! Operands as the innermost loops read them.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::super::simd::Vectors;
use super::super::tile::ROWS;
use super::Matrix;

/// Some columns of b in some of its rows, `[k, width]`, with zeros in columns that there are not.
#[derive(Clone)]
pub(super) struct Panel {
    pub(super) first: usize,
    pub(super) width: usize,
    pub(super) k: Range<usize>,
}

impl Panel {
    /// Its columns, up to those that there are.
    pub(super) fn columns(&self, end: usize) -> Range<usize> {
        self.first..end.min(self.first + self.width)
    }

    /// Where it lies among all panels of a matrix: `[block, panel, k, column]`, all blocks but the last as deep as the first.
    pub(super) fn at(&self, padded_columns: usize) -> usize {
        self.k.start * padded_columns + self.first * self.k.len()
    }
}

/// Writes a panel, for which there must be room.
pub(super) struct PackPanel<'a> {
    pub(super) b: Matrix<'a>,
    pub(super) panel: Panel,
    pub(super) out: *mut f32,
}

impl WithSimd for PackPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // SAFETY: there is room.
        unsafe { pack_panel(simd, self.b, self.panel, self.out) }
    }
}

/// # Safety
/// There is room for the panel, which nobody else uses.
#[inline(always)]
pub(super) unsafe fn pack_panel<S: Simd>(simd: S, b: Matrix, panel: Panel, out: *mut f32) {
    let Panel { first, width, k } = panel;
    let used = width.min(b.columns - first);
    // SAFETY: the caller's; the columns and rows are b's.
    unsafe {
        if used < width {
            out.write_bytes(0, width * k.len());
        }
        let source = b.at(k.start, first);
        if !b.is_row_major() {
            transpose((source, b.column_stride), (used, k.len()), (out, width));
        } else if used == width {
            for row in 0..k.len() {
                for lane in (0..width).step_by(S::F32_LANES) {
                    simd.store(out.add(row * width + lane), simd.load(source.add(row * b.row_stride + lane)));
                }
            }
        } else {
            for row in 0..k.len() {
                source.add(row * b.row_stride).copy_to_nonoverlapping(out.add(row * width), used);
            }
        }
    }
}

/// Some rows of a, of which the values of a column lie next to each other, in panels `[k, ROWS]`, with zeros in rows that there are
/// not.
///
/// # Safety
/// There is room for the panels, which nobody else uses.
#[inline(always)]
pub(super) unsafe fn pack_rows(a: Matrix, rows: Range<usize>, k: Range<usize>, out: *mut f32) {
    let whole = rows.len() / ROWS;
    let rest = rows.len() % ROWS;
    // SAFETY: the caller's; the rows and columns are a's.
    unsafe {
        if rest > 0 {
            out.add(whole * k.len() * ROWS).write_bytes(0, k.len() * ROWS);
        }
        for value in 0..k.len() {
            let source = a.at(rows.start, k.start + value);
            for panel in 0..whole {
                let out = out.add((panel * k.len() + value) * ROWS);
                source.add(panel * ROWS).copy_to_nonoverlapping(out, ROWS);
            }
            source.add(whole * ROWS).copy_to_nonoverlapping(out.add((whole * k.len() + value) * ROWS), rest);
        }
    }
}

/// `rows x columns`, in rows as far apart as is said, to the transpose, in rows likewise.
///
/// # Safety
/// All lies in memory, and nobody else uses what is written.
#[inline(always)]
pub(super) unsafe fn transpose(
    (source, source_stride): (*const f32, usize),
    (rows, columns): (usize, usize),
    (out, stride): (*mut f32, usize),
) {
    let (whole_rows, whole_columns) = (rows - rows % SIDE, columns - columns % SIDE);
    // SAFETY: the caller's.
    unsafe {
        for row in (0..whole_rows).step_by(SIDE) {
            for column in (0..whole_columns).step_by(SIDE) {
                let source = source.add(row * source_stride + column);
                transpose_square(source, source_stride, out.add(column * stride + row), stride);
            }
        }
        for row in 0..rows {
            let done = if row < whole_rows { whole_columns } else { 0 };
            for column in done..columns {
                out.add(column * stride + row).write(*source.add(row * source_stride + column));
            }
        }
    }
}

/// Side of what is transposed in registers.
const SIDE: usize = 4;

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn transpose_square(source: *const f32, source_stride: usize, out: *mut f32, stride: usize) {
    use std::arch::x86_64::{
        _mm_loadu_ps, _mm_movehl_ps, _mm_movelh_ps, _mm_storeu_ps, _mm_unpackhi_ps, _mm_unpacklo_ps,
    };
    // SAFETY: the caller's; every such processor has these instructions.
    unsafe {
        let row = |i: usize| _mm_loadu_ps(source.add(i * source_stride));
        let (a, b, c, d) = (row(0), row(1), row(2), row(3));
        let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
        let (ab_high, cd_high) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
        _mm_storeu_ps(out, _mm_movelh_ps(ab, cd));
        _mm_storeu_ps(out.add(stride), _mm_movehl_ps(cd, ab));
        _mm_storeu_ps(out.add(2 * stride), _mm_movelh_ps(ab_high, cd_high));
        _mm_storeu_ps(out.add(3 * stride), _mm_movehl_ps(cd_high, ab_high));
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
unsafe fn transpose_square(source: *const f32, source_stride: usize, out: *mut f32, stride: usize) {
    for row in 0..SIDE {
        for column in 0..SIDE {
            // SAFETY: the caller's.
            unsafe { out.add(column * stride + row).write(*source.add(row * source_stride + column)) };
        }
    }
}
