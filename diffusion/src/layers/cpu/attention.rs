use candle_core::Tensor;
use rayon::prelude::*;

use super::product::{Before, Matrix, product};
use super::softmax::{softmax_row, softmax_row_vjp};
use super::{Values, tensor};
use crate::Result;

/// Scores that a task holds at a time: what stays in a core's second-level cache beside keys and values.
const BLOCK: usize = 1 << 16;
/// Query rows that a task takes, where there are as many: fewer, and the keys are read more often than it pays.
const LEAST_ROWS: usize = 16;

/// `softmax(q k^T / sqrt(width)) v` for `[n, queries, width]` and twice `[n, keys, width]`, a block of query rows at a time, so
/// that no score leaves the cache. `None` where the tensors are not contiguous f32 in main memory.
pub(in crate::layers) fn attend(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Option<Tensor>> {
    let Some(sizes) = Sizes::of(q, k, v) else { return Ok(None) };
    let (Some(qs), Some(ks), Some(vs)) = (Values::of(q), Values::of(k), Values::of(v)) else { return Ok(None) };
    let mut y = vec![0f32; qs.len()];
    let (inputs, rows) = (Inputs { q: &qs, k: &ks, v: &vs, sizes }, sizes.rows_at_once());
    let blocks = y.par_chunks_mut(sizes.queries * sizes.width).enumerate().flat_map(|(item, y)| {
        let blocks = y.par_chunks_mut(rows * sizes.width).enumerate();
        blocks.map(move |(block, y)| (item, block * rows, y))
    });
    blocks.for_each_init(Vec::new, |p, (item, first, y)| {
        let item = inputs.item(item);
        item.weights(item.rows(item.q, first, y.len()), p);
        product(y, Before::Replaced, 1., Matrix::new(p, sizes.keys), item.matrix(item.v));
    });
    tensor(y, q.shape()).map(Some)
}

/// Cotangents of q and, where they are asked for, of k and v.
pub(in crate::layers) type Cotangents = (Tensor, Option<(Tensor, Tensor)>);

/// The cotangents of [`attend`]'s inputs from its result's. Scores are computed again.
pub(in crate::layers) fn attend_vjp(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    dy: &Tensor,
    with_keys: bool,
) -> Result<Option<Cotangents>> {
    let Some(sizes) = Sizes::of(q, k, v).filter(|_| dy.dims() == q.dims()) else { return Ok(None) };
    let (Some(qs), Some(ks), Some(vs)) = (Values::of(q), Values::of(k), Values::of(v)) else { return Ok(None) };
    let Some(dys) = Values::of(dy) else { return Ok(None) };
    let inputs = Inputs { q: &qs, k: &ks, v: &vs, sizes };
    let (rows, of_queries, of_keys) = (sizes.rows_at_once(), sizes.queries * sizes.width, sizes.keys * sizes.width);
    let mut dq = vec![0f32; qs.len()];
    let dys = &*dys;
    if !with_keys {
        let blocks = dq.par_chunks_mut(of_queries).zip(dys.par_chunks(of_queries)).enumerate();
        let blocks = blocks.flat_map(|(item, (dq, dy))| {
            let blocks = dq.par_chunks_mut(rows * sizes.width).zip(dy.par_chunks(rows * sizes.width)).enumerate();
            blocks.map(move |(block, (dq, dy))| (item, block * rows, dq, dy))
        });
        blocks.for_each_init(Scratch::default, |scratch, (item, first, dq, dy)| {
            inputs.item(item).vjp_rows(first, dy, dq, None, scratch);
        });
        return Ok(Some((tensor(dq, q.shape())?, None)));
    }
    // Every query adds to the cotangents of all keys: an item is one task.
    let (mut dk, mut dv) = (vec![0f32; ks.len()], vec![0f32; vs.len()]);
    let items = dq.par_chunks_mut(of_queries).zip(dys.par_chunks(of_queries));
    let items = items.zip(dk.par_chunks_mut(of_keys).zip(dv.par_chunks_mut(of_keys))).enumerate();
    items.for_each_init(Scratch::default, |scratch, (item, ((dq, dy), (dk, dv)))| {
        let blocks = dq.chunks_mut(rows * sizes.width).zip(dy.chunks(rows * sizes.width)).enumerate();
        for (block, (dq, dy)) in blocks {
            inputs.item(item).vjp_rows(block * rows, dy, dq, Some((&mut *dk, &mut *dv)), scratch);
        }
    });
    Ok(Some((tensor(dq, q.shape())?, Some((tensor(dk, k.shape())?, tensor(dv, v.shape())?)))))
}

#[derive(Clone, Copy)]
struct Sizes {
    queries: usize,
    keys: usize,
    width: usize,
}

impl Sizes {
    /// `None` where the shapes do not fit each other or hold nothing: the formulas say what is wrong.
    fn of(q: &Tensor, k: &Tensor, v: &Tensor) -> Option<Self> {
        let ((n, queries, width), (of_keys, keys, key_width)) = (q.dims3().ok()?, k.dims3().ok()?);
        let fits = n == of_keys && width == key_width && v.dims() == k.dims() && n * queries * keys * width > 0;
        fits.then_some(Self { queries, keys, width })
    }

    fn rows_at_once(self) -> usize {
        (BLOCK / self.keys).max(LEAST_ROWS).min(self.queries)
    }
}

#[derive(Clone, Copy)]
struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    sizes: Sizes,
}

