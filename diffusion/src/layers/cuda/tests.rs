//! Every kernel against the formula of tensor operations in f64 on the CPU. They need a GPU.

use candle_core::{DType, Device, Tensor};

use crate::layers::finite_difference::{numbers, values, weights};
use crate::layers::{
    Attended, Conv2d, GradientScale, GroupNorm, LayerNorm, Linear, add_images, cat_channels, geglu, geglu_vjp,
    narrow_channels, softmax, softmax_vjp, to_image, to_image_onto, to_tokens, upsample_nearest, upsample_nearest_vjp,
};
use crate::{Checkpoint, Result};

/// Rounding of what comes in and goes out, relative to the size of the result.
const TOLERANCES: [(DType, f64); 2] = [(DType::F16, 2e-3), (DType::BF16, 1.5e-2)];

/// A pair of layers with the same weights, rounded to a dtype: in that dtype on CUDA, and in f64 on the CPU.
fn both<L>(dtype: DType, shapes: &[(&str, &[usize])], load: impl Fn(&Checkpoint) -> L) -> (L, L) {
    let exact = weights(shapes);
    let rounded = |to: DType, device: &Device| {
        let tensors = shapes.iter().map(|(name, shape)| {
            let tensor = exact.root().tensor(name, shape).unwrap().to_dtype(dtype).unwrap();
            (name.to_string(), tensor.to_dtype(to).unwrap().to_device(device).unwrap())
        });
        Checkpoint::from_tensors(exact.path(), tensors.collect(), to, device)
    };
    (load(&rounded(dtype, &cuda())), load(&rounded(DType::F64, &Device::Cpu)))
}

fn cuda() -> Device {
    crate::device("cuda").unwrap()
}

/// A tensor on CUDA, and the very same numbers in f64.
fn pair(dtype: DType, x: &Tensor) -> (Tensor, Tensor) {
    let narrow = x.to_dtype(dtype).unwrap();
    let wide = narrow.to_dtype(DType::F64).unwrap();
    (narrow.to_device(&cuda()).unwrap(), wide)
}

/// By the norm of the difference: single values may cancel.
#[track_caller]
fn same(what: &str, found: Result<Tensor>, expected: Result<Tensor>, tolerance: f64) {
    let (found, expected) = (found.unwrap(), expected.unwrap());
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let found = numbers(&found.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap());
    let expected = numbers(&expected);
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(&expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied());
    assert!(difference < tolerance, "{what}: relative error {difference:.1e}, allowed {tolerance:.1e}");
}

/// Odd sizes, few and many channels, with and without what fills them up, and contractions long enough to be split.
#[test]
fn convolutions() {
    let sizes = [
        (4, 8, 6, 5),
        (8, 3, 5, 7),
        (5, 8, 4, 6),
        (40, 24, 9, 3),
        (320, 64, 16, 16),
        (1280, 1280, 4, 4),
        (16, 16, 1, 1),
    ];
    for ((dtype, tolerance), (inputs, outputs, h, w)) in
        TOLERANCES.iter().flat_map(|t| sizes.iter().map(move |s| (*t, *s)))
    {
        for stride in [1, 2] {
            let shapes: [(&str, &[usize]); 2] = [("weight", &[outputs, inputs, 3, 3]), ("bias", &[outputs])];
            let (fast, exact) =
                both(dtype, &shapes, |file| Conv2d::load(&file.root(), inputs, outputs, stride).unwrap());
            let what = format!("{dtype:?}, {inputs} to {outputs} at {h}x{w}, stride {stride}");
            same("the weights as they are lent", Ok(fast.kernel.clone()), Ok(exact.kernel.clone()), 1e-9);
            let (x, x64) = pair(dtype, &values(0, (2, inputs, h, w)));
            same(&what, fast.forward(&x), exact.forward(&x64), tolerance);
            let (shift, shift64) = pair(dtype, &values(1, (2, outputs)));
            same(&what, fast.forward_shifted(&x, &shift), exact.forward_shifted(&x64, &shift64), tolerance);
            let y = exact.forward(&x64).unwrap();
            let (residual, residual64) = pair(dtype, &values(2, y.shape()));
            same(&what, fast.forward_onto(&residual, &x), exact.forward_onto(&residual64, &x64), tolerance);
            same(&what, fast.vjp(&residual, (h, w)), exact.vjp(&residual64, (h, w)), tolerance);
            if h > 1 && w > 1 {
                same(&what, fast.forward_padded_end(&x), exact.forward_padded_end(&x64), tolerance);
            }
        }
    }
}

