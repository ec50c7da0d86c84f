//! The kernels of CUDA in f16 at the sizes of Stable Diffusion 2.1, 64x64 latents, beside what the card gives: a large product of
//! matrices by cuBLAS, and a copy in its memory.
//!
//! `cargo bench -p diffusion --features cuda --bench cuda` prints a table; `-- 4` takes as many items instead of one. A time is that of
//! twenty calls in a row over twenty, so that a kernel of a few microseconds shows what launching it takes. The least of several counts.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use diffusion::kernels::cuda::{
    Affine, Kernel, attend, attend_vjp, conv3x3, conv3x3_vjp, geglu, geglu_vjp, group_norm, group_norm_vjp,
};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// What a kernel does at least.
enum Work {
    Operations(usize),
    Bytes(usize),
}

struct Bench {
    device: Device,
    batch: usize,
    /// 1e12 floating-point operations, and 1e9 bytes, a second.
    tflops: f64,
    gbytes: f64,
}

impl Bench {
    fn numbers(&self, shape: &[usize]) -> candle_core::Result<Tensor> {
        Tensor::randn(0f32, 1f32, shape, &self.device)?.to_dtype(DType::F16)
    }

    fn least_seconds<T>(&self, mut run: impl FnMut() -> Outcome<T>) -> Outcome<f64> {
        const CALLS: u32 = 20;
        let mut least = f64::MAX;
        for _ in 0..6 {
            self.device.synchronize()?;
            let started = Instant::now();
            for _ in 0..CALLS {
                run()?;
            }
            self.device.synchronize()?;
            least = least.min(started.elapsed().as_secs_f64() / f64::from(CALLS));
        }
        Ok(least)
    }

    fn row<T>(&self, what: &str, work: Work, run: impl FnMut() -> Outcome<T>) -> Outcome<()> {
        let seconds = self.least_seconds(run)?;
        let (rate, unit, of) = match work {
            Work::Operations(n) => (n as f64 / seconds / 1e12, "TFLOP/s", self.tflops),
            Work::Bytes(n) => (n as f64 / seconds / 1e9, "GB/s", self.gbytes),
        };
        println!("| {what} | {:.0} | {rate:.0} {unit} | {:.0} % |", 1e6 * seconds, 100. * rate / of);
        Ok(())
    }
}

fn main() -> Outcome<()> {
    // cargo adds `--bench`.
    let batch = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).map_or(Ok(1), |n| n.parse())?;
    let mut bench = Bench { device: diffusion::device("cuda")?, batch, tflops: 0., gbytes: 0. };
    const SIDE: usize = 8192;
    let [a, b] = [bench.numbers(&[SIDE, SIDE])?, bench.numbers(&[SIDE, SIDE])?];
    bench.tflops = (2 * SIDE.pow(3)) as f64 / bench.least_seconds(|| Ok(a.matmul(&b)?))? / 1e12;
    drop(b);
    let large = Tensor::cat(&[&a, &a, &a, &a], 0)?;
    // Read and written.
    bench.gbytes = (2 * 2 * large.elem_count()) as f64 / bench.least_seconds(|| Ok(large.copy()?))? / 1e9;
    drop((a, large));
    println!("batch {batch}: {:.0} TFLOP/s by cuBLAS, {:.0} GB/s from memory\n", bench.tflops, bench.gbytes);
    println!("| kernel | us | rate | of the card's |\n|---|---|---|---|");
    convolutions(&bench)?;
    attention(&bench)?;
    passes(&bench)
}

