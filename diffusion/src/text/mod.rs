//! From a prompt to what conditions the U-Net: CLIP's tokenizer and CLIP's text encoder.

mod clip_vocabulary;
mod config;
mod encoder;
mod layer;
mod special_tokens;
mod tokenizer;

pub(crate) use config::Config as TextConfig;
pub use encoder::{TextEmbedding, TextEncoder};
pub use tokenizer::{Tokenizer, Tokens};