/// Every kernel's width, and widths between; tails of queries and keys.
#[test]
fn attention() {
    let sizes = [(64, 300, 300), (64, 64, 77), (40, 130, 77), (80, 100, 333), (160, 65, 50), (8, 7, 3), (32, 129, 65)];
    // In f32 the scores of so many are computed in two blocks.
    let sizes = |dtype| sizes.into_iter().chain((dtype == DType::F32).then_some((8, 2048, 3000)));
    for ((dtype, tolerance), (width, queries, keys)) in
        TOLERANCES.into_iter().chain([(DType::F32, 3e-6)]).flat_map(|t| sizes(t.0).map(move |s| (t, s)))
    {
        let heads = 3;
        let tokens = |seed, n| pair(dtype, &values(seed, (2, n, heads * width)));
        let ((q, q64), (k, k64), (v, v64)) = (tokens(0, queries), tokens(1, keys), tokens(2, keys));
        let (dy, dy64) = tokens(3, queries);
        let fast = Attended { q: &q, k: &k, v: &v, heads, upcast: false };
        let exact = Attended { q: &q64, k: &k64, v: &v64, heads, upcast: false };
        let what = format!("{dtype:?}, width {width}, {queries} queries, {keys} keys");
        let (found, expected) = (fast.attend().unwrap(), exact.attend().unwrap());
        for of_keys in [false, true] {
            let d = fast.vjp(&found, &dy, of_keys).unwrap();
            let d64 = exact.vjp(&expected, &dy64, of_keys).unwrap();
            same(&what, Ok(d.q), Ok(d64.q), 2. * tolerance);
            assert_eq!(d.kv.is_some(), of_keys);
            if let (Some((dk, dv)), Some((dk64, dv64))) = (d.kv, d64.kv) {
                same(&what, Ok(dk), Ok(dk64), 2. * tolerance);
                same(&what, Ok(dv), Ok(dv64), 2. * tolerance);
            }
        }
        same(&what, Ok(found.y), Ok(expected.y), tolerance);
    }
}

#[test]
fn norms() {
    for ((dtype, tolerance), (channels, groups, h, w)) in
        TOLERANCES.iter().flat_map(|t| [(16, 8, 3, 5), (320, 32, 16, 16), (1280, 32, 1, 2)].map(move |s| (*t, s)))
    {
        let shapes: [(&str, &[usize]); 2] = [("weight", &[channels]), ("bias", &[channels])];
        let what = format!("{dtype:?}, {channels} channels of {h}x{w}");
        let (fast, exact) = both(dtype, &shapes, |file| GroupNorm::load(&file.root(), channels, groups, 1e-5).unwrap());
        // Far from zero, where sums of squares would cancel.
        let (x, x64) = pair(dtype, &(values(0, (2, channels, h, w)) + 3.).unwrap());
        let (dy, dy64) = pair(dtype, &values(1, (2, channels, h, w)));
        let (before, before64) = pair(dtype, &values(2, (2, channels, h, w)));
        same(&what, fast.forward(&x), exact.forward(&x64), 2. * tolerance);
        same(&what, fast.forward_silu(&x), exact.forward_silu(&x64), 2. * tolerance);
        same(&what, fast.vjp_silu(&x, &dy), exact.vjp_silu(&x64, &dy64), 2. * tolerance);
        same(&what, fast.vjp_onto(&before, &x, &dy), exact.vjp_onto(&before64, &x64, &dy64), 2. * tolerance);
    }
}

#[test]
fn norms_and_softmax_of_rows() {
    let sizes = [(DType::F32, 3e-6, 7), (DType::F32, 3e-6, 256)].into_iter();
    let sizes = sizes.chain(TOLERANCES.iter().flat_map(|(dtype, t)| [16, 1280].map(|width| (*dtype, 2. * t, width))));
    for (dtype, tolerance, width) in sizes {
        let shapes: [(&str, &[usize]); 2] = [("weight", &[width]), ("bias", &[width])];
        let what = format!("{dtype:?}, width {width}");
        let (fast, exact) = both(dtype, &shapes, |file| LayerNorm::load(&file.root(), width, 1e-5).unwrap());
        let (x, x64) = pair(dtype, &(values(0, (3, 11, width)) + 3.).unwrap());
        let (dy, dy64) = pair(dtype, &values(1, (3, 11, width)));
        let (before, before64) = pair(dtype, &values(2, (3, 11, width)));
        same(&what, fast.forward(&x), exact.forward(&x64), tolerance);
        same(&what, fast.vjp(&x, &dy), exact.vjp(&x64, &dy64), tolerance);
        same(&what, fast.vjp_onto(&before, &x, &dy), exact.vjp_onto(&before64, &x64, &dy64), tolerance);
        if dtype == DType::F32 {
            let (p, p64) = (softmax(&x).unwrap(), softmax(&x64).unwrap());
            same(&what, softmax_vjp(&p, &dy), softmax_vjp(&p64, &dy64), 10. * tolerance);
            same(&what, Ok(p), Ok(p64), tolerance);
        }
    }
}

