use candle_core::Tensor;
use rayon::prelude::*;

use super::memory::{Shared, written};
use super::product::{Before, Matrix, product, product_into};
use super::softmax::{softmax_row, softmax_row_vjp};
use super::{Values, tensor};
use crate::{Error, Result};

/// Scores that a task holds at a time: what stays in a core's second-level cache beside keys and values.
const BLOCK: usize = 1 << 16;
/// Query rows that a task takes, where there are as many: fewer, and the keys are read more often than it pays.
const LEAST_ROWS: usize = 16;

/// [`attend_heads`] of tensors. `None` where they are not contiguous f32 in main memory, and where their shapes do not fit each
/// other or hold nothing: the formulas say what is wrong.
pub(in crate::layers) fn attend((q, k, v): (&Tensor, &Tensor, &Tensor), heads: usize) -> Result<Option<Tensor>> {
    let Some(sizes) = AttentionSizes::of((q, k, v), heads) else { return Ok(None) };
    let (Some(qs), Some(ks), Some(vs)) = (Values::of(q), Values::of(k), Values::of(v)) else { return Ok(None) };
    tensor(attend_heads((&qs, &ks, &vs), sizes), q.shape()).map(Some)
}

/// What is wanted of the backward pass of attention; each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wanted {
    /// The cotangents of q.
    Queries,
    /// Those of k and v.
    Keys,
    /// Attention's result once more: the weights are at hand again, so it costs one product.
    Attended,
}

/// What the backward pass of attention gives.
#[derive(Clone, Debug)]
pub struct Cotangents<T> {
    /// Of q.
    pub q: T,
    /// Of k and v.
    pub kv: Option<(T, T)>,
    /// Attention's result.
    pub attended: Option<T>,
}

/// [`attend_heads_vjp`] of tensors, under the same conditions.
pub(in crate::layers) fn attend_vjp(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    dy: &Tensor,
    heads: usize,
    wanted: Wanted,
) -> Result<Option<Cotangents<Tensor>>> {
    let sizes = AttentionSizes::of((q, k, v), heads).filter(|_| dy.dims() == q.dims());
    let (Some(sizes), Some(dys)) = (sizes, Values::of(dy)) else { return Ok(None) };
    let (Some(qs), Some(ks), Some(vs)) = (Values::of(q), Values::of(k), Values::of(v)) else { return Ok(None) };
    let found = attend_heads_vjp((&qs, &ks, &vs), &dys, sizes, wanted);
    let of_keys = |(dk, dv)| Ok::<_, Error>((tensor(dk, k.shape())?, tensor(dv, v.shape())?));
    Ok(Some(Cotangents {
        q: tensor(found.q, q.shape())?,
        kv: found.kv.map(of_keys).transpose()?,
        attended: found.attended.map(|y| tensor(y, q.shape())).transpose()?,
    }))
}

/// `softmax(q k^T / sqrt(width)) v` of each head, for `[batch, queries, heads * width]` and twice `[batch, keys, heads * width]`:
/// a block of query rows at a time, so that no score leaves the cache. Heads are read and written where they lie, between those
/// of the others. Panics where the lengths do not fit the sizes.
pub fn attend_heads((q, k, v): (&[f32], &[f32], &[f32]), sizes: AttentionSizes) -> Vec<f32> {
    let inputs = Inputs::new((q, k, v), sizes);
    let attend = |y: &Shared| {
        sizes.blocks().for_each_init(Vec::new, |p, block| {
            inputs.weights(block, p);
            let (p, values) = (Matrix::new(p, sizes.keys), inputs.keys(inputs.v, block));
            // SAFETY: y has q's shape; a block's rows and a head's columns are no other task's.
            unsafe { product_into(y.at(sizes.at(block)), sizes.channels(), Before::Replaced, 1., p, values) };
        })
    };
    // SAFETY: the blocks of all heads are the whole of it.
    unsafe { written(q.len(), attend) }
}

