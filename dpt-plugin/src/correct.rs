use candle_core::{DType, Tensor};

use crate::Result;

/// Eq. 9, `z_t <- z_t + eta ds/dz_t`: what is added to each item's latents `[B, ..]`, in f32. With a `bound`, an item's correction
/// is shortened to at most `bound` times its latents' norm. All in variance-preserving space.
pub fn correction(latents: &Tensor, gradient: &Tensor, eta: f64, bound: Option<f64>) -> Result<Tensor> {
    correction_by(latents, gradient, &Tensor::new(&[eta], gradient.device())?, bound)
}

/// The same by an `eta` `[1]` in f64 that is where the gradient is.
pub(crate) fn correction_by(latents: &Tensor, gradient: &Tensor, eta: &Tensor, bound: Option<f64>) -> Result<Tensor> {
    let mut etas = eta.broadcast_as(gradient.dim(0)?)?.contiguous()?;
    if let Some(bound) = bound {
        let (size, limit) = ((norms(gradient)? * etas.abs()?)?, (norms(latents)? * bound)?);
        etas = size.gt(&limit)?.where_cond(&(etas.clone() * (limit / size)?)?, &etas)?;
    }
    let mut rows = vec![1; gradient.rank()];
    rows[0] = gradient.dim(0)?;
    Ok(gradient.to_dtype(DType::F64)?.broadcast_mul(&etas.reshape(rows)?)?.to_dtype(DType::F32)?)
}

/// L2 norm of each item of `[B, ..]`, computed in f64: `[B]`.
pub fn norms(values: &Tensor) -> Result<Tensor> {
    Ok(values.to_dtype(DType::F64)?.flatten_from(1)?.sqr()?.sum(1)?.sqrt()?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// Of items of two numbers.
    fn corrected(latents: &[[f32; 2]], gradient: &[[f32; 2]], eta: f64, bound: Option<f64>) -> Vec<Vec<f32>> {
        let tensor =
            |values: &[[f32; 2]]| Tensor::from_slice(values.as_flattened(), (values.len(), 2), &Device::Cpu).unwrap();
        correction(&tensor(latents), &tensor(gradient), eta, bound).unwrap().to_vec2().unwrap()
    }

    #[test]
    fn the_gradient_is_scaled_by_eta() {
        assert_eq!(corrected(&[[1., 2.]], &[[3., -4.]], 0.5, None), [[1.5, -2.]]);
        assert_eq!(corrected(&[[1., 2.]], &[[3., -4.]], -0.5, None), [[-1.5, 2.]]);
    }

    #[test]
    fn a_bound_shortens_each_item_but_never_turns_or_lengthens() {
        // |z| = 5, |eta g| = 10: bound 0.1 leaves 0.5 of it. The second item stays as long as it is.
        let (latents, gradient) = ([[3., 4.], [30., 40.]], [[6., 8.], [0.3, 0.4]]);
        assert_eq!(corrected(&latents, &gradient, 1., Some(0.1)), [[0.3, 0.4], [0.3, 0.4]]);
        assert_eq!(corrected(&latents, &gradient, -1., Some(0.1)), [[-0.3, -0.4], [-0.3, -0.4]]);
        assert_eq!(corrected(&[[3., 4.]], &[[0.3, 0.4]], 1., Some(0.5)), [[0.3, 0.4]]);
        assert_eq!(corrected(&[[0., 0.]], &[[0.3, 0.4]], 1., Some(0.5)), [[0., 0.]]);
        assert_eq!(corrected(&[[3., 4.]], &[[0., 0.]], 1., Some(0.5)), [[0., 0.]]);
    }
}
