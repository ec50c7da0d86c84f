//! The kernels of the CPU at the sizes of Stable Diffusion 2.1, against what this machine can do: multiplications and additions on
//! registers alone, and reading memory that no cache holds, as weights are.
//!
//! `cargo bench -p diffusion` prints a table, `cargo bench -p diffusion -- convolution` that of the kernels so named, and `cargo
//! bench -p diffusion -- --quick` runs everything once at small sizes. The least of several times counts: other programs can only
//! make it longer.
#![allow(clippy::needless_range_loop, reason = "iterators between vectors may not be inlined")]

use std::cell::Cell;
use std::hint::black_box;
use std::time::Instant;

use diffusion::kernels::{
    AttentionSizes, Convolution, GroupNormSizes, Kernel, attend_heads, attend_heads_vjp, geglu_rows, geglu_rows_vjp,
    group_norm_planes, group_norm_planes_vjp, layer_norm_rows, layer_norm_rows_vjp, linear_rows, linear_rows_vjp,
    softmax_rows,
};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// As in the programs: results do not come from new pages.
#[global_allocator]
static ALLOCATOR: diffusion::TensorAllocator = diffusion::TensorAllocator::new();

struct Bench {
    quick: bool,
    /// What a kernel's name must contain.
    only: String,
    /// Of all threads: 1e9 floating-point operations, and bytes, a second.
    gflops: f64,
    gbytes: f64,
    /// More than any cache holds. Weights are taken from it, others each time: a layer's are used once in a pass over a model.
    memory: Vec<f32>,
    taken: Cell<usize>,
}

/// What a kernel does at least.
enum Work {
    Operations(usize),
    Bytes(usize),
}

impl Bench {
    fn least_seconds(&self, mut run: impl FnMut()) -> f64 {
        let rounds = if self.quick { 1 } else { 7 };
        let time = |_| {
            let started = Instant::now();
            run();
            started.elapsed().as_secs_f64()
        };
        (0..=rounds).map(time).fold(f64::MAX, f64::min)
    }

    fn row(&self, what: &str, work: Work, run: impl FnMut()) {
        if !what.contains(&self.only) {
            return;
        }
        let seconds = self.least_seconds(run);
        let (rate, unit, of) = match work {
            Work::Operations(n) => (n as f64 / seconds / 1e9, "GFLOP/s", self.gflops),
            Work::Bytes(n) => (n as f64 / seconds / 1e9, "GB/s", self.gbytes),
        };
        println!("| {what} | {:.2} | {rate:.0} {unit} | {:.0} % |", 1e3 * seconds, 100. * rate / of);
    }

    /// The next values of the memory.
    fn weights(&self, count: usize) -> &[f32] {
        let first = if self.taken.get() + count > self.memory.len() { 0 } else { self.taken.get() };
        self.taken.set(first + count);
        &self.memory[first..][..count]
    }

    /// A length of an image's side, or of a row of channels.
    fn size(&self, size: usize) -> usize {
        if self.quick { size.div_ceil(16) } else { size }
    }
}

fn numbers(count: usize) -> Vec<f32> {
    (0..count as u32)
        .into_par_iter()
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.)
        .collect()
}

/// Twenty-four sums that depend on nothing but themselves.
struct Multiplications(usize);

impl WithSimd for Multiplications {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (a, b) = (simd.splat_f32s(black_box(0.5)), simd.splat_f32s(black_box(0.25)));
        let mut sums = [simd.splat_f32s(0.); 24];
        for _ in 0..self.0 {
            for i in 0..sums.len() {
                sums[i] = simd.mul_add_f32s(sums[i], a, b);
            }
        }
        let mut total = simd.splat_f32s(0.);
        for i in 0..sums.len() {
            total = simd.add_f32s(total, sums[i]);
        }
        simd.reduce_sum_f32s(total)
    }
}

fn lanes() -> usize {
    struct Lanes;
    impl WithSimd for Lanes {
        type Output = usize;

        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }
    Arch::new().dispatch(Lanes)
}

fn main() {
    // cargo adds `--bench`.
    let only = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let quick = std::env::args().any(|a| a == "--quick");
    let memory = numbers(if quick { 1 << 20 } else { 1 << 28 });
    let mut bench = Bench { quick, only, gflops: 0., gbytes: 0., memory, taken: Cell::new(0) };
    let threads = rayon::current_num_threads();
    let times = if bench.quick { 1 << 16 } else { 1 << 24 };
    let on_all = |run: &(dyn Fn() -> f32 + Sync)| rayon::broadcast(|_| black_box(run()));
    let seconds = bench.least_seconds(|| _ = on_all(&|| Arch::new().dispatch(Multiplications(times))));
    bench.gflops = (threads * times * 24 * 2 * lanes()) as f64 / seconds / 1e9;
    let sum = |part: &[f32]| {
        let mut sums = [0f32; 64];
        part.as_chunks::<64>().0.iter().for_each(|values| (0..64).for_each(|i| sums[i] += values[i]));
        sums.iter().sum::<f32>()
    };
    let part = bench.memory.len().div_ceil(threads);
    let seconds = bench.least_seconds(|| _ = black_box(bench.memory.par_chunks(part).map(sum).sum::<f32>()));
    bench.gbytes = (4 * bench.memory.len()) as f64 / seconds / 1e9;
    println!("{threads} threads: {:.0} GFLOP/s on registers, {:.1} GB/s from memory\n", bench.gflops, bench.gbytes);
    println!("| kernel | ms | rate | of the machine's |\n|---|---|---|---|");
    convolutions(&bench);
    linear_maps(&bench);
    attention(&bench);
    rows(&bench);
}

