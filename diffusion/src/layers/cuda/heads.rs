//! Attention in f32: products of every head's matrices where they lie between those of the others, by cuBLAS.

use candle_core::Tensor;
use candle_core::cuda::cudarc::cublas::{result::gemm_strided_batched_ex, sys};

use super::{Address, Kernels, alike, softmax, softmax_vjp, takes_wide};
use crate::Result;
use crate::layers::Cotangents;
use crate::layers::attention::{BLOCK, row_blocks};
use crate::layers::cpu::AttentionSizes;

/// A matrix for each head of an item, row by row; strides in elements.
#[derive(Clone, Copy)]
struct Matrices {
    at: Address,
    row_stride: usize,
    head_stride: usize,
}

impl Matrices {
    /// From a row on.
    fn from(self, row: usize) -> Self {
        Self { at: self.at + (row * self.row_stride * size_of::<f32>()) as u64, ..self }
    }
}

/// A factor as it lies in memory, or its transpose.
#[derive(Clone, Copy)]
enum Factor {
    Plain(Matrices),
    Transposed(Matrices),
}

impl Factor {
    fn parts(self) -> (Matrices, sys::cublasOperation_t) {
        match self {
            Self::Plain(matrices) => (matrices, sys::cublasOperation_t::CUBLAS_OP_N),
            Self::Transposed(matrices) => (matrices, sys::cublasOperation_t::CUBLAS_OP_T),
        }
    }
}

/// Sizes of one item's heads.
struct Heads<'a> {
    kernels: Kernels<'a>,
    heads: usize,
    width: usize,
    keys: usize,
}

