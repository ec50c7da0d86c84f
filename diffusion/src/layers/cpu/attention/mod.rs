//! Attention by blocks of queries and of keys (Dao et al. 2022, "FlashAttention"): scores stay in the cache, and what the backward
//! pass needs of the softmax is one number for each query.

mod block;
mod vjp;

use candle_core::Tensor;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::memory::{Shared, by_pieces, written};
use super::product::Matrix;
use super::simd::{lanes, widest};
use super::tile::ROWS;
use super::{Values, tensor};
use crate::{Error, Result};
use block::{Block, KEYS, QUERIES, columns_in_panels, padded, panels_of, rows_in_panels};
pub use vjp::attend_heads_vjp;

/// Sizes of an attention, none of them 0.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the names say it")]
pub struct AttentionSizes {
    pub batch: usize,
    pub heads: usize,
    pub queries: usize,
    pub keys: usize,
    /// Of a head.
    pub width: usize,
}

/// The cotangents of attention's inputs.
#[derive(Clone, Debug)]
pub struct Cotangents<T> {
    /// Of the queries.
    pub q: T,
    /// Of keys and values, where they are wanted.
    pub kv: Option<(T, T)>,
}

/// [`attend_heads`] of tensors, with the logarithms as `[batch, heads, queries]`. `None` where they are not contiguous f32 in main
/// memory, and where their shapes do not fit each other or hold nothing: the formulas say what is wrong.
pub(in crate::layers) fn attend(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    heads: usize,
) -> Result<Option<(Tensor, Tensor)>> {
    let Some(sizes) = AttentionSizes::of((q, k, v), heads) else { return Ok(None) };
    let (Some(qs), Some(ks), Some(vs)) = (Values::of(q), Values::of(k), Values::of(v)) else { return Ok(None) };
    let (y, log_sums) = attend_heads((&qs, &ks, &vs), sizes);
    Ok(Some((tensor(y, q.shape())?, tensor(log_sums, (sizes.batch, heads, sizes.queries))?)))
}

/// [`attend_heads_vjp`] of tensors, under the same conditions.
pub(in crate::layers) fn attend_vjp(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    (y, log_sums): (&Tensor, &Tensor),
    dy: &Tensor,
    heads: usize,
    of_keys: bool,
) -> Result<Option<Cotangents<Tensor>>> {
    let sizes = AttentionSizes::of((q, k, v), heads).filter(|_| dy.dims() == q.dims() && y.dims() == q.dims());
    let (Some(sizes), Some(dys), Some(ys)) = (sizes, Values::of(dy), Values::of(y)) else { return Ok(None) };
    let (Some(qs), Some(ks), Some(vs)) = (Values::of(q), Values::of(k), Values::of(v)) else { return Ok(None) };
    let Some(log_sums) = Values::of(log_sums) else { return Ok(None) };
    let found = attend_heads_vjp((&qs, &ks, &vs), (&ys, &log_sums), &dys, sizes, of_keys);
    let of_keys = |(dk, dv)| Ok::<_, Error>((tensor(dk, k.shape())?, tensor(dv, v.shape())?));
    Ok(Some(Cotangents { q: tensor(found.q, q.shape())?, kv: found.kv.map(of_keys).transpose()? }))
}

/// `softmax(q k^T / sqrt(width)) v` of each head, for `[batch, queries, heads * width]` and twice `[batch, keys, heads * width]`,
/// and `[batch, heads, queries]` logarithms of the sums of exponentials that the softmax divides by. Heads are read and
/// written where they lie, between those of the others. Panics where the lengths do not fit the sizes.
pub fn attend_heads((q, k, v): (&[f32], &[f32], &[f32]), sizes: AttentionSizes) -> (Vec<f32>, Vec<f32>) {
    sizes.check((q, k, v));
    let mut log_sums = vec![0f32; sizes.batch * sizes.heads * sizes.queries];
    let panels = Panels { keys: sizes.key_columns(k), values: sizes.key_rows(v) };
    let all_log_sums = Shared::of(&mut log_sums);
    let attend = |y: &Shared| {
        sizes.blocks().for_each_init(Scratch::default, |scratch, block| {
            widest(Attend { sizes, q, panels: &panels, block, y, log_sums: &all_log_sums, scratch });
        })
    };
    // SAFETY: the blocks of all heads are the whole of it.
    let y = unsafe { written(q.len(), attend) };
    (y, log_sums)
}

/// All heads' keys as columns, `[width, keys]`, in panels of rows of a tile, and their values as rows, `[keys, width]`, in panels
/// of vectors.
struct Panels {
    keys: Vec<f32>,
    values: Vec<f32>,
}

#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    scores: Vec<f32>,
    attended: Vec<f32>,
}

/// A block of queries of one head.
struct Attend<'a> {
    sizes: AttentionSizes,
    q: &'a [f32],
    panels: &'a Panels,
    block: Queries,
    y: &'a Shared,
    log_sums: &'a Shared,
    scratch: &'a mut Scratch,
}

