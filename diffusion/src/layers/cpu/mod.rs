//! Layers in f32 on the CPU, each in one pass over memory, its loops compiled for several generations of vector instructions
//! and chosen among at run time. The formulas of tensor operations beside which they stand are the
//! reference: they serve other dtypes and devices, and the tests hold these against them.
#![allow(clippy::needless_range_loop, reason = "iterators and closures between vectors may not be inlined")]

mod attention;
mod convolution;
mod exp;
mod geglu;
mod linear;
mod lora;
mod memory;
mod norm;
mod product;
mod simd;
mod skinny;
mod softmax;
mod tile;
mod transpose;

use std::ops::Deref;

use candle_core::{CpuStorage, Device, Shape, Storage, Tensor};

pub use attention::{AttentionSizes, Cotangents, attend_heads, attend_heads_vjp};
pub(super) use attention::{attend, attend_vjp};
pub use convolution::{Bias, Convolution, Kernel};
pub(super) use convolution::{conv3x3, conv3x3_vjp};
pub(super) use geglu::{geglu, geglu_vjp};
pub use geglu::{geglu_rows, geglu_rows_vjp};
pub(super) use linear::{linear, linear_channels, linear_channels_vjp, linear_vjp};
pub use linear::{linear_rows, linear_rows_vjp};
pub(crate) use lora::lora_vjp;
pub use norm::Affine;
pub use norm::{GroupNormSizes, group_norm_planes, group_norm_planes_vjp, layer_norm_rows, layer_norm_rows_vjp};
pub(super) use norm::{group_norm, group_norm_vjp, layer_norm, layer_norm_parameters_vjp, layer_norm_vjp};
pub use softmax::softmax_rows;
pub(super) use softmax::{softmax, softmax_vjp};
pub(super) use transpose::transpose_last;

use crate::Result;

/// The values of a contiguous f32 tensor in main memory.
pub(super) struct Values<'a> {
    /// candle's read guard, whose type it keeps to itself.
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    range: (usize, usize),
}

impl<'a> Values<'a> {
    /// `None` for any other tensor.
    pub(super) fn of(tensor: &'a Tensor) -> Option<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let range = layout.contiguous_offsets()?;
        matches!(&*storage, Storage::Cpu(CpuStorage::F32(_))).then(|| Self { storage: Box::new(storage), range })
    }
}

impl Deref for Values<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.0..self.range.1],
            _ => unreachable!("checked when it was made"),
        }
    }
}

fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape.into(), &Device::Cpu)?)
}

/// Values below which a piece of work is not worth another thread.
const LEAST: usize = 1 << 14;

/// Rows of `n` values each that are worth a thread.
fn rows_at_once(n: usize) -> usize {
    LEAST.div_ceil(n.max(1))
}

/// Every kernel against the formula of tensor operations, which f64 goes by.
#[cfg(test)]
mod tests {
    use candle_core::DType;

    use crate::layers::finite_difference::{assert_values, numbers, values, weights};
    use crate::layers::{Attended, Conv2d, GroupNorm, LayerNorm, Linear, geglu, geglu_vjp};
    use crate::{Checkpoint, Result};

    use super::*;

    const TOLERANCE: f64 = 2e-6;

    fn single(tensor: &Tensor) -> Tensor {
        tensor.to_dtype(DType::F32).unwrap()
    }

    /// The same weights in both precisions.
    fn both(shapes: &[(&str, &[usize])]) -> (Checkpoint, Checkpoint) {
        let wide = weights(shapes);
        let tensors = shapes.iter().map(|(name, shape)| (name.to_string(), wide.root().tensor(name, shape).unwrap()));
        let narrow = Checkpoint::from_tensors(wide.path(), tensors.collect(), DType::F32, &Device::Cpu);
        (wide, narrow)
    }

    #[track_caller]
    fn same(what: &str, narrow: Result<Tensor>, wide: Result<Tensor>) {
        let (narrow, wide) = (narrow.unwrap(), wide.unwrap());
        assert_eq!((narrow.dtype(), narrow.dims()), (DType::F32, wide.dims()), "{what}");
        assert_values(&narrow, &numbers(&wide), TOLERANCE);
    }

