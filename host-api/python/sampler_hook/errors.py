"""What fails, and under which exception.

Every error of the interface is a `SamplerHookError` with the code that the header gives it; each also is the builtin
exception that says the same, so `except ValueError` or `except FileNotFoundError` catches what one expects.
"""

from __future__ import annotations

import enum

from . import _abi


class Status(enum.IntEnum):
    """Status codes of the interface. Codes that this version does not know read as `INTERNAL`."""

    OK = _abi.SH_OK
    INVALID_ARGUMENT = _abi.SH_INVALID_ARGUMENT
    INVALID_STATE = _abi.SH_INVALID_STATE
    BUSY = _abi.SH_BUSY
    INVALID_CONFIG = _abi.SH_INVALID_CONFIG
    UNSUPPORTED = _abi.SH_UNSUPPORTED
    NOT_FOUND = _abi.SH_NOT_FOUND
    INVALID_DATA = _abi.SH_INVALID_DATA
    SHAPE_MISMATCH = _abi.SH_SHAPE_MISMATCH
    DTYPE_MISMATCH = _abi.SH_DTYPE_MISMATCH
    NON_FINITE = _abi.SH_NON_FINITE
    CANCELLED = _abi.SH_CANCELLED
    HOST_FAILED = _abi.SH_HOST_FAILED
    OUT_OF_MEMORY = _abi.SH_OUT_OF_MEMORY
    INTERNAL = _abi.SH_INTERNAL
    PANIC = _abi.SH_PANIC
    POISONED = _abi.SH_POISONED

    @classmethod
    def _missing_(cls, value: object) -> Status:
        return cls.INTERNAL


class SamplerHookError(Exception):
    """A call of the interface failed; it changed nothing that the caller can see.

    `code` is the status, `message` says what was expected and what was found.
    """

    code: Status = Status.INTERNAL

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class InvalidArgumentError(SamplerHookError, ValueError):
    """An argument is not what the call takes."""

    code = Status.INVALID_ARGUMENT


class InvalidStateError(SamplerHookError, RuntimeError):
    """The call is not legal now: a step outside a run, a second run, a plugin that was destroyed."""

    code = Status.INVALID_STATE


class BusyError(SamplerHookError, RuntimeError):
    """Another call on the same plugin is in progress on another thread."""

    code = Status.BUSY


class InvalidConfigError(SamplerHookError, ValueError):
    """The configuration has unknown keys or values out of range."""

    code = Status.INVALID_CONFIG


class UnsupportedError(SamplerHookError, NotImplementedError):
    """Understood, but not supported: a flow model, extra U-Net inputs, a foreign device."""

    code = Status.UNSUPPORTED


class NotFoundError(SamplerHookError, FileNotFoundError, LookupError):
    """No such file, tap, parameter or plugin: the interface has one code for all of them."""

    code = Status.NOT_FOUND


class InvalidDataError(SamplerHookError, ValueError):
    """A file does not hold what it should."""

    code = Status.INVALID_DATA


class ShapeMismatchError(SamplerHookError, ValueError):
    """A tensor's shape does not fit the model, the run or another tensor."""

    code = Status.SHAPE_MISMATCH


class DtypeMismatchError(SamplerHookError, ValueError, TypeError):
    """A tensor is not f32, f16 or bf16, or differs from its partner."""

    code = Status.DTYPE_MISMATCH


class NonFiniteError(SamplerHookError, ValueError):
    """NaN or infinity where numbers are needed."""

    code = Status.NON_FINITE


class CancelledError(SamplerHookError):
    """The host said that the call should stop. Its `__cause__` is the exception of a callback, where one was raised."""

    code = Status.CANCELLED


class HostFailedError(SamplerHookError, RuntimeError):
    """A callback of the host failed; its exception is the `__cause__`."""

    code = Status.HOST_FAILED


class OutOfMemoryError(SamplerHookError, MemoryError):
    """Not enough memory."""

    code = Status.OUT_OF_MEMORY


class InternalError(SamplerHookError, RuntimeError):
    """A fault of the plugin's."""

    code = Status.INTERNAL


class PanicError(InternalError):
    """The plugin caught a fault of its own; only destroying it is of use now."""

    code = Status.PANIC


class PoisonedError(InternalError):
    """An earlier call ended in a `PanicError`."""

    code = Status.POISONED


_CLASSES: dict[Status, type[SamplerHookError]] = {
    cls.code: cls
    for cls in (
        InvalidArgumentError,
        InvalidStateError,
        BusyError,
        InvalidConfigError,
        UnsupportedError,
        NotFoundError,
        InvalidDataError,
        ShapeMismatchError,
        DtypeMismatchError,
        NonFiniteError,
        CancelledError,
        HostFailedError,
        OutOfMemoryError,
        InternalError,
        PanicError,
        PoisonedError,
    )
}


def error_of(code: int, message: str) -> SamplerHookError:
    """The exception for a status other than OK."""
    return _CLASSES[Status(code)](message or "the plugin gave no message")
