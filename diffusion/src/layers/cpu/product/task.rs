use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::super::simd::prefetch;
use super::super::tile::{ROWS, Strides, Tile, VECTORS, panels};
use super::pack::{Panel, pack_panel, pack_rows, transpose};
use super::{Before, Bias, Product};

/// Rows of tiles are multiples of this.
const STEP: usize = 4;
/// Values in a row of a tile, at most.
const WIDEST: usize = VECTORS * 16;

/// What a task works in.
#[derive(Default)]
pub(super) struct Scratch {
    /// Panels of a, or its last rows.
    a: Vec<f32>,
    /// A panel of b.
    b: Vec<f32>,
    /// The sums, where they are to be transposed.
    sums: Vec<f32>,
}

/// Some rows of a product in some columns.
pub(super) struct Task<'a> {
    pub(super) product: &'a Product<'a>,
    /// Whether the result is wanted in whole columns.
    pub(super) transposed: bool,
    /// All panels of b, where tasks share them.
    pub(super) panels: Option<&'a [f32]>,
    /// As many as fill tiles, but for the last.
    pub(super) rows: Range<usize>,
    pub(super) columns: Range<usize>,
    /// The result, of which nobody else uses these rows and columns.
    pub(super) y: *mut f32,
    pub(super) scratch: &'a mut Scratch,
}

/// Rows of sums in memory.
#[derive(Clone, Copy)]
struct Sums {
    /// Of the task's first row and column.
    first: *mut f32,
    stride: usize,
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (blocks, depth) = self.product.blocks();
        let sums = self.sums(S::F32_LANES, depth);
        for block in 0..blocks {
            let k = block * depth..self.product.a.columns.min((block + 1) * depth);
            // SAFETY: a's rows and columns, and there is room.
            unsafe { self.take_rows(&k) };
            let all = self.columns.len().div_ceil(VECTORS * S::F32_LANES);
            for (index, (first, width)) in panels(self.columns.len(), S::F32_LANES).enumerate() {
                let panel = Panel { first: self.columns.start + first, width, k: k.clone() };
                let sums = Sums { first: sums.first.wrapping_add(first), ..sums };
                // SAFETY: the sums of these columns are this task's.
                unsafe {
                    if block == 0 {
                        self.start(panel.columns(self.columns.end), sums);
                    }
                    self.multiply(simd, panel.clone(), (index, all), sums, block > 0);
                    if self.transposed && block + 1 == blocks {
                        self.finish(panel.columns(self.columns.end), sums);
                    }
                }
            }
        }
    }
}

