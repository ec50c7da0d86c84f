//! The layers that Stable Diffusion is made of, each with its forward pass and, where the U-Net needs it, a hand-written
//! `vjp`: the vector-Jacobian product with respect to the layer's *input*. The U-Net's weights are frozen. Layers that others
//! build of too, and train, are public.
//!
//! A `vjp` takes the input that the forward pass saw (layers that are linear in it do not need it) and the cotangent of the
//! output, and returns the cotangent of the input in the same shape and dtype.

mod activation;
mod attention;
mod conv;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod embedding;
#[cfg(test)]
pub(crate) mod finite_difference;
mod images;
mod linear;
mod norm;
mod resample;
mod resnet;
mod scale;
mod tokens;

pub(crate) use activation::{geglu, geglu_vjp};
pub use activation::{silu, silu_vjp};
pub use attention::{Attended, Attention, softmax, softmax_vjp};
pub(crate) use conv::Conv2d;
pub use cpu::Cotangents;
pub(crate) use cpu::lora_vjp;
pub(crate) use embedding::TimestepEmbedding;
pub use embedding::timestep_sinusoid;
pub(crate) mod kernels {
    pub use super::cpu::{
        AttentionSizes, Bias, Convolution, GroupNormSizes, Kernel, attend_heads, attend_heads_vjp, geglu_rows,
        geglu_rows_vjp, group_norm_planes, group_norm_planes_vjp, layer_norm_rows, layer_norm_rows_vjp, linear_rows,
        linear_rows_vjp, softmax_rows,
    };
    /// In half precision on CUDA; `None` for what they do not take.
    #[cfg(feature = "cuda")]
    pub mod cuda {
        pub use super::super::cpu::Affine;
        pub use super::super::cuda::{
            Kernel, attend, attend_vjp, conv3x3, conv3x3_vjp, geglu, geglu_vjp, group_norm, group_norm_vjp,
        };
    }
}
pub(crate) use images::{add_images, cat_channels, narrow_channels};
pub use linear::Linear;
pub use norm::LayerNorm;
pub(crate) use norm::{GroupNorm, statistics_dtype};
pub(crate) use resample::{upsample_nearest, upsample_nearest_vjp};
pub(crate) use resnet::{ResnetBlock, ResnetSizes, ResnetTape};
pub(crate) use scale::GradientScale;
pub(crate) use tokens::{to_image, to_image_onto, to_tokens};
