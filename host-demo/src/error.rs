use std::path::PathBuf;

/// What can go wrong in the host.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request does not make sense.
    #[error("{0}")]
    Request(String),
    /// A file could not be read or written.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was expected or what the system said.
        message: String,
    },
    /// The plugin refused or failed.
    #[error("plugin, {call}: {source}")]
    Plugin {
        /// The call that failed.
        call: String,
        /// The plugin's status and message.
        source: host_api::Error,
    },
    /// The model failed.
    #[error(transparent)]
    Diffusion(#[from] diffusion::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn file(path: impl Into<PathBuf>, message: impl std::fmt::Display) -> Self {
        Self::File { path: path.into(), message: message.to_string() }
    }

    pub(crate) fn plugin(call: impl std::fmt::Display) -> impl FnOnce(host_api::Error) -> Self {
        move |source| Self::Plugin { call: call.to_string(), source }
    }
}
