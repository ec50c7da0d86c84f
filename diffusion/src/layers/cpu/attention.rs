use candle_core::Tensor;
use rayon::prelude::*;

use super::product::{Before, Matrix, Shared, product, product_into, written};
use super::softmax::{softmax_row, softmax_row_vjp};
use super::{Values, tensor};
use crate::Result;

/// Scores that a task holds at a time: what stays in a core's second-level cache beside keys and values.
const BLOCK: usize = 1 << 16;
/// Query rows that a task takes, where there are as many: fewer, and the keys are read more often than it pays.
const LEAST_ROWS: usize = 16;

/// `softmax(q k^T / sqrt(width)) v` of each head, for `[B, queries, heads * width]` and twice `[B, keys, heads * width]`: a block
/// of query rows at a time, so that no score leaves the cache. Heads are read and written where they lie, between those of the
/// others. `None` where the tensors are not contiguous f32 in main memory.
pub(in crate::layers) fn attend((q, k, v): (&Tensor, &Tensor, &Tensor), heads: usize) -> Result<Option<Tensor>> {
    let Some(sizes) = Sizes::of((q, k, v), heads) else { return Ok(None) };
    let (Some(qs), Some(ks), Some(vs)) = (Values::of(q), Values::of(k), Values::of(v)) else { return Ok(None) };
    let inputs = Inputs { q: &qs, k: &ks, v: &vs, sizes };
    let attend = |y: &Shared| {
        sizes.blocks().for_each_init(Vec::new, |p, block| {
            inputs.weights(block, p);
            let (p, values) = (Matrix::new(p, sizes.keys), inputs.keys(inputs.v, block));
            // SAFETY: y has q's shape; a block's rows and a head's columns are no other task's.
            unsafe { product_into(y.at(sizes.at(block)), sizes.channels(), Before::Replaced, 1., p, values) };
        })
    };
    // SAFETY: the blocks of all heads are the whole of it.
    let y = unsafe { written(qs.len(), attend) };
    tensor(y, q.shape()).map(Some)
}

/// Cotangents of q and, where they are asked for, of k and v.
pub(in crate::layers) type Cotangents = (Tensor, Option<(Tensor, Tensor)>);

/// The cotangents of [`attend`]'s inputs from its result's. Scores are computed again.
///
/// With `P = softmax(S)` and `dP = dy v^T`: `dS = P (dP - rowsum(P dP))`, `dq = dS k`, `dk = dS^T q`, `dv = P^T dy`.
pub(in crate::layers) fn attend_vjp(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    dy: &Tensor,
    heads: usize,
    with_keys: bool,
) -> Result<Option<Cotangents>> {
    let Some(sizes) = Sizes::of((q, k, v), heads).filter(|_| dy.dims() == q.dims()) else { return Ok(None) };
    let (Some(qs), Some(ks), Some(vs)) = (Values::of(q), Values::of(k), Values::of(v)) else { return Ok(None) };
    let Some(dys) = Values::of(dy) else { return Ok(None) };
    let (inputs, dys) = (Inputs { q: &qs, k: &ks, v: &vs, sizes }, &*dys);
    let mut dq = vec![0f32; qs.len()];
    let into_dq = Shared::of(&mut dq);
    let vjp_queries = |block: Block, Scratch { p, ds }: &mut Scratch| {
        inputs.weights(block, p);
        ds.resize(p.len(), 0.);
        product(ds, Before::Replaced, 1., inputs.queries(dys, block), inputs.keys(inputs.v, block).t());
        ds.chunks_mut(sizes.keys).zip(p.chunks(sizes.keys)).for_each(|(ds, p)| softmax_row_vjp(p, ds));
        let (ds, keys) = (Matrix::new(ds, sizes.keys), inputs.keys(inputs.k, block));
        // SAFETY: dq has q's shape; a block's rows and a head's columns are no other task's.
        unsafe {
            let dq = into_dq.at(sizes.at(block));
            product_into(dq, sizes.channels(), Before::Replaced, sizes.scale(), ds, keys);
        }
    };
    if !with_keys {
        sizes.blocks().for_each_init(Scratch::default, |scratch, block| vjp_queries(block, scratch));
        return Ok(Some((tensor(dq, q.shape())?, None)));
    }
    let (mut dk, mut dv) = (vec![0f32; ks.len()], vec![0f32; vs.len()]);
    let (into_dk, into_dv) = (Shared::of(&mut dk), Shared::of(&mut dv));
    // Every query adds to the cotangents of all keys: a head is one task.
    sizes.heads().for_each_init(Scratch::default, |scratch, head| {
        for block in sizes.blocks_of(head) {
            vjp_queries(block, scratch);
            let at = sizes.at_keys(block);
            let (p, ds) = (Matrix::new(&scratch.p, sizes.keys), Matrix::new(&scratch.ds, sizes.keys));
            let (queries, dys) = (inputs.queries(inputs.q, block), inputs.queries(dys, block));
            // SAFETY: dk and dv have the keys' shape; a head's columns of an item are no other task's.
            unsafe {
                let added = Before::AddedTo;
                product_into(into_dk.at(at), sizes.channels(), added, sizes.scale(), ds.t(), queries);
                product_into(into_dv.at(at), sizes.channels(), added, 1., p.t(), dys);
            }
        }
    });
    Ok(Some((tensor(dq, q.shape())?, Some((tensor(dk, k.shape())?, tensor(dv, v.shape())?)))))
}

