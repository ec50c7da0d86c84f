//! Operations that candle's autograd follows as one, for f32: fewer passes over memory, fewer kernels to launch, and no gradients
//! for weights that are not trained. Elsewhere [`super::layers`] goes by tensor operations, which these are tested against.

use candle_core::{CpuStorage, CustomOp1, CustomOp3, D, DType, Layout, Result, Shape, Storage, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, Error};
use diffusion::kernels::{self, AttentionSizes};

/// Whether these operations take a tensor; attention only on the CPU.
pub(super) fn takes(x: &Tensor) -> bool {
    x.dtype() == DType::F32 && (x.device().is_cpu() || cfg!(feature = "cuda") && x.device().is_cuda())
}

/// Whether the parts of attention are left to one operation.
pub(super) fn takes_attention(x: &Tensor) -> bool {
    x.device().is_cpu() && takes(x)
}

fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("a fused operation takes contiguous tensors, found {layout:?}"),
    }
}

/// Calls `f` with the values of contiguous f32 tensors on the CPU.
fn with_values<const N: usize, T>(tensors: [&Tensor; N], f: impl FnOnce([&[f32]; N]) -> T) -> Result<T> {
    let locked = tensors.map(Tensor::storage_and_layout);
    let mut all = [&[][..]; N];
    for (found, (storage, layout)) in all.iter_mut().zip(&locked) {
        *found = match &**storage {
            Storage::Cpu(storage) => values(storage, layout)?,
            _ => candle_core::bail!("a fused operation takes tensors in main memory"),
        };
    }
    Ok(f(all))
}