    /// Odd and even sizes, single pixels, one channel and many, and more rows than one task takes.
    #[test]
    fn convolutions() {
        let sizes = [(3, 4, 5, 6), (1, 5, 1, 1), (4, 2, 1, 7), (2, 3, 8, 2), (40, 3, 70, 33), (64, 16, 9, 9)];
        for (inputs, outputs, h, w) in sizes {
            let (wide, narrow) = both(&[("weight", &[outputs, inputs, 3, 3]), ("bias", &[outputs])]);
            let x = values(0, (2, inputs, h, w));
            for stride in [1, 2] {
                let load = |file: &Checkpoint| Conv2d::load(&file.root(), inputs, outputs, stride).unwrap();
                let (wide, narrow) = (load(&wide), load(&narrow));
                let what = format!("{inputs} to {outputs} at {h}x{w}, stride {stride}");
                same(&what, narrow.forward(&single(&x)), wide.forward(&x));
                let residual = values(2, wide.forward(&x).unwrap().shape());
                let onto = (narrow.forward_onto(&single(&residual), &single(&x)), wide.forward_onto(&residual, &x));
                same(&what, onto.0, onto.1);
                let biases = values(3, (2, outputs));
                let biased = (narrow.forward_shifted(&single(&x), &single(&biases)), wide.forward_shifted(&x, &biases));
                same(&what, biased.0, biased.1);
                let dy = values(1, wide.forward(&x).unwrap().shape());
                same(&what, narrow.vjp(&single(&dy), (h, w)), wide.vjp(&dy, (h, w)));
            }
        }
    }

    /// To the bit: latents that are encoded again after an interruption come in other batches.
    #[test]
    fn an_image_has_the_same_convolution_in_any_batch() {
        let (_, file) = both(&[("weight", &[20, 70, 3, 3]), ("bias", &[20])]);
        for (h, w) in [(2, 2), (4, 4), (8, 8), (9, 13), (16, 16)] {
            let x = single(&values(0, (7, 70, h, w)));
            for stride in [1, 2] {
                let conv = Conv2d::load(&file.root(), 70, 20, stride).unwrap();
                let all = conv.forward(&x).unwrap();
                for item in [0, 6] {
                    let alone = conv.forward(&x.narrow(0, item, 1).unwrap()).unwrap();
                    assert_eq!(numbers(&alone), numbers(&all.narrow(0, item, 1).unwrap()), "{h}x{w}, stride {stride}");
                }
            }
        }
    }

    /// Rows shorter and longer than the blocks that sums go by, and far from zero.
    #[test]
    fn norms() {
        for (channels, groups, h, w) in [(4, 2, 1, 3), (6, 3, 5, 7), (64, 8, 16, 16), (4, 1, 40, 33)] {
            let (wide, narrow) = both(&[("weight", &[channels]), ("bias", &[channels])]);
            let load = |file: &Checkpoint| GroupNorm::load(&file.root(), channels, groups, 1e-5).unwrap();
            let (wide, narrow) = (load(&wide), load(&narrow));
            let x = (values(0, (3, channels, h, w)) + 5.).unwrap();
            let (dy, what) = (values(1, x.shape()), format!("{channels} in {groups} at {h}x{w}"));
            let (x32, dy32) = (single(&x), single(&dy));
            same(&what, narrow.forward(&x32), wide.forward(&x));
            same(&what, narrow.forward_silu(&x32), wide.forward_silu(&x));
            same(&what, narrow.vjp_silu(&x32, &dy32), wide.vjp_silu(&x, &dy));
            let before = values(2, x.shape());
            let before32 = single(&before);
            same(&what, narrow.vjp_onto(&before32, &x32, &dy32), wide.vjp_onto(&before, &x, &dy));
            same(&what, narrow.vjp_silu_onto(&before32, &x32, &dy32), wide.vjp_silu_onto(&before, &x, &dy));
        }
        for width in [1, 6, 33, 1300] {
            let (wide, narrow) = both(&[("weight", &[width]), ("bias", &[width])]);
            let load = |file: &Checkpoint| LayerNorm::load(&file.root(), width, 1e-5).unwrap();
            let (wide, narrow) = (load(&wide), load(&narrow));
            let x = (values(0, (2, 5, width)) + 2.).unwrap();
            let (dy, what) = (values(1, x.shape()), format!("layer norm of {width}"));
            same(&what, narrow.forward(&single(&x)), wide.forward(&x));
            if width > 1 {
                let before = values(2, x.shape());
                let onto = narrow.vjp_onto(&single(&before), &single(&x), &single(&dy));
                same(&what, onto, wide.vjp_onto(&before, &x, &dy));
            }
        }
    }