/// The cotangents of [`attend_heads`]' inputs from its result's, as far as they are wanted. Scores are computed again.
///
/// With `P = softmax(S)` and `dP = dy v^T`: `dS = P (dP - rowsum(P dP))`, `dq = dS k`, `dk = dS^T q`, `dv = P^T dy`.
pub fn attend_heads_vjp(
    (q, k, v): (&[f32], &[f32], &[f32]),
    dy: &[f32],
    sizes: AttentionSizes,
    wanted: Wanted,
) -> Cotangents<Vec<f32>> {
    let inputs = Inputs::new((q, k, v), sizes);
    assert_eq!(dy.len(), q.len(), "cotangents of attention");
    let vjp_queries = |into: &Shared, block: Block, Scratch { p, ds }: &mut Scratch| {
        inputs.weights(block, p);
        ds.resize(p.len(), 0.);
        product(ds, Before::Replaced, 1., inputs.queries(dy, block), inputs.keys(inputs.v, block).t());
        ds.chunks_mut(sizes.keys).zip(p.chunks(sizes.keys)).for_each(|(ds, p)| softmax_row_vjp(p, ds));
        let (ds, keys) = (Matrix::new(ds, sizes.keys), inputs.keys(inputs.k, block));
        // SAFETY: dq has q's shape; a block's rows and a head's columns are no other task's.
        unsafe {
            let dq = into.at(sizes.at(block));
            product_into(dq, sizes.channels(), Before::Replaced, sizes.scale(), ds, keys);
        }
    };
    if wanted == Wanted::Queries {
        let each = |dq: &Shared| {
            sizes.blocks().for_each_init(Scratch::default, |scratch, block| vjp_queries(dq, block, scratch));
        };
        // SAFETY: the blocks of all heads are the whole of it.
        return Cotangents { q: unsafe { written(q.len(), each) }, kv: None, attended: None };
    }
    let (mut dk, mut dv) = (vec![0f32; k.len()], vec![0f32; v.len()]);
    let (into_dk, into_dv) = (Shared::of(&mut dk), Shared::of(&mut dv));
    let mut attended = (wanted == Wanted::Attended).then(|| vec![0f32; q.len()]);
    let into_attended = attended.as_deref_mut().map(Shared::of);
    // Every query adds to the cotangents of all keys: a head is one task.
    let each = |dq: &Shared| {
        sizes.all_heads().for_each_init(Scratch::default, |scratch, head| {
            for block in sizes.blocks_of(head) {
                vjp_queries(dq, block, scratch);
                let at = sizes.at_keys(block);
                let (p, ds) = (Matrix::new(&scratch.p, sizes.keys), Matrix::new(&scratch.ds, sizes.keys));
                let (queries, dys) = (inputs.queries(inputs.q, block), inputs.queries(dy, block));
                // SAFETY: dk and dv have the keys' shape; a head's columns of an item are no other task's.
                unsafe {
                    let added = Before::AddedTo;
                    product_into(into_dk.at(at), sizes.channels(), added, sizes.scale(), ds.t(), queries);
                    product_into(into_dv.at(at), sizes.channels(), added, 1., p.t(), dys);
                }
                if let Some(y) = &into_attended {
                    let values = inputs.keys(inputs.v, block);
                    // SAFETY: as of dq.
                    unsafe { product_into(y.at(sizes.at(block)), sizes.channels(), Before::Replaced, 1., p, values) };
                }
            }
        });
    };
    // SAFETY: the blocks of all heads are the whole of it.
    Cotangents { q: unsafe { written(q.len(), each) }, kv: Some((dk, dv)), attended }
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

impl AttentionSizes {
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
    fn all_heads(self) -> impl IndexedParallelIterator<Item = (usize, usize)> {
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
    sizes: AttentionSizes,
}

impl<'i> Inputs<'i> {
    fn new((q, k, v): (&'i [f32], &'i [f32], &'i [f32]), sizes: AttentionSizes) -> Self {
        let AttentionSizes { batch, queries, keys, .. } = sizes;
        let values =
            |tokens: usize| [tokens, sizes.heads, sizes.width].iter().try_fold(batch, |n, m| n.checked_mul(*m));
        let (of_queries, of_keys) = (values(queries), values(keys));
        assert!(of_queries.is_some_and(|n| n > 0) && of_keys.is_some_and(|n| n > 0), "{sizes:?}");
        assert_eq!([Some(q.len()), Some(k.len()), Some(v.len())], [of_queries, of_keys, of_keys], "{sizes:?}");
        Self { q, k, v, sizes }
    }

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
