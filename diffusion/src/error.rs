//! What can go wrong, with the facts a user needs to mend it.

use std::path::PathBuf;

/// Errors of loading and running a Stable Diffusion model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what its name promises.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        message: String,
    },
    /// A tensor that the configuration asks for is not in the file.
    #[error("{}: tensor `{name}` is missing; expected shape {expected:?}", path.display())]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor's full name.
        name: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
    },
    /// The file holds tensors that nothing in the model reads.
    #[error("{}: {count} unexpected tensor(s), the first `{name}` with shape {found:?}", path.display())]
    UnexpectedTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The first such tensor by name.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// How many there are.
        count: usize,
    },
    /// A tensor's shape is not what the configuration asks for.
    #[error("{}: tensor `{name}` has shape {found:?}, expected {expected:?}", path.display())]
    TensorShape {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor's full name.
        name: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A configuration asks for something this crate does not do.
    #[error("{0}")]
    Unsupported(String),
    /// An argument does not fit the model.
    #[error("{0}")]
    Input(String),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    pub(crate) fn file(path: impl Into<PathBuf>, message: impl std::fmt::Display) -> Self {
        Self::File { path: path.into(), message: message.to_string() }
    }
}

impl Error {
    /// Whether the memory of a device has run out.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::Candle(error) if is_out_of_memory(error))
    }
}

/// Whether the memory of a device has run out.
pub fn is_out_of_memory(error: &candle_core::Error) -> bool {
    // The driver's, cuBLAS's and cuDNN's words: candle keeps no more of them.
    let words = ["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"];
    let message = error.to_string();
    words.iter().any(|word| message.contains(word))
}