    #[test]
    fn linear_maps() {
        // Rows of weights that fill tiles and do not, sums in several blocks, and tokens in several panels, passes and methods.
        let sizes = [(1, 1, 1), (5, 3, 7), (16, 13, 3), (64, 96, 40), (320, 31, 77), (640, 8, 100), (32, 12, 200)];
        for (inputs, outputs, tokens) in sizes {
            let (wide, narrow) = both(&[("weight", &[outputs, inputs]), ("bias", &[outputs])]);
            let load = |file: &Checkpoint| Linear::load(&file.root(), inputs, outputs).unwrap();
            let x = values(0, (2, tokens, inputs));
            let (residual, dy) = (values(2, (2, tokens, outputs)), values(3, (2, tokens, outputs)));
            let (residual32, x32, dy32) = (single(&residual), single(&x), single(&dy));
            same("linear", load(&narrow).forward(&x32), load(&wide).forward(&x));
            same("onto", load(&narrow).forward_onto(&residual32, &x32), load(&wide).forward_onto(&residual, &x));
            same("vjp", load(&narrow).vjp(&dy32), load(&wide).vjp(&dy));
            same("vjp onto", load(&narrow).vjp_onto(&x32, &dy32), load(&wide).vjp_onto(&x, &dy));
            let no_bias = |file: &Checkpoint| Linear::load_no_bias(&file.root(), inputs, outputs).unwrap();
            same("no bias", no_bias(&narrow).forward(&x32), no_bias(&wide).forward(&x));
            same(
                "and onto",
                no_bias(&narrow).forward_onto(&residual32, &x32),
                no_bias(&wide).forward_onto(&residual, &x),
            );
            let strided = values(1, (2, inputs, tokens)).t().unwrap();
            same("strided", load(&narrow).forward(&single(&strided)), load(&wide).forward(&strided));
        }
    }

    #[test]
    fn linear_maps_of_channels() {
        for (inputs, outputs, h, w) in [(3, 5, 2, 3), (16, 1, 1, 1), (320, 25, 4, 4), (48, 14, 9, 13), (32, 40, 12, 12)]
        {
            let (wide, narrow) = both(&[("weight", &[outputs, inputs, 1, 1]), ("bias", &[outputs])]);
            let load = |file: &Checkpoint| Linear::load_conv1x1(&file.root(), inputs, outputs).unwrap();
            let (x, dy) = (values(0, (3, inputs, h, w)), values(1, (3, outputs, h, w)));
            same("forward", load(&narrow).forward_channels(&single(&x)), load(&wide).forward_channels(&x));
            same("backward", load(&narrow).vjp_channels(&single(&dy)), load(&wide).vjp_channels(&dy));
        }
    }

    /// To the bit, as of convolutions: of many weights and few rows, and of many rows by `gemm`.
    #[test]
    fn an_item_has_the_same_linear_map_in_any_batch() {
        let (_, file) = both(&[("weight", &[40, 160]), ("bias", &[40])]);
        let linear = Linear::load(&file.root(), 160, 40).unwrap();
        let assert_alone = |what: &str, x: &Tensor, map: &dyn Fn(&Tensor) -> Result<Tensor>| {
            let all = map(x).unwrap();
            for item in [0, 4] {
                let alone = map(&x.narrow(0, item, 1).unwrap()).unwrap();
                assert_eq!(numbers(&alone), numbers(&all.narrow(0, item, 1).unwrap()), "{what} {:?}", x.dims());
            }
        };
        for tokens in [1, 16, 77, 300] {
            let (x, dy) = (single(&values(0, (5, tokens, 160))), single(&values(1, (5, tokens, 40))));
            assert_alone("forward", &x, &|x| linear.forward(x));
            assert_alone("backward", &dy, &|dy| linear.vjp(dy));
        }
        assert_alone("a row", &single(&values(0, (5, 160))), &|x| linear.forward(x));
        let (_, file) = both(&[("weight", &[40, 160, 1, 1]), ("bias", &[40])]);
        let linear = Linear::load_conv1x1(&file.root(), 160, 40).unwrap();
        for side in [1, 4, 8, 12] {
            let x = single(&values(0, (5, 160, side, side)));
            assert_alone("channels", &x, &|x| linear.forward_channels(x));
            let dy = single(&values(1, (5, 40, side, side)));
            assert_alone("channels, backward", &dy, &|dy| linear.vjp_channels(dy));
        }
    }

