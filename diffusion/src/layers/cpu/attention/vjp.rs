use std::mem::MaybeUninit;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::memory::{Shared, written};
use super::super::simd::{lanes, widest};
use super::super::tile::ROWS;
use super::block::{Block, KEYS, QUERIES, columns_in_panels, padded, panels_of, rows_in_panels};
use super::{AttentionSizes, Cotangents, Queries};

/// Tasks that there should be at least, where keys' cotangents are wanted: a head's queries are cut into so many segments, whose
/// sums are added in the end. A constant, so that results do not depend on the number of threads.
const TASKS: usize = 16;

/// The cotangents of q, and of k and v if wanted, from what [`attend_heads`](super::attend_heads) gave and the cotangent of its
/// result `y`. Panics where lengths do not fit the sizes.
///
/// With `P = softmax(S)` and `dP = dy v^T`: `dS = P (dP - sum(P dP))`, where `sum(P dP) = sum(y dy)`, and `dq = dS k`,
/// `dk = dS^T q`, `dv = P^T dy`.
pub fn attend_heads_vjp(
    (q, k, v): (&[f32], &[f32], &[f32]),
    (y, log_sums): (&[f32], &[f32]),
    dy: &[f32],
    sizes: AttentionSizes,
    of_keys: bool,
) -> Cotangents<Vec<f32>> {
    sizes.check((q, k, v));
    assert_eq!((y.len(), dy.len()), (q.len(), q.len()), "a result of attention and its cotangent");
    assert_eq!(log_sums.len(), sizes.all_heads() * sizes.queries, "logarithms of sums");
    let blocks = sizes.blocks_of_head();
    let segments = if of_keys { TASKS.div_ceil(sizes.all_heads()).min(blocks) } else { blocks };
    let each = blocks.div_ceil(segments);
    let segments = blocks.div_ceil(each);
    let inputs = Inputs {
        sizes,
        q,
        dy,
        y,
        log_sums,
        key_columns: sizes.key_columns(k),
        key_rows: sizes.key_rows(k),
        value_columns: sizes.key_columns(v),
    };
    let width = padded(sizes.width, lanes());
    // Of keys and of values, for every segment.
    let partial = sizes.keys.next_multiple_of(ROWS) * width;
    let mut partials = vec![0f32; if of_keys { 2 * sizes.all_heads() * segments * partial } else { 0 }];
    let all_partials = Shared::of(&mut partials);
    let segment = |dq: &Shared| {
        let tasks = (0..sizes.all_heads() * segments).into_par_iter();
        tasks.for_each_init(Scratch::default, |scratch, task| {
            let blocks = task % segments * each..blocks.min((task % segments + 1) * each);
            // SAFETY: two for each task, and within the allocation.
            let kv = of_keys.then(|| unsafe {
                let of = |which: usize| all_partials.at((2 * task + which) * partial);
                (std::slice::from_raw_parts_mut(of(0), partial), std::slice::from_raw_parts_mut(of(1), partial))
            });
            widest(Segment { inputs: &inputs, head: task / segments, blocks, dq, kv, scratch });
        });
    };
    // SAFETY: the segments of all heads are the whole of it.
    let dq = unsafe { written(q.len(), segment) };
    let summed = |which: usize| {
        let add = |sum: &Shared| {
            // A token of all heads at a time.
            (0..sizes.batch * sizes.keys).into_par_iter().with_min_len(64).for_each(|token| {
                for head in 0..sizes.heads {
                    let (first, key) = (token / sizes.keys * sizes.heads + head, token % sizes.keys);
                    let at = token * sizes.channels() + head * sizes.width;
                    // SAFETY: a token's channels are no other task's.
                    let sum =
                        unsafe { std::slice::from_raw_parts_mut(sum.at(at).cast::<MaybeUninit<f32>>(), sizes.width) };
                    let of = |segment| &partials[(2 * (first * segments + segment) + which) * partial + key * width..];
                    sum.iter_mut().zip(of(0)).for_each(|(sum, value)| _ = sum.write(*value));
                    // SAFETY: every value was written.
                    let sum = unsafe { std::slice::from_raw_parts_mut(sum.as_mut_ptr().cast::<f32>(), sizes.width) };
                    for segment in 1..segments {
                        sum.iter_mut().zip(of(segment)).for_each(|(sum, value)| *sum += value);
                    }
                }
            });
        };
        // SAFETY: every channel of every token is written.
        unsafe { written(k.len(), add) }
    };
    Cotangents { q: dq, kv: of_keys.then(|| (summed(0), summed(1))) }
}

