/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The request does not make sense, or not for this file.
    #[error("{0}")]
    Request(String),
    /// A file of weights cannot be read or written.
    #[error(transparent)]
    Diffusion(#[from] diffusion::Error),
    /// A file does not hold a usable adapter.
    #[error(transparent)]
    Adapter(#[from] dpt_plugin::Error),
}

pub(crate) type Result<T> = std::result::Result<T, Error>;
