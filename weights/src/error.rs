use std::fmt;
use std::path::{Path, PathBuf};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request does not make sense, or not for this file.
    #[error("{0}")]
    Request(String),
    /// A file cannot be read or written, or holds what it should not.
    #[error("{path}: {message}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A file of weights cannot be read or written, or a model does not take its input.
    #[error(transparent)]
    Diffusion(#[from] diffusion::Error),
    /// A file does not hold a usable adapter.
    #[error(transparent)]
    Adapter(#[from] dpt_plugin::Error),
    /// A picture cannot be drawn, read or sampled.
    #[error(transparent)]
    Host(#[from] host_demo::Error),
    /// A computation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// Something about a file.
    pub fn file(path: &Path, message: impl fmt::Display) -> Self {
        Self::File { path: path.to_owned(), message: message.to_string() }
    }
}

/// A result with this crate's error.
pub type Result<T> = std::result::Result<T, Error>;