/// Rows `[rows, in]`, weight `[out, in]` and bias `[out]` to `x W^T + b`.
pub(super) struct Linear;

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((rows, inputs), outputs) = (x_layout.shape().dims2()?, weight_layout.shape().dims2()?.0);
        let (x, weight, bias) = (values(x, x_layout)?, values(weight, weight_layout)?, values(bias, bias_layout)?);
        Ok((CpuStorage::F32(kernels::linear_rows(x, weight, bias, inputs)), (rows, outputs).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (rows, outputs) = (x_layout.shape().dims2()?.0, weight_layout.shape().dims2()?.0);
        let y =
            kernels::cuda::linear((x, x_layout), (weight, weight_layout), (bias, bias_layout)).map_err(Error::wrap)?;
        Ok((y, (rows, outputs).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let dx = x.track_op().then(|| dy.matmul(&weight.detach())).transpose()?;
        let dw = weight.track_op().then(|| dy.t()?.matmul(&x.detach())).transpose()?;
        let ones = || Tensor::ones((1, dy.dim(0)?), dy.dtype(), dy.device());
        let db = bias.track_op().then(|| ones()?.matmul(&dy)?.squeeze(0)).transpose()?;
        Ok((dx, dw, db))
    }
}

/// Rows `[rows, n]`, weight and bias `[n]`.
pub(super) struct LayerNorm {
    pub(super) eps: f64,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight, bias) = (values(x, x_layout)?, values(weight, weight_layout)?, values(bias, bias_layout)?);
        let y = kernels::layer_norm_rows(x, weight, bias, self.eps);
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (x, weight, bias) = ((x, x_layout), (weight, weight_layout), (bias, bias_layout));
        let y = kernels::cuda::layer_norm_rows(x, weight, bias, self.eps).map_err(Error::wrap)?;
        Ok((y, x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let trained = weight.track_op() || bias.track_op();
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let dx = kernels::cuda::layer_norm_rows_vjp(x, &dy, weight, self.eps).map_err(Error::wrap)?;
            let (dw, db) = trained.then(|| self.parameters_vjp(&x.detach(), &dy)).transpose()?.unzip();
            return Ok((Some(dx), dw, db));
        }
        let (dx, of_parameters) = with_values([x, weight, &dy], |[x, weight, dy]| {
            let of_parameters = || kernels::layer_norm_rows_parameters_vjp(x, dy, weight.len(), self.eps);
            (kernels::layer_norm_rows_vjp(x, dy, weight, self.eps, None), trained.then(of_parameters))
        })?;
        let (dw, db) = of_parameters.unzip();
        let like = |values: Vec<f32>, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        let row = |values: Option<Vec<f32>>| values.map(|values| like(values, weight)).transpose();
        Ok((Some(like(dx, x)?), row(dw)?, row(db)?))
    }
}

#[cfg(feature = "cuda")]
impl LayerNorm {
    /// The gradients of weight and bias: sums over rows, as products with ones.
    fn parameters_vjp(&self, x: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
        let centred = x.broadcast_sub(&x.mean_keepdim(1)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(1)? + self.eps)?.sqrt()?;
        let ones = Tensor::ones((1, dy.dim(0)?), dy.dtype(), dy.device())?;
        let over_rows = |t: &Tensor| ones.matmul(t)?.squeeze(0);
        Ok((over_rows(&(centred.broadcast_div(&deviation)? * dy)?)?, over_rows(dy)?))
    }
}

/// Queries, keys and values `[B, tokens, heads * width]`, already projected, to what each head attends to.
pub(super) struct Attention {
    pub(super) heads: usize,
}

impl Attention {
    fn sizes(&self, q: &Shape, k: &Shape) -> Result<AttentionSizes> {
        let ((batch, queries, channels), (_, keys, _)) = (q.dims3()?, k.dims3()?);
        Ok(AttentionSizes { batch, heads: self.heads, queries, keys, width: channels / self.heads })
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let sizes = self.sizes(q_layout.shape(), k_layout.shape())?;
        let qkv = (values(q, q_layout)?, values(k, k_layout)?, values(v, v_layout)?);
        Ok((CpuStorage::F32(kernels::attend_heads(qkv, sizes).0), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let sizes = self.sizes(q.shape(), k.shape())?;
        let dy = dy.contiguous()?;
        let found = with_values([q, k, v, y, &dy], |[q, k, v, y, dy]| {
            kernels::attend_heads_vjp((q, k, v), (y, None), dy, sizes, true)
        })?;
        let kernels::Cotangents { q: dq, kv: Some((dk, dv)) } = found else { unreachable!("the keys' are asked for") };
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device()).map(Some);
        Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
    }
}

/// Softmax over the last dimension.
pub(super) struct Softmax;

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let n = *layout.shape().dims().last().unwrap_or(&1);
        Ok((CpuStorage::F32(kernels::softmax_rows(values(x, layout)?, n)), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((kernels::cuda::softmax_rows((x, layout)).map_err(Error::wrap)?, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if y.device().is_cuda() {
            return Ok(Some(kernels::cuda::softmax_rows_vjp(y, dy).map_err(Error::wrap)?));
        }
        let (n, dy) = (y.dim(D::Minus1)?, dy.contiguous()?);
        let dx = with_values([y, &dy], |[y, dy]| kernels::softmax_rows_vjp(y, dy, n))?;
        Tensor::from_vec(dx, y.shape(), y.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::super::{Dropout, attention, layers};
    use super::*;

    fn numbers(seed: f64, shape: &[usize]) -> Tensor {
        let value = |i: usize| ((i + 1) as f64 * seed).sin();
        Tensor::from_vec((0..shape.iter().product()).map(value).collect::<Vec<f64>>(), shape, &Device::Cpu).unwrap()
    }

    /// The result of `f` on variables of these values, and every variable's gradient of its product with fixed numbers.
    fn run(dtype: DType, inputs: &[Tensor], f: &dyn Fn(&[Tensor]) -> crate::Result<Tensor>) -> Vec<Vec<f64>> {
        let variables: Vec<Var> =
            inputs.iter().map(|t| Var::from_tensor(&t.to_dtype(dtype).unwrap()).unwrap()).collect();
        let tensors: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
        let y = f(&tensors).unwrap();
        let cotangent = numbers(0.7, y.dims()).to_dtype(dtype).unwrap();
        let gradients = (&y * cotangent).unwrap().sum_all().unwrap().backward().unwrap();
        let all = [y.clone()].into_iter().chain(variables.iter().map(|v| gradients.get(v).unwrap().clone()));
        all.map(|t| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()).collect()
    }

    /// f32 goes by the fused operation, f64 by tensor operations. Sums over a thousand rows may cancel to a tenth of a term.
    #[track_caller]
    fn same(inputs: &[Tensor], f: &dyn Fn(&[Tensor]) -> crate::Result<Tensor>) {
        for (narrow, wide) in run(DType::F32, inputs, f).iter().zip(run(DType::F64, inputs, f)) {
            let largest = wide.iter().fold(0f64, |m, v| m.max(v.abs()));
            let off = narrow.iter().zip(&wide).map(|(a, b)| (a - b).abs()).fold(0., f64::max);
            assert!(narrow.len() == wide.len() && off < 2e-5 * largest, "off by {off} of {largest}");
        }
    }

    #[test]
    fn as_tensor_operations() {
        let x = numbers(1.3, &[2, 500, 6]);
        same(&[x.clone(), numbers(1.1, &[5, 6]), numbers(2.3, &[5])], &|t| {
            layers::Linear::new(t[1].clone(), t[2].clone()).forward(&t[0])
        });
        same(&[x.clone(), numbers(1.1, &[6]), numbers(2.3, &[6])], &|t| {
            layers::LayerNorm::new(t[1].clone(), t[2].clone()).forward(&t[0])
        });
        same(&[(x * 4.).unwrap()], &|t| layers::softmax(&t[0]));
        let keys = [numbers(0.9, &[2, 7, 6]), numbers(1.7, &[2, 7, 6])];
        let [k, v] = keys;
        same(&[(numbers(1.3, &[2, 5, 6]) * 3.).unwrap(), k, v], &|t| {
            attention::attend(&t[0], &t[1], &t[2], 3, &mut Dropout::none())
        });
    }

    /// The transposed input of a residual, and a weight that is a part of another.
    #[test]
    fn strided_inputs() {
        let f = |t: &[Tensor]| {
            let weight = t[1].narrow(0, 2, 4)?;
            layers::Linear::new(weight, t[2].narrow(0, 2, 4)?).forward(&t[0].transpose(0, 1)?)
        };
        same(&[numbers(1.3, &[3, 4, 6]), numbers(1.1, &[8, 6]), numbers(2.3, &[8])], &f);
    }

    /// At inference nothing is spent on the weights' gradients.
    #[test]
    fn weights_that_are_not_variables_have_no_gradient() {
        let x = Var::from_tensor(&numbers(1.3, &[4, 6]).to_dtype(DType::F32).unwrap()).unwrap();
        let weight = numbers(1.1, &[5, 6]).to_dtype(DType::F32).unwrap();
        let bias = numbers(2.3, &[5]).to_dtype(DType::F32).unwrap();
        let y = layers::Linear::new(weight.clone(), bias.clone()).forward(&x).unwrap();
        let gradients = y.sum_all().unwrap().backward().unwrap();
        assert!(gradients.get(&x).is_some() && gradients.get(&weight).is_none() && gradients.get(&bias).is_none());
    }
}