impl<'a> Heads<'a> {
    /// Of queries, keys and values `[B, tokens, heads * width]`; `None` but for f32 on CUDA, and where they do not fit each other.
    fn of((q, k, v): (&'a Tensor, &Tensor, &Tensor), heads: usize) -> Option<Self> {
        let AttentionSizes { width, keys, .. } = AttentionSizes::of((q, k, v), heads)?;
        (takes_wide(q) && alike(q, [k, v])).then(|| Self { kernels: Kernels::of(q), heads, width, keys })
    }

    fn scale(&self) -> f32 {
        1. / (self.width as f32).sqrt()
    }

    /// Of item `i` of `[B, tokens, heads * width]`.
    fn item(&self, x: &Tensor, i: usize) -> Result<Matrices> {
        let row_stride = self.heads * self.width;
        let first = i * x.dim(1)? * row_stride;
        let at = self.kernels.address(x)? + (first * size_of::<f32>()) as u64;
        Ok(Matrices { at, row_stride, head_stride: self.width })
    }

    /// Of `[heads, rows, keys]`.
    fn scores(&self, x: &Tensor) -> Result<Matrices> {
        Ok(Matrices { at: self.kernels.address(x)?, row_stride: self.keys, head_stride: x.dim(1)? * self.keys })
    }

    /// Each head's `y = scale a b` of `[rows, inner] [inner, columns]`, or that added to y.
    ///
    /// # Safety
    /// The matrices are on the device, have these sizes, and live until the product is launched.
    unsafe fn product(
        &self,
        [rows, columns, inner]: [usize; 3],
        scale: f32,
        [a, b]: [Factor; 2],
        y: Matrices,
        added: bool,
    ) -> Result<()> {
        const F32: sys::cudaDataType = sys::cudaDataType::CUDA_R_32F;
        let ((a, of_a), (b, of_b), keep) = (a.parts(), b.parts(), f32::from(u8::from(added)));
        let cublas = self.kernels.device.cublas_handle();
        // To cuBLAS, whose matrices lie column by column, this is the transpose of the product: b^T a^T.
        // SAFETY: the caller's.
        unsafe {
            gemm_strided_batched_ex(
                *cublas.handle(),
                of_b,
                of_a,
                columns as i32,
                rows as i32,
                inner as i32,
                (&raw const scale).cast(),
                b.at as *const _,
                F32,
                b.row_stride as i32,
                b.head_stride as i64,
                a.at as *const _,
                F32,
                a.row_stride as i32,
                a.head_stride as i64,
                (&raw const keep).cast(),
                y.at as *mut _,
                F32,
                y.row_stride as i32,
                y.head_stride as i64,
                self.heads as i32,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(candle_core::Error::wrap)?;
        Ok(())
    }

    /// The attention weights `[heads, rows, keys]` of some queries.
    fn weights(&self, rows: usize, q: Matrices, k: Matrices) -> Result<Tensor> {
        let scores = self.kernels.output((self.heads, rows, self.keys))?;
        let (sizes, y) = ([rows, self.keys, self.width], self.scores(&scores)?);
        // SAFETY: `item` and `scores` tell the tensors' sizes, and the callers keep them.
        unsafe { self.product(sizes, self.scale(), [Factor::Plain(q), Factor::Transposed(k)], y, false)? };
        Ok(softmax(&scores)?.expect("f32 on CUDA"))
    }
}

/// The result in the shape of q.
pub(in crate::layers) fn attend_heads((q, k, v): (&Tensor, &Tensor, &Tensor), heads: usize) -> Result<Option<Tensor>> {
    let [q, k, v] = [q.contiguous()?, k.contiguous()?, v.contiguous()?];
    let Some(of) = Heads::of((&q, &k, &v), heads) else { return Ok(None) };
    let (y, (batch, queries, _)) = (of.kernels.output(q.shape())?, q.dims3()?);
    for i in 0..batch {
        let (qs, ks, vs, ys) = (of.item(&q, i)?, of.item(&k, i)?, of.item(&v, i)?, of.item(&y, i)?);
        for (start, rows) in row_blocks(BLOCK, heads, queries, of.keys) {
            let weights = of.weights(rows, qs.from(start), ks)?;
            let factors = [Factor::Plain(of.scores(&weights)?), Factor::Plain(vs)];
            // SAFETY: `item` and `scores` tell the tensors' sizes, which live to the end of this function.
            unsafe { of.product([rows, of.width, of.keys], 1., factors, ys.from(start), false)? };
        }
    }
    Ok(Some(y))
}

/// The cotangents of q, and of k and v if wanted, from that of the result.
pub(in crate::layers) fn attend_heads_vjp(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    dy: &Tensor,
    heads: usize,
    of_keys: bool,
) -> Result<Option<Cotangents<Tensor>>> {
    let [q, k, v, dy] = [q.contiguous()?, k.contiguous()?, v.contiguous()?, dy.contiguous()?];
    let of = Heads::of((&q, &k, &v), heads).filter(|_| dy.dims() == q.dims() && alike(&q, [&dy]));
    let Some(of) = of else { return Ok(None) };
    let (dq, (batch, queries, _)) = (of.kernels.output(q.shape())?, q.dims3()?);
    let kv = of_keys.then(|| Ok::<_, crate::Error>((of.kernels.output(k.shape())?, of.kernels.output(v.shape())?)));
    let kv = kv.transpose()?;
    for i in 0..batch {
        let (qs, ks, vs, dys, dqs) =
            (of.item(&q, i)?, of.item(&k, i)?, of.item(&v, i)?, of.item(&dy, i)?, of.item(&dq, i)?);
        for (start, rows) in row_blocks(BLOCK, heads, queries, of.keys) {
            let (qs, dys, added) = (qs.from(start), dys.from(start), start > 0);
            let weights = of.weights(rows, qs, ks)?;
            let d_weights = of.kernels.output(weights.shape())?;
            let sizes = [rows, of.keys, of.width];
            // SAFETY: `item` and `scores` tell the tensors' sizes, which live to the end of this block.
            unsafe {
                of.product(sizes, 1., [Factor::Plain(dys), Factor::Transposed(vs)], of.scores(&d_weights)?, false)?;
            }
            let d_scores = softmax_vjp(&weights, &d_weights)?.expect("f32 on CUDA");
            let (p, ds) = (of.scores(&weights)?, of.scores(&d_scores)?);
            // SAFETY: likewise.
            unsafe {
                let sizes = [rows, of.width, of.keys];
                of.product(sizes, of.scale(), [Factor::Plain(ds), Factor::Plain(ks)], dqs.from(start), false)?;
                if let Some((dk, dv)) = &kv {
                    let sizes = [of.keys, of.width, rows];
                    let (dk, dv) = (of.item(dk, i)?, of.item(dv, i)?);
                    of.product(sizes, of.scale(), [Factor::Transposed(ds), Factor::Plain(qs)], dk, added)?;
                    of.product(sizes, 1., [Factor::Transposed(p), Factor::Plain(dys)], dv, added)?;
                }
            }
        }
    }
    Ok(Some(Cotangents { q: dq, kv }))
}
