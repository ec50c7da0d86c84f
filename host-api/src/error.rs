//! Status codes and errors, as Rust sees them.

use std::fmt;

use crate::abi;

/// The status codes of the interface. A code that this build does not know reads as [`Status::Internal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Status {
    /// Success; also the status of an item that was corrected.
    Ok = abi::SH_OK,
    /// Null pointer, struct too small, unknown flag or constant, index out of range.
    InvalidArgument = abi::SH_INVALID_ARGUMENT,
    /// The call is not legal in the instance's state.
    InvalidState = abi::SH_INVALID_STATE,
    /// Another call on this instance is in progress on another thread.
    Busy = abi::SH_BUSY,
    /// The configuration is not JSON, or has unknown keys or values out of range.
    InvalidConfig = abi::SH_INVALID_CONFIG,
    /// Understood, but not supported.
    Unsupported = abi::SH_UNSUPPORTED,
    /// No such file, tap, parameter, plugin id.
    NotFound = abi::SH_NOT_FOUND,
    /// A file does not hold what it should.
    InvalidData = abi::SH_INVALID_DATA,
    /// A view's shape does not fit the model, the run or another view.
    ShapeMismatch = abi::SH_SHAPE_MISMATCH,
    /// A view's dtype is not f32, f16 or bf16, or differs from its partner's.
    DtypeMismatch = abi::SH_DTYPE_MISMATCH,
    /// NaN or infinity where numbers are needed.
    NonFinite = abi::SH_NON_FINITE,
    /// The host's `cancelled` said so.
    Cancelled = abi::SH_CANCELLED,
    /// A function of the host failed; the message carries the host's.
    HostFailed = abi::SH_HOST_FAILED,
    /// Memory ran out.
    OutOfMemory = abi::SH_OUT_OF_MEMORY,
    /// A fault that is not the caller's.
    Internal = abi::SH_INTERNAL,
    /// A fault was caught in this call; the instance is poisoned.
    Panic = abi::SH_PANIC,
    /// An earlier call ended in [`Status::Panic`].
    Poisoned = abi::SH_POISONED,
}

impl Status {
    /// Every status in the order of the codes.
    pub const ALL: [Self; 17] = [
        Self::Ok,
        Self::InvalidArgument,
        Self::InvalidState,
        Self::Busy,
        Self::InvalidConfig,
        Self::Unsupported,
        Self::NotFound,
        Self::InvalidData,
        Self::ShapeMismatch,
        Self::DtypeMismatch,
        Self::NonFinite,
        Self::Cancelled,
        Self::HostFailed,
        Self::OutOfMemory,
        Self::Internal,
        Self::Panic,
        Self::Poisoned,
    ];

    /// The integer that crosses the interface.
    pub fn code(self) -> abi::sh_status {
        self as abi::sh_status
    }

    /// The status of a code; [`Status::Internal`] when this build does not know it.
    pub fn from_code(code: abi::sh_status) -> Self {
        usize::try_from(code).ok().and_then(|code| Self::ALL.get(code).copied()).unwrap_or(Self::Internal)
    }
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The kind of failure; never [`Status::Ok`].
    pub status: Status,
    /// For people: which thing, what was expected, what was found.
    pub message: String,
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of that status.
    pub fn new(status: Status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    /// [`Status::InvalidArgument`].
    pub fn invalid_argument(message: impl Into<String>) -> Self {
        Self::new(Status::InvalidArgument, message)
    }

    /// [`Status::ShapeMismatch`].
    pub fn shape_mismatch(message: impl Into<String>) -> Self {
        Self::new(Status::ShapeMismatch, message)
    }

    /// The same error with `what` in front of the message.
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?})", self.message, self.status)
    }
}

impl std::error::Error for Error {}
