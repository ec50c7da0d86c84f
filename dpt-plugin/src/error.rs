use host_api::{Error as AbiError, Status};

/// What can go wrong in the plugin. Each kind has one status code of the ABI.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is not usable.
    #[error("configuration: {0}")]
    Config(String),
    /// A file does not hold a usable adapter or LoRA.
    #[error("{path}: {message}", path = path.display())]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// What was expected and found.
        message: String,
    },
    /// An adapter's tensors do not make an adapter.
    #[error("adapter: {0}")]
    Adapter(String),
    /// Something is not where it should be: a file, a tap, a host extension.
    #[error("{0}")]
    NotFound(String),
    /// A model, run or step that the method is not defined for or that is not supported.
    #[error("{0}")]
    Unsupported(String),
    /// A run or step without text that can be used.
    #[error("{0}")]
    Text(String),
    /// Sizes that do not fit each other.
    #[error("{0}")]
    Shape(String),
    /// NaN or infinity where numbers are needed.
    #[error("{0}")]
    NonFinite(String),
    /// The host asked to stop.
    #[error("cancelled by the host")]
    Cancelled,
    /// The model failed.
    #[error(transparent)]
    Diffusion(#[from] diffusion::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// The host failed, or broke the ABI's rules.
    #[error(transparent)]
    Host(#[from] AbiError),
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn file(path: impl Into<std::path::PathBuf>, message: impl std::fmt::Display) -> Self {
        Self::File { path: path.into(), message: message.to_string() }
    }

    pub(crate) fn status(&self) -> Status {
        match self {
            Self::Config(_) => Status::InvalidConfig,
            Self::File { .. } | Self::Adapter(_) => Status::InvalidData,
            Self::NotFound(_) => Status::NotFound,
            Self::Unsupported(_) => Status::Unsupported,
            Self::Text(_) => Status::InvalidArgument,
            Self::Shape(_) => Status::ShapeMismatch,
            Self::NonFinite(_) => Status::NonFinite,
            Self::Cancelled => Status::Cancelled,
            Self::Diffusion(error) if error.is_out_of_memory() => Status::OutOfMemory,
            Self::Candle(error) if diffusion::is_out_of_memory(error) => Status::OutOfMemory,
            Self::Diffusion(error) => match error {
                diffusion::Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                    Status::NotFound
                }
                diffusion::Error::Io { .. } => Status::InvalidData,
                diffusion::Error::File { .. }
                | diffusion::Error::MissingTensor { .. }
                | diffusion::Error::UnexpectedTensor { .. }
                | diffusion::Error::TensorShape { .. } => Status::InvalidData,
                diffusion::Error::Unsupported(_) => Status::Unsupported,
                diffusion::Error::Input(_) => Status::ShapeMismatch,
                diffusion::Error::Candle(_) => Status::Internal,
            },
            Self::Candle(_) => Status::Internal,
            Self::Host(error) => error.status,
        }
    }
}

impl From<Error> for AbiError {
    fn from(error: Error) -> Self {
        match error {
            Error::Host(error) => error,
            other => AbiError::new(other.status(), other.to_string()),
        }
    }
}