fn convolutions(bench: &Bench) -> Outcome<()> {
    for (inputs, outputs, side) in
        [(320, 320, 64), (640, 320, 64), (640, 640, 32), (1280, 640, 32), (1280, 1280, 16), (1280, 1280, 8)]
    {
        let kernel = Kernel::new(&bench.numbers(&[outputs, inputs, 3, 3])?)?.ok_or("a kernel that is not taken")?;
        let work = || Work::Operations(2 * 9 * inputs * outputs * bench.batch * side * side);
        let [x, dy] = [inputs, outputs].map(|channels| bench.numbers(&[bench.batch, side, side, channels]));
        // Channels last in memory, as between layers.
        let (x, dy) = (x?.permute((0, 3, 1, 2))?, dy?.permute((0, 3, 1, 2))?);
        bench.row(&format!("3x3 convolution, {inputs} to {outputs}, {side}x{side}"), work(), || {
            Ok(conv3x3(&x, &kernel, (None, None), (1, 1), (side, side))?)
        })?;
        bench.row("its adjoint", work(), || Ok(conv3x3_vjp(&dy, &kernel, 1, (side, side))?))?;
    }
    Ok(())
}

fn attention(bench: &Bench) -> Outcome<()> {
    const WIDTH: usize = 64;
    for (heads, queries, keys) in [(5, 4096, 4096), (10, 1024, 1024), (20, 256, 256), (5, 4096, 77)] {
        let tokens = |n: usize| bench.numbers(&[bench.batch, n, heads * WIDTH]);
        let (q, k, v, dy) = (tokens(queries)?, tokens(keys)?, tokens(keys)?, tokens(queries)?);
        let qkv = (&q, &k, &v);
        // Of the formulas: two products forward; backward the scores, their cotangents, and one for each of what is wanted.
        let products = |n: usize| Work::Operations(n * 2 * bench.batch * heads * queries * keys * WIDTH);
        let not_taken = "attention that is not taken";
        bench.row(&format!("attention of {heads} heads, {queries} queries, {keys} keys"), products(2), || {
            Ok(attend(qkv, heads)?.ok_or(not_taken)?)
        })?;
        let (y, sums) = attend(qkv, heads)?.ok_or(not_taken)?;
        for (of_keys, what, count) in [(false, "to queries", 3), (true, "to queries, keys and values", 5)] {
            bench.row(&format!("its backward pass {what}"), products(count), || {
                Ok(attend_vjp(qkv, (&y, &sums), &dy, heads, of_keys)?.ok_or(not_taken)?)
            })?;
        }
    }
    Ok(())
}

/// What goes through memory once: bytes are those of what is read and written.
fn passes(bench: &Bench) -> Outcome<()> {
    let (channels, side, groups) = (320, 64, 32);
    let image = || bench.numbers(&[bench.batch, side, side, channels])?.permute((0, 3, 1, 2));
    let (x, dy, before) = (image()?, image()?, image()?);
    let (weight, bias) = (bench.numbers(&[channels])?, bench.numbers(&[channels])?);
    let affine = Affine { weight: &weight, bias: &bias, eps: 1e-5 };
    let bytes = 2 * x.elem_count();
    let not_taken = "an image that is not taken";
    // Statistics are a pass of their own.
    bench.row(&format!("group norm and SiLU, {channels} channels of {side}x{side}"), Work::Bytes(3 * bytes), || {
        Ok(group_norm(&x, affine, groups, true)?.ok_or(not_taken)?)
    })?;
    bench.row("its backward pass", Work::Bytes(7 * bytes), || {
        Ok(group_norm_vjp(&x, &dy, affine, groups, true, Some(&before))?.ok_or(not_taken)?)
    })?;
    let (tokens, width) = (side * side, 1280);
    let x = bench.numbers(&[bench.batch, tokens, 2 * width])?;
    let dy = bench.numbers(&[bench.batch, tokens, width])?;
    let bytes = 2 * dy.elem_count();
    let not_taken = "tokens that are not taken";
    bench.row(&format!("GEGLU of {tokens} tokens, {width}"), Work::Bytes(3 * bytes), || {
        Ok(geglu(&x)?.ok_or(not_taken)?)
    })?;
    bench.row("its backward pass", Work::Bytes(5 * bytes), || Ok(geglu_vjp(&x, &dy)?.ok_or(not_taken)?))
}