/// Attention weights and the cotangents of scores, of a block of rows.
#[derive(Default)]
struct Scratch {
    p: Vec<f32>,
    ds: Vec<f32>,
}

impl<'a> Inputs<'a> {
    /// The part of one item and head.
    fn item(self, index: usize) -> Self {
        let Sizes { queries, keys, width } = self.sizes;
        let part = |values: &'a [f32], rows: usize| &values[index * rows * width..][..rows * width];
        Self { q: part(self.q, queries), k: part(self.k, keys), v: part(self.v, keys), sizes: self.sizes }
    }

    fn matrix<'b>(&self, values: &'b [f32]) -> Matrix<'b> {
        Matrix::new(values, self.sizes.width)
    }

    /// As many of these rows from the `first` on as `len` values make.
    fn rows<'b>(&self, values: &'b [f32], first: usize, len: usize) -> Matrix<'b> {
        self.matrix(&values[first * self.sizes.width..][..len])
    }

    fn scale(&self) -> f32 {
        (1. / (self.sizes.width as f64).sqrt()) as f32
    }

    /// Attention weights of a block of queries.
    fn weights(&self, queries: Matrix, p: &mut Vec<f32>) {
        p.resize(queries.rows() * self.sizes.keys, 0.);
        product(p, Before::Replaced, self.scale(), queries, self.matrix(self.k).t());
        p.chunks_mut(self.sizes.keys).for_each(softmax_row);
    }

    /// With `P = softmax(S)` and `dP = dy v^T`: `dS = P (dP - rowsum(P dP))`, `dq = dS k`, `dk = dS^T q`, `dv = P^T dy`. The
    /// last two are added to.
    fn vjp_rows(
        &self,
        first: usize,
        dy: &[f32],
        dq: &mut [f32],
        keys_values: Option<(&mut [f32], &mut [f32])>,
        Scratch { p, ds }: &mut Scratch,
    ) {
        let (keys, scale) = (self.sizes.keys, self.scale());
        let (queries, dys) = (self.rows(self.q, first, dy.len()), self.matrix(dy));
        self.weights(queries, p);
        ds.resize(p.len(), 0.);
        product(ds, Before::Replaced, 1., dys, self.matrix(self.v).t());
        ds.chunks_mut(keys).zip(p.chunks(keys)).for_each(|(ds, p)| softmax_row_vjp(p, ds));
        let (p, ds) = (Matrix::new(p, keys), Matrix::new(ds, keys));
        product(dq, Before::Replaced, scale, ds, self.matrix(self.k));
        if let Some((dk, dv)) = keys_values {
            product(dk, Before::AddedTo, scale, ds.t(), queries);
            product(dv, Before::AddedTo, 1., p.t(), dys);
        }
    }
}