#[test]
fn linear_maps_of_tokens_and_channels() {
    for (dtype, tolerance) in TOLERANCES.into_iter().chain([(DType::F32, 3e-6)]) {
        let shapes: [(&str, &[usize]); 2] = [("weight", &[24, 16]), ("bias", &[24])];
        let (fast, exact) = both(dtype, &shapes, |file| Linear::load(&file.root(), 16, 24).unwrap());
        let (x, x64) = pair(dtype, &values(0, (2, 16, 3, 5)));
        let (y, y64) = pair(dtype, &values(1, (2, 24, 3, 5)));
        let tokens = |x: &Tensor| to_tokens(x).unwrap();
        same("channels", fast.forward_channels(&x), exact.forward_channels(&x64), tolerance);
        same("channels' gradient", fast.vjp_channels(&y), exact.vjp_channels(&y64), tolerance);
        let found = fast.forward_onto(&tokens(&y), &tokens(&x));
        same("onto", found, exact.forward_onto(&tokens(&y64), &tokens(&x64)), tolerance);
        let found = fast.vjp_onto(&tokens(&x), &tokens(&y));
        same("gradient onto", found, exact.vjp_onto(&tokens(&x64), &tokens(&y64)), tolerance);
    }
}

#[test]
fn between_the_products() {
    for (dtype, tolerance) in TOLERANCES {
        let (x, x64) = pair(dtype, &(values(0, (2, 5, 48)) * 3.).unwrap());
        let (dy, dy64) = pair(dtype, &values(1, (2, 5, 24)));
        same("geglu", geglu(&x), geglu(&x64), tolerance);
        same("its gradient", geglu_vjp(&x, &dy), geglu_vjp(&x64, &dy64), tolerance);
        let (a, a64) = pair(dtype, &values(2, (2, 16, 3, 4)));
        let (b, b64) = pair(dtype, &values(3, (2, 24, 3, 4)));
        same("both", cat_channels(&a, &b), cat_channels(&a64, &b64), 1e-9);
        same("part", narrow_channels(&b, 8, 16), narrow_channels(&b64, 8, 16), 1e-9);
        let (more, more64) = pair(dtype, &values(4, (2, 16, 3, 4)));
        same("sum", add_images(&a, &more), add_images(&a64, &more64), tolerance);
        let (tokens, tokens64) = (to_tokens(&a).unwrap(), to_tokens(&a64).unwrap());
        same("tokens", Ok(tokens.clone()), Ok(tokens64.clone()), 1e-9);
        same("image", to_image(&tokens, &a), to_image(&tokens64, &a64), 1e-9);
        same("image onto", to_image_onto(&more, &tokens), to_image_onto(&more64, &tokens64), tolerance);
        for size in [(6, 8), (5, 7)] {
            same("larger", upsample_nearest(&a, size), upsample_nearest(&a64, size), 1e-9);
            let (dy, dy64) = pair(dtype, &values(5, (2, 16, size.0, size.1)));
            same("its gradient", upsample_nearest_vjp(&dy), upsample_nearest_vjp(&dy64), tolerance);
        }
    }
}

/// The largest within f16, far below it and beyond, none, or not a number; more of them than threads in a launch.
#[test]
fn scales_of_cotangents() {
    for (factor, most) in [(3., 40_000), (1e-9, 70), (1e12, 70), (0., 8), (f64::NAN, 8)] {
        let x = (values(0, most) * factor).unwrap().to_dtype(DType::F32).unwrap();
        let all = |x: &Tensor| {
            let scale = GradientScale::of(x, DType::F16).unwrap();
            let scaled = scale.scaled(x, DType::F16).unwrap();
            (scale.value().unwrap(), scale.unscaled(&scaled, DType::F32).unwrap(), scaled)
        };
        let (found, expected) = (all(&x.to_device(&cuda()).unwrap()), all(&x));
        assert_eq!(found.0, expected.0, "the scale of {factor}");
        if factor.is_nan() {
            continue;
        }
        let largest = expected.2.to_dtype(DType::F32).unwrap().abs().unwrap().max_all().unwrap();
        assert!(factor == 0. || (0.99..2.).contains(&largest.to_scalar::<f32>().unwrap()), "{factor}");
        for (found, expected) in [(found.1, expected.1), (found.2, expected.2)] {
            let numbers = |t: &Tensor| numbers(&t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap());
            assert_eq!(numbers(&found), numbers(&expected), "{factor}");
        }
    }
}