    /// Fewer rows than a task takes, and several tasks.
    #[test]
    fn low_rank_factors() {
        for (rows, inputs, outputs, rank) in [(1, 3, 2, 1), (40, 5, 7, 4), (600, 16, 8, 4)] {
            let [x, dy] = [inputs, outputs].map(|width| values(width as u64, (rows, width)));
            let (down, up) = (values(2, (rank, inputs)), values(3, (outputs, rank)));
            let found = lora_vjp(&single(&x), &single(&dy), &single(&down), &single(&up)).unwrap().unwrap();
            let product = |a: &Tensor, b: &Tensor| a.matmul(b).unwrap();
            let d_down = product(&product(&dy, &up).t().unwrap(), &x);
            let d_up = product(&dy.t().unwrap(), &product(&x, &down.t().unwrap()));
            same("down", Ok(found.0), Ok(d_down));
            same("up", Ok(found.1), Ok(d_up));
            assert!(lora_vjp(&x, &dy, &down, &up).unwrap().is_none());
        }
    }

    #[test]
    fn attention() {
        // The last two in several blocks of queries and of keys, the last of each shorter.
        for (queries, keys) in [(5, 7), (40, 64), (3, 2), (300, 500), (97, 5000)] {
            let all = [queries, keys, keys, queries].map(|tokens| values(tokens as u64, (3, tokens, 8)));
            let narrow = all.each_ref().map(single);
            let attended = |all: &[Tensor; 4], of_keys: bool| {
                let [q, k, v, dy] = all;
                let attended = Attended { q, k, v, heads: 2, upcast: false };
                let attention = attended.attend().unwrap();
                let vjp = attended.vjp(&attention, dy, of_keys).unwrap();
                (attention.y, vjp)
            };
            for of_keys in [false, true] {
                let ((narrow_y, narrow_vjp), (y, vjp)) = (attended(&narrow, of_keys), attended(&all, of_keys));
                same("the queries' gradient", Ok(narrow_vjp.q), Ok(vjp.q));
                assert_eq!((narrow_vjp.kv.is_some(), vjp.kv.is_some()), (of_keys, of_keys));
                if let (Some((narrow_dk, narrow_dv)), Some((dk, dv))) = (narrow_vjp.kv, vjp.kv) {
                    same("the keys' gradient", Ok(narrow_dk), Ok(dk));
                    same("the values' gradient", Ok(narrow_dv), Ok(dv));
                }
                same("attention", Ok(narrow_y), Ok(y));
            }
        }
    }

    /// Whatever the queries, all weight is on it: their gradient is zero but for rounding.
    #[test]
    fn attention_to_a_single_key() {
        let [q, k, v, dy] = [3, 1, 1, 3].map(|tokens| single(&values(tokens as u64, (1, tokens, 8))));
        let attended = Attended { q: &q, k: &k, v: &v, heads: 2, upcast: false };
        let attention = attended.attend().unwrap();
        assert_values(&attention.y, &numbers(&v).repeat(3), TOLERANCE);
        let vjp = attended.vjp(&attention, &dy, true).unwrap();
        assert!(numbers(&vjp.q).iter().all(|d| d.abs() < 1e-6));
        let (_, dv) = vjp.kv.unwrap();
        same("the value's gradient", Ok(dv), dy.to_dtype(DType::F64).unwrap().sum_keepdim(1).map_err(Into::into));
    }

    #[test]
    fn gated_feed_forward() {
        for width in [1, 7, 160] {
            let (x, dy) = ((values(0, (2, 5, 2 * width)) * 3.).unwrap(), values(1, (2, 5, width)));
            same("geglu", geglu(&single(&x)), geglu(&x));
            same("its gradient", geglu_vjp(&single(&x), &single(&dy)), geglu_vjp(&x, &dy));
        }
    }

    /// What is not contiguous f32 in main memory goes the other way.
    #[test]
    fn other_tensors_are_left_to_the_formulas() {
        let x = values(0, (2, 3, 4));
        assert!(Values::of(&x).is_none());
        let x = single(&x);
        assert_eq!(Values::of(&x).unwrap().len(), 24);
        assert!(Values::of(&x.t().unwrap()).is_none());
        let row = x.get(1).unwrap();
        assert_eq!(&*Values::of(&row).unwrap(), row.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    }
}