/// Attention weights and the cotangents of scores, of a block of rows.
#[derive(Default)]
struct Scratch {
    p: Vec<f32>,
    ds: Vec<f32>,
}

/// Some query rows of one head of one item.
#[derive(Clone, Copy)]
struct Block {
    item: usize,
    head: usize,
    first: usize,
    rows: usize,
}

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    heads: usize,
    queries: usize,
    keys: usize,
    width: usize,
}

impl Sizes {
    /// `None` where the shapes do not fit each other or hold nothing: the formulas say what is wrong.
    fn of((q, k, v): (&Tensor, &Tensor, &Tensor), heads: usize) -> Option<Self> {
        let ((batch, queries, channels), (of_keys, keys, key_channels)) = (q.dims3().ok()?, k.dims3().ok()?);
        let fits = batch == of_keys && channels == key_channels && v.dims() == k.dims();
        let fits = fits && heads > 0 && channels % heads == 0 && batch * queries * keys * channels > 0;
        fits.then_some(Self { batch, heads, queries, keys, width: channels / heads })
    }

    fn channels(self) -> usize {
        self.heads * self.width
    }

    fn scale(self) -> f32 {
        (1. / (self.width as f64).sqrt()) as f32
    }

    fn rows_at_once(self) -> usize {
        (BLOCK / self.keys).max(LEAST_ROWS).min(self.queries)
    }

    /// The `index`-th block of a head.
    fn block(self, (item, head): (usize, usize), index: usize) -> Block {
        let first = index * self.rows_at_once();
        Block { item, head, first, rows: self.rows_at_once().min(self.queries - first) }
    }

    fn blocks_of(self, head: (usize, usize)) -> impl Iterator<Item = Block> {
        (0..self.queries.div_ceil(self.rows_at_once())).map(move |index| self.block(head, index))
    }

    /// Every head of every item.
    fn heads(self) -> impl IndexedParallelIterator<Item = (usize, usize)> {
        (0..self.batch * self.heads).into_par_iter().map(move |task| (task / self.heads, task % self.heads))
    }

    /// Every block of those.
    fn blocks(self) -> impl IndexedParallelIterator<Item = Block> {
        let each = self.queries.div_ceil(self.rows_at_once());
        let tasks = (0..self.batch * self.heads * each).into_par_iter();
        tasks.map(move |task| self.block((task / each / self.heads, task / each % self.heads), task % each))
    }

    /// Where a block begins among the queries, and where its head's keys do.
    fn at(self, block: Block) -> usize {
        (block.item * self.queries + block.first) * self.channels() + block.head * self.width
    }

    fn at_keys(self, block: Block) -> usize {
        block.item * self.keys * self.channels() + block.head * self.width
    }
}

#[derive(Clone, Copy)]
struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    sizes: Sizes,
}

impl Inputs<'_> {
    /// A block's rows of something in the queries' shape.
    fn queries<'a>(&self, values: &'a [f32], block: Block) -> Matrix<'a> {
        Matrix::part(&values[self.sizes.at(block)..], block.rows, self.sizes.width, self.sizes.channels())
    }

    /// All rows of a block's head of something in the keys' shape.
    fn keys<'a>(&self, values: &'a [f32], block: Block) -> Matrix<'a> {
        Matrix::part(&values[self.sizes.at_keys(block)..], self.sizes.keys, self.sizes.width, self.sizes.channels())
    }

    /// Attention weights of a block.
    fn weights(&self, block: Block, p: &mut Vec<f32>) {
        p.resize(block.rows * self.sizes.keys, 0.);
        let keys = self.keys(self.k, block).t();
        product(p, Before::Replaced, self.sizes.scale(), self.queries(self.q, block), keys);
        p.chunks_mut(self.sizes.keys).for_each(softmax_row);
    }
}