impl Task<'_> {
    /// Makes room in the scratch, and says where sums go.
    #[inline(always)]
    fn sums(&mut self, lanes: usize, depth: usize) -> Sums {
        let rows = self.rows.len().next_multiple_of(ROWS);
        self.scratch.a.resize((rows - self.first_taken()) * depth, 0.);
        if self.panels.is_none() {
            self.scratch.b.resize(VECTORS * lanes * depth, 0.);
        }
        let columns = self.product.b.columns;
        if !self.transposed {
            return Sums {
                first: self.y.wrapping_add(self.rows.start * columns + self.columns.start),
                stride: columns,
            };
        }
        let stride = self.columns.len().next_multiple_of(lanes);
        self.scratch.sums.resize(rows * stride, 0.);
        Sums { first: self.scratch.sums.as_mut_ptr(), stride }
    }

    /// The first row of a that tiles do not read where it lies. All rows are taken where a row's values are apart, and where a block
    /// is read for several panels: rows far apart get in each other's way in the cache. Else the last, where they do not fill a tile.
    #[inline(always)]
    fn first_taken(&self) -> usize {
        match self.product.a.is_row_major() && self.panels.is_some() {
            true => self.rows.len() / ROWS * ROWS,
            false => 0,
        }
    }

    /// Takes values of a to the scratch: panels of them where a row's values are apart, else rows.
    ///
    /// # Safety
    /// They are in the matrix, and there is room.
    #[inline(always)]
    unsafe fn take_rows(&mut self, k: &Range<usize>) {
        let (a, out) = (self.product.a, self.scratch.a.as_mut_ptr());
        // SAFETY: the caller's.
        unsafe {
            if !a.is_row_major() {
                pack_rows(a, self.rows.clone(), k.clone(), out);
            } else {
                let first = self.rows.start + self.first_taken();
                for row in first..self.rows.end {
                    a.at(row, k.start).copy_to_nonoverlapping(out.add((row - first) * k.len()), k.len());
                }
            }
        }
    }

    /// Writes what is to be added to some columns.
    ///
    /// # Safety
    /// The task's rows of them are within the sums, which nobody else uses.
    #[inline(always)]
    unsafe fn start(&self, columns: Range<usize>, sums: Sums) {
        let Product { bias, added, .. } = *self.product;
        // SAFETY: the caller's.
        unsafe {
            if let Some(added) = added.filter(|added| !added.is_row_major()) {
                let source = (added.at(self.rows.start, columns.start), added.column_stride);
                transpose(source, (columns.len(), self.rows.len()), (sums.first, sums.stride));
            }
            for row in self.rows.clone() {
                let out = sums.first.add((row - self.rows.start) * sums.stride);
                match added {
                    Some(added) if added.is_row_major() => {
                        added.at(row, columns.start).copy_to_nonoverlapping(out, columns.len())
                    }
                    Some(_) => {}
                    None if bias.is_some() => out.write_bytes(0, columns.len()),
                    None => return,
                }
                let out = std::slice::from_raw_parts_mut(out, columns.len());
                match bias {
                    None => {}
                    Some(Bias::ToRows(bias)) => {
                        out.iter_mut().zip(&bias[columns.clone()]).for_each(|(y, bias)| *y += bias);
                    }
                    Some(Bias::ToColumns(bias)) => out.iter_mut().for_each(|y| *y += bias[row]),
                }
            }
        }
    }

    /// Adds the products of a block in one panel's columns, or writes them where nothing is there.
    ///
    /// # Safety
    /// As of [`Self::start`].
    #[inline(always)]
    unsafe fn multiply<S: Simd>(
        &mut self,
        simd: S,
        panel: Panel,
        (index, all): (usize, usize),
        sums: Sums,
        started: bool,
    ) {
        let (product, width, depth) = (self.product, panel.width, panel.k.len());
        let (own_a, own_b) = (self.scratch.a.as_mut_ptr(), self.scratch.b.as_mut_ptr());
        let used = panel.columns(self.columns.end).len();
        let b = match self.panels {
            Some(panels) => panels[panel.at(product.padded_columns())..][..width * depth].as_ptr(),
            None => {
                // SAFETY: there is room for a panel as wide as they come.
                unsafe { pack_panel(simd, product.b, panel.clone(), own_b) };
                own_b.cast_const()
            }
        };
        let before = match started || product.bias.is_some() || product.added.is_some() {
            true => Before::AddedTo,
            false => Before::Replaced,
        };
        let first_taken = self.first_taken();
        let own_strides = if product.a.is_row_major() { Strides::of_rows(depth) } else { Strides::PANEL };
        for first in (0..self.rows.len()).step_by(ROWS) {
            let count = ROWS.min(self.rows.len() - first);
            let (a, a_strides) = match first.checked_sub(first_taken) {
                None => (product.a.at(self.rows.start + first, panel.k.start), Strides::of_rows(product.a.row_stride)),
                Some(taken) => (own_a.wrapping_add(taken * depth).cast_const(), own_strides),
            };
            self.prefetch(&panel, (index, all), first);
            let c = sums.first.wrapping_add(first * sums.stride);
            let tile = Tile { depth, a, a_strides, b, c, stride: sums.stride, before };
            let rows = count.next_multiple_of(STEP);
            // SAFETY: the caller's. Where whole tiles do not fit, they are written elsewhere.
            unsafe {
                if self.transposed || count == rows && used == width {
                    tile.multiply_rows(simd, rows, width);
                } else {
                    multiply_apart(simd, tile, rows, width, (count, used));
                }
            }
        }
    }

    /// Asks for a part of what is read next, while a tile from row `first` on is multiplied with the panel of this index: values of a
    /// in the next block or, after the last, in the rows that follow; and the next panel of b where it lies.
    #[inline(always)]
    fn prefetch(&self, panel: &Panel, (index, all): (usize, usize), first: usize) {
        /// Panels, while which are multiplied all of a block of a is fetched.
        const PARTS: usize = 4;
        let (Product { a, b, .. }, depth) = (*self.product, panel.k.len());
        let parts = all.min(PARTS);
        if a.is_row_major() && index < parts {
            let (skipped, k) = match panel.k.end < a.columns {
                true => (0, panel.k.end),
                false => (self.rows.len(), 0),
            };
            for row in ROWS * index / parts..ROWS * (index + 1) / parts {
                let row = self.rows.start + skipped + first + row;
                if row < a.rows {
                    prefetch(a.at(row, k), depth, 0, 1);
                }
            }
        }
        if self.panels.is_none() && b.is_row_major() {
            let (k, column) = match index + 1 < all {
                true => (panel.k.start, panel.first + panel.width),
                false => (panel.k.end, self.columns.start),
            };
            let tiles = self.rows.len().div_ceil(ROWS);
            let each = depth.div_ceil(tiles);
            for value in k + first / ROWS * each..b.rows.min(k + depth.min((first / ROWS + 1) * each)) {
                prefetch(b.at(value, column), panel.width, 0, 1);
            }
        }
    }

    /// Writes some columns as rows of the result.
    ///
    /// # Safety
    /// As of [`Self::start`], and all sums are there.
    #[inline(always)]
    unsafe fn finish(&self, columns: Range<usize>, sums: Sums) {
        let rows = self.product.a.rows;
        let y = self.y.wrapping_add(columns.start * rows + self.rows.start);
        // SAFETY: the caller's.
        unsafe { transpose((sums.first, sums.stride), (self.rows.len(), columns.len()), (y, rows)) };
    }
}

/// A tile of which `count` rows and `used` columns belong to c.
///
/// # Safety
/// As of [`Tile::multiply`] for those.
#[inline(always)]
unsafe fn multiply_apart<S: Simd>(simd: S, tile: Tile, rows: usize, width: usize, (count, used): (usize, usize)) {
    const { assert!(VECTORS * S::F32_LANES <= WIDEST) };
    let mut sums = [const { MaybeUninit::<f32>::uninit() }; ROWS * WIDEST];
    let apart = sums.as_mut_ptr().cast::<f32>();
    // SAFETY: the caller's, and a tile writes all of its rows.
    unsafe {
        Tile { c: apart, stride: width, before: Before::Replaced, ..tile }.multiply_rows(simd, rows, width);
        for row in 0..count {
            for column in 0..used {
                let (c, sum) = (tile.c.add(row * tile.stride + column), *apart.add(row * width + column));
                *c = if tile.before == Before::AddedTo { *c + sum } else { sum };
            }
        }
    }
}