impl WithSimd for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { sizes, q, panels, block, y, log_sums, scratch } = self;
        let lanes = S::F32_LANES;
        let width = padded(sizes.width, lanes);
        let Scratch { queries, scores, attended } = scratch;
        queries.resize(sizes.width * padded(block.count, lanes), 0.);
        columns_in_panels(sizes.rows(q, block), sizes.scale(), panels_of(block.count, lanes), queries);
        scores.resize(KEYS * QUERIES, 0.);
        attended.resize(QUERIES * width, 0.);
        let keys = &panels.keys[block.head * sizes.key_columns_len()..][..sizes.key_columns_len()];
        let (mut largest, mut sums) = ([0f32; QUERIES], [0f32; QUERIES]);
        for first in (0..sizes.keys).step_by(KEYS) {
            let block_of = Block { keys: KEYS.min(sizes.keys - first), queries: block.count };
            block_of.scores(simd, sizes.width, &keys[first * sizes.width..], queries, scores);
            let rescale = block_of.exponentials(simd, first == 0, scores, &mut largest, &mut sums);
            let values = &panels.values[block.head * sizes.key_rows_len(lanes)..][..sizes.key_rows_len(lanes)];
            for (row, factor) in attended.chunks_mut(width).zip(rescale).filter(|_| first > 0) {
                row.iter_mut().for_each(|y| *y *= factor);
            }
            let values = (values, sizes.keys, first);
            block_of.sum_over_keys(simd, scores, values, sizes.width, first > 0, attended);
        }
        for row in 0..block.count {
            // SAFETY: a block's queries are its own.
            unsafe {
                let log_sum = largest[row] + sums[row].ln();
                log_sums.at(block.head * sizes.queries + block.first + row).write(log_sum);
                let y = y.at(sizes.at(block) + row * sizes.channels());
                let inverse = 1. / sums[row];
                for (i, value) in attended[row * width..][..sizes.width].iter().enumerate() {
                    y.add(i).write(value * inverse);
                }
            }
        }
    }
}

/// Some queries of one head of one item.
#[derive(Clone, Copy)]
struct Queries {
    /// Counted over all items.
    head: usize,
    first: usize,
    count: usize,
}

impl AttentionSizes {
    /// `None` where shapes do not fit each other or hold nothing.
    pub(in crate::layers) fn of((q, k, v): (&Tensor, &Tensor, &Tensor), heads: usize) -> Option<Self> {
        let ((batch, queries, channels), (of_keys, keys, key_channels)) = (q.dims3().ok()?, k.dims3().ok()?);
        let fits = batch == of_keys && channels == key_channels && v.dims() == k.dims();
        let fits = fits && heads > 0 && channels % heads == 0 && batch * queries * keys * channels > 0;
        fits.then_some(Self { batch, heads, queries, keys, width: channels / heads })
    }

    fn check(self, (q, k, v): (&[f32], &[f32], &[f32])) {
        let values =
            |tokens: usize| [tokens, self.heads, self.width].iter().try_fold(self.batch, |n, m| n.checked_mul(*m));
        let (of_queries, of_keys) = (values(self.queries), values(self.keys));
        assert!(of_queries.is_some_and(|n| n > 0) && of_keys.is_some_and(|n| n > 0), "{self:?}");
        assert_eq!([Some(q.len()), Some(k.len()), Some(v.len())], [of_queries, of_keys, of_keys], "{self:?}");
    }

    fn channels(self) -> usize {
        self.heads * self.width
    }

    fn all_heads(self) -> usize {
        self.batch * self.heads
    }

    fn scale(self) -> f32 {
        (1. / (self.width as f64).sqrt()) as f32
    }

    fn blocks_of_head(self) -> usize {
        self.queries.div_ceil(QUERIES)
    }

    fn block(self, head: usize, index: usize) -> Queries {
        let first = index * QUERIES;
        Queries { head, first, count: QUERIES.min(self.queries - first) }
    }

    /// Every block of every head.
    fn blocks(self) -> impl IndexedParallelIterator<Item = Queries> {
        let each = self.blocks_of_head();
        (0..self.all_heads() * each).into_par_iter().map(move |task| self.block(task / each, task % each))
    }

    /// Where a block begins in `[batch, queries, heads * width]`.
    fn at(self, block: Queries) -> usize {
        let (item, head) = (block.head / self.heads, block.head % self.heads);
        (item * self.queries + block.first) * self.channels() + head * self.width
    }

    /// Where a head begins in `[batch, keys, heads * width]`.
    fn at_keys(self, head: usize) -> usize {
        head / self.heads * self.keys * self.channels() + head % self.heads * self.width
    }

    /// A block's rows of something in the queries' shape.
    fn rows(self, values: &[f32], block: Queries) -> Matrix<'_> {
        Matrix::part(&values[self.at(block)..], block.count, self.width, self.channels())
    }

    /// A head's rows of something in the keys' shape.
    fn rows_of_keys(self, values: &[f32], head: usize) -> Matrix<'_> {
        Matrix::part(&values[self.at_keys(head)..], self.keys, self.width, self.channels())
    }

    fn key_columns_len(self) -> usize {
        self.width * self.keys.next_multiple_of(ROWS)
    }

    fn key_rows_len(self, lanes: usize) -> usize {
        self.keys * padded(self.width, lanes)
    }

    /// Something in the keys' shape as [`Panels::keys`].
    fn key_columns(self, values: &[f32]) -> Vec<f32> {
        let each = self.key_columns_len();
        by_pieces(self.all_heads() * each, each, 1, |head, out| {
            let panels = (0..self.keys).step_by(ROWS).map(|first| (first, ROWS));
            columns_in_panels(self.rows_of_keys(values, head), 1., panels, out);
        })
    }

    /// Something in the keys' shape as [`Panels::values`].
    fn key_rows(self, values: &[f32]) -> Vec<f32> {
        let (lanes, each) = (lanes(), self.key_rows_len(lanes()));
        by_pieces(self.all_heads() * each, each, 1, |head, out| {
            rows_in_panels(self.rows_of_keys(values, head), 1., panels_of(self.width, lanes), out);
        })
    }
}