/// By the operations of a direct convolution: more than 100 % is what minimal filtering saves.
fn convolutions(bench: &Bench) {
    let all = [
        (320, 320, 64, 2),
        (960, 320, 64, 2),
        (640, 640, 32, 2),
        (1280, 1280, 16, 2),
        (1280, 1280, 16, 1),
        (1280, 1280, 8, 2),
        (1280, 1280, 8, 1),
        (1280, 1280, 4, 1),
    ];
    for (inputs, outputs, side, batch) in all {
        let (inputs, outputs) = (bench.size(inputs), bench.size(outputs));
        let pixels = batch * side * side;
        for adjoint in [false, true] {
            let (from, to) = if adjoint { (outputs, inputs) } else { (inputs, outputs) };
            let x = numbers(pixels * from);
            let convolution = |weights| Convolution {
                x: &x,
                kernel: if adjoint { Kernel::adjoint(weights, inputs) } else { Kernel::new(weights, inputs) },
                bias: None,
                residual: None,
                batch,
                inputs: from,
                outputs: to,
                height: side,
                width: side,
                stride: 1,
            };
            let whose = if adjoint { "convolution's adjoint" } else { "convolution" };
            let what = format!("3x3 {whose}, {from} to {to}, {batch} of {side}x{side}");
            bench.row(&what, Work::Operations(2 * 9 * inputs * outputs * pixels), || {
                _ = black_box(convolution(bench.weights(9 * inputs * outputs)).compute())
            });
        }
    }
}

fn linear_maps(bench: &Bench) {
    for (rows, inputs, outputs) in [
        (8192, 320, 320),
        (8192, 320, 2560),
        (2048, 640, 640),
        (512, 1280, 1280),
        (256, 1280, 10240),
        (128, 1280, 1280),
        (64, 1280, 1280),
        (64, 1280, 10240),
        (64, 5120, 1280),
        (16, 1280, 1280),
        (16, 1280, 10240),
    ] {
        let (inputs, outputs) = (bench.size(inputs), bench.size(outputs));
        let (x, dy, bias) = (numbers(rows * inputs), numbers(rows * outputs), numbers(outputs));
        let what = format!("linear map of {rows} rows, {inputs} to {outputs}");
        bench.row(&what, Work::Operations(2 * rows * inputs * outputs), || {
            _ = black_box(linear_rows(&x, bench.weights(outputs * inputs), &bias, inputs))
        });
        bench.row(&format!("{what}, backward"), Work::Operations(2 * rows * inputs * outputs), || {
            _ = black_box(linear_rows_vjp(&dy, bench.weights(outputs * inputs), outputs))
        });
    }
}

fn attention(bench: &Bench) {
    for (heads, queries, keys) in [(5, 4096, 4096), (10, 1024, 1024), (20, 256, 256), (5, 4096, 77)] {
        let (queries, keys) = (bench.size(queries), bench.size(keys));
        let sizes = AttentionSizes { batch: 1, heads, queries, keys, width: 64 };
        let [q, k, v, dy] = [queries, keys, keys, queries].map(|tokens| numbers(tokens * heads * 64));
        let product = 2 * heads * queries * keys * 64;
        let what = format!("attention of {heads} heads, {queries} queries, {keys} keys");
        bench.row(&what, Work::Operations(2 * product), || _ = black_box(attend_heads((&q, &k, &v), sizes)));
        let (y, log_sums) = attend_heads((&q, &k, &v), sizes);
        for (of_keys, products) in [(false, 3), (true, 5)] {
            let whose = if of_keys { "queries, keys and values" } else { "queries" };
            let what = format!("attention's backward pass to {whose}");
            let backward = || _ = black_box(attend_heads_vjp((&q, &k, &v), (&y, &log_sums), &dy, sizes, of_keys));
            bench.row(&what, Work::Operations(products * product), backward);
        }
    }
}

fn rows(bench: &Bench) {
    let (count, width) = (8192, bench.size(1280));
    let (x, dy, weight) = (numbers(count * width), numbers(count * width), numbers(width));
    let bytes = 4 * x.len();
    bench.row("layer norm", Work::Bytes(2 * bytes), || _ = black_box(layer_norm_rows(&x, &weight, &weight, 1e-5)));
    bench.row("layer norm's backward pass", Work::Bytes(3 * bytes), || {
        _ = black_box(layer_norm_rows_vjp(&x, &dy, &weight, 1e-5, None))
    });
    bench.row("softmax of rows", Work::Bytes(2 * bytes), || _ = black_box(softmax_rows(&x, width)));
    let (weight, wide) = (numbers(bench.size(320)), numbers(2 * count * width));
    let bytes = 4 * wide.len();
    bench.row("GEGLU", Work::Bytes(bytes + bytes / 2), || _ = black_box(geglu_rows(&wide, width)));
    bench.row("GEGLU's backward pass", Work::Bytes(2 * bytes + bytes / 2), || {
        _ = black_box(geglu_rows_vjp(&wide, &x, width))
    });
    for silu in [false, true] {
        let sizes = GroupNormSizes { of_group: weight.len().div_ceil(32), plane: 4096, eps: 1e-5, silu };
        let images = numbers(2 * weight.len() * sizes.plane);
        let (name, bytes) = (if silu { "group norm and SiLU" } else { "group norm" }, 4 * images.len());
        bench.row(&format!("{name}, 2 of 320 channels of 64x64"), Work::Bytes(2 * bytes), || {
            _ = black_box(group_norm_planes(&images, (&weight, &weight), sizes))
        });
        bench.row(&format!("{name}'s backward pass"), Work::Bytes(3 * bytes), || {
            _ = black_box(group_norm_planes_vjp(&images, &images, (&weight, &weight), sizes, None))
        });
    }
}