struct Inputs<'a> {
    sizes: AttentionSizes,
    q: &'a [f32],
    dy: &'a [f32],
    y: &'a [f32],
    log_sums: &'a [f32],
    key_columns: Vec<f32>,
    key_rows: Vec<f32>,
    value_columns: Vec<f32>,
}

#[derive(Default)]
struct Scratch {
    /// Of a block: queries and the result's cotangents, as columns and as rows, in panels.
    query_columns: Vec<f32>,
    query_rows: Vec<f32>,
    dy_columns: Vec<f32>,
    dy_rows: Vec<f32>,
    p: Vec<f32>,
    ds: Vec<f32>,
    dq: Vec<f32>,
}

/// Some blocks of queries of one head.
struct Segment<'a> {
    inputs: &'a Inputs<'a>,
    head: usize,
    blocks: std::ops::Range<usize>,
    dq: &'a Shared,
    /// Zeros, that the cotangents of keys and values are added to.
    kv: Option<(&'a mut [f32], &'a mut [f32])>,
    scratch: &'a mut Scratch,
}

impl WithSimd for Segment<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { inputs, head, blocks, dq, mut kv, scratch } = self;
        for index in blocks {
            block_vjp(simd, inputs, inputs.sizes.block(head, index), dq, &mut kv, scratch);
        }
    }
}

#[inline(always)]
fn block_vjp<S: Simd>(
    simd: S,
    inputs: &Inputs,
    block: Queries,
    dq: &Shared,
    kv: &mut Option<(&mut [f32], &mut [f32])>,
    scratch: &mut Scratch,
) {
    let (sizes, lanes) = (inputs.sizes, S::F32_LANES);
    let width = padded(sizes.width, lanes);
    let Scratch { query_columns, query_rows, dy_columns, dy_rows, p, ds, dq: sums } = scratch;
    let (q, dy, y) = (sizes.rows(inputs.q, block), sizes.rows(inputs.dy, block), sizes.rows(inputs.y, block));
    for (columns, rows, source, factor) in
        [(&mut *query_columns, &mut *query_rows, q, sizes.scale()), (&mut *dy_columns, &mut *dy_rows, dy, 1.)]
    {
        columns.resize(sizes.width * padded(block.count, lanes), 0.);
        columns_in_panels(source, factor, panels_of(block.count, lanes), columns);
        if kv.is_some() {
            rows.resize(block.count * width, 0.);
            rows_in_panels(source, factor, panels_of(sizes.width, lanes), rows);
        }
    }
    p.resize(KEYS * QUERIES, 0.);
    ds.resize(KEYS * QUERIES, 0.);
    sums.resize(QUERIES * width, 0.);
    let (mut log_sums, mut along) = ([0f32; QUERIES], [0f32; QUERIES]);
    log_sums[..block.count]
        .copy_from_slice(&inputs.log_sums[block.head * sizes.queries + block.first..][..block.count]);
    for (row, along) in along[..block.count].iter_mut().enumerate() {
        *along = y.row(row).iter().zip(dy.row(row)).map(|(y, dy)| y * dy).sum();
    }
    let of_head = |panels: &'_ [f32], each: usize| block.head * each..(block.head * each + each).min(panels.len());
    let key_columns = &inputs.key_columns[of_head(&inputs.key_columns, sizes.key_columns_len())];
    let value_columns = &inputs.value_columns[of_head(&inputs.value_columns, sizes.key_columns_len())];
    let key_rows = &inputs.key_rows[of_head(&inputs.key_rows, sizes.key_rows_len(lanes))];
    for first in (0..sizes.keys).step_by(KEYS) {
        let scores = Block { keys: KEYS.min(sizes.keys - first), queries: block.count };
        scores.scores(simd, sizes.width, &key_columns[first * sizes.width..], query_columns, p);
        scores.weights(simd, p, &log_sums);
        scores.scores(simd, sizes.width, &value_columns[first * sizes.width..], dy_columns, ds);
        scores.softmax_vjp(simd, p, ds, &along);
        scores.sum_over_keys(simd, ds, (key_rows, sizes.keys, first), sizes.width, first > 0, sums);
        if let Some((dk, dv)) = kv {
            // The queries were scaled, so dk is.
            scores.add_over_queries(simd, ds, query_rows, sizes.width, &mut dk[first * width..]);
            scores.add_over_queries(simd, p, dy_rows, sizes.width, &mut dv[first * width..]);
        }
    }
    for row in 0..block.count {
        for (i, sum) in sums[row * width..][..sizes.width].iter().enumerate() {
            // SAFETY: a block's rows and a head's columns are no other task's.
            unsafe { dq.at(sizes.at(block) + row * sizes.channels() + i).write(sum * sizes.scale()) };
        }
    }
}
