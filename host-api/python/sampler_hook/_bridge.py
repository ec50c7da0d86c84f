"""A `Host` as the C interface sees it: tables of callbacks, and what becomes of exceptions in them."""

from __future__ import annotations

import ctypes
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import sizeof
from typing import Any

from . import _abi
from ._abi import sh_string, sh_view
from ._convert import Arena, read_step, read_string
from .errors import InvalidArgumentError, SamplerHookError, Status
from .host import Gradient, Host, Weights, logger
from .tensor import Borrowed, Tensor, assign, borrow

_LEVELS = {
    _abi.SH_LOG_ERROR: logging.ERROR,
    _abi.SH_LOG_WARN: logging.WARNING,
    _abi.SH_LOG_INFO: logging.INFO,
    _abi.SH_LOG_DEBUG: logging.DEBUG,
    _abi.SH_LOG_TRACE: 5,
}

# Before, weights/1 returned strings by value, which callbacks of ctypes cannot.
_WEIGHTS_FROM = (0, 3)


def fill_error(pointer: Any, code: int, message: str) -> None:
    """Fills an `sh_error` of the other side, cut at a character."""
    if not pointer:
        return
    pointer.contents.code = code
    data = message.encode("utf-8", "replace").replace(b"\0", b" ")
    data = data[: _abi.SH_ERROR_MESSAGE_SIZE - 1].decode("utf-8", "ignore").encode()
    pointer.contents.message = data


class Bridge:
    """The tables for one plugin. They and all that they point to live as long as this object."""

    def __init__(self, host: Host, abi: tuple[int, int]) -> None:
        self.host = host
        self._arena = Arena()
        self._raised: BaseException | None = None
        self._lock = threading.Lock()
        self._extensions: dict[str, ctypes.Structure] = {}
        self.table = _abi.sh_host(
            struct_size=sizeof(_abi.sh_host),
            name=self._arena.string(host.name),
            version=self._arena.string(host.version),
            log=_abi.host_log_fn(self._log),
            cancelled=_abi.host_cancelled_fn(self._cancelled),
            extension=_abi.extension_fn(self._extension),
        )
        progress_fn = _abi.functions(_abi.sh_host_progress)["progress"]
        self._extensions[_abi.SH_HOST_PROGRESS] = _abi.sh_host_progress(
            struct_size=sizeof(_abi.sh_host_progress), progress=progress_fn(self._progress)
        )
        if host.gradient is not None:
            self._extensions[_abi.SH_HOST_GRADIENT] = _GradientTable(host.gradient, self._caught).table
        if host.weights is not None:
            if abi < _WEIGHTS_FROM:
                message = "the library speaks interface %d.%d, whose weights/1 Python cannot offer: no weights are lent"
                logger.warning(message, *abi)
            else:
                self._extensions[_abi.SH_HOST_WEIGHTS] = _WeightsTable(host.weights, self._caught).table

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Makes of Ctrl-C an exception that a callback raised: the call stops at its next look at `cancelled`.

        Python's own handler raises wherever the interpreter is, which may be where a callback begins: nobody would see
        it there.
        """
        on_main = threading.current_thread() is threading.main_thread()
        if not on_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, lambda _number, _frame: self._caught(KeyboardInterrupt()))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    # What callbacks raise is kept for the call in progress.

    def take_raised(self) -> BaseException | None:
        """The first exception since this was last asked."""
        with self._lock:
            raised, self._raised = self._raised, None
        return raised

    def _caught(self, error: BaseException) -> None:
        with self._lock:
            if self._raised is None:
                self._raised = error
            else:
                logger.debug("another exception in a callback", exc_info=error)

    def _log(self, _host: int, level: int, message: sh_string) -> None:
        try:
            self.host.log(_LEVELS.get(level, logging.INFO), read_string(message))
        except BaseException as error:
            self._caught(error)

    def _cancelled(self, _host: int) -> int:
        try:
            return int(self._raised is not None or bool(self.host.cancelled()))
        except BaseException as error:
            self._caught(error)
            return 1

    def _progress(self, _host: int, task: sh_string, done: int, total: int) -> None:
        try:
            self.host.progress(read_string(task), done, total)
        except BaseException as error:
            self._caught(error)

    def _extension(self, _host: int, id: sh_string) -> int | None:
        table = self._extensions.get(read_string(id))
        return None if table is None else ctypes.addressof(table)


class _Lender:
    """Callbacks that may fail: an exception becomes a status and is kept for the caller."""

    def __init__(self, caught: Callable[[BaseException], None]) -> None:
        self._caught = caught

    def _guarded(self, error: Any, call: Callable[[], None]) -> int:
        try:
            call()
        except BaseException as raised:
            self._caught(raised)
            if isinstance(raised, SamplerHookError):
                code = raised.code
            else:
                code = Status.HOST_FAILED if isinstance(raised, Exception) else Status.CANCELLED
            fill_error(error, code, f"{type(raised).__name__}: {raised}")
            return int(code)
        return _abi.SH_OK


@contextmanager
def _lease() -> Iterator[Callable[[], bool]]:
    """Whether what is lent to a callback still is."""
    lent = True
    try:
        yield lambda: lent
    finally:
        lent = False


class _GradientTable(_Lender):
    def __init__(self, gradient: Gradient, caught: Callable[[BaseException], None]) -> None:
        super().__init__(caught)
        self._gradient = gradient
        self._activation: Borrowed | None = None
        functions = _abi.functions(_abi.sh_host_gradient)
        self.table = _abi.sh_host_gradient(
            struct_size=sizeof(_abi.sh_host_gradient),
            features=functions["features"](self._features),
            vjp=functions["vjp"](self._vjp),
            release=functions["release"](self._release),
        )

    def _features(self, _host: int, step: Any, latents: Any, tap: sh_string, activation: Any, error: Any) -> int:
        def call() -> None:
            with _lease() as is_lent:
                given = Tensor(latents.contents, is_lent)
                called = read_step(step.contents, given.shape[0] if given.shape else 0, is_lent)
                found = self._gradient.features(called, given, read_string(tap))
            self._activation = borrow(found, "features")
            _fill_view(activation, self._activation.view)

        return self._guarded(error, call)

    def _vjp(self, _host: int, cotangent: Any, gradient: Any, error: Any) -> int:
        def call() -> None:
            self._activation = None
            with _lease() as is_lent:
                found = self._gradient.vjp(Tensor(cotangent.contents, is_lent))
            assign(gradient.contents, found, "vjp")

        return self._guarded(error, call)

    def _release(self, _host: int) -> None:
        self._activation = None
        try:
            self._gradient.release()
        except BaseException as error:
            self._caught(error)


class _WeightsTable(_Lender):
    def __init__(self, weights: Weights, caught: Callable[[BaseException], None]) -> None:
        super().__init__(caught)
        self._weights = weights
        self._arena = Arena()
        self._names: list[str] = []
        self._strings: dict[str, sh_string] = {}
        self._lent: Borrowed | None = None
        functions = _abi.functions(_abi.sh_host_weights)
        self.table = _abi.sh_host_weights(
            struct_size=sizeof(_abi.sh_host_weights),
            revision=functions["revision"](self._revision),
            count=functions["count"](self._count),
            name=functions["name"](self._name),
            tensor=functions["tensor"](self._tensor),
        )

    def _revision(self, _host: int) -> int:
        try:
            return int(self._weights.revision()) % 2**64
        except BaseException as error:
            self._caught(error)
            return 0

    def _count(self, _host: int) -> int:
        try:
            self._names = [str(name) for name in self._weights.names]
        except BaseException as error:
            self._caught(error)
            self._names = []
        return len(self._names)

    def _name(self, _host: int, index: int, name: Any, error: Any) -> int:
        def call() -> None:
            known = self._name_at(index)
            if known not in self._strings:
                self._strings[known] = self._arena.string(known)
            name[0] = self._strings[known]

        return self._guarded(error, call)

    def _tensor(self, _host: int, index: int, tensor: Any, revision: Any, error: Any) -> int:
        def call() -> None:
            name = self._name_at(index)
            self._lent = None
            revision[0] = int(self._weights.tensor_revision(name)) % 2**64
            if tensor:
                self._lent = borrow(self._weights.tensor(name), name)
                _fill_view(tensor, self._lent.view)

        return self._guarded(error, call)

    def _name_at(self, index: int) -> str:
        if index >= len(self._names):
            raise InvalidArgumentError(f"tensor {index} of {len(self._names)}")
        return self._names[index]


def _fill_view(target: Any, view: sh_view) -> None:
    """Writes a view for the other side, which has set its struct_size."""
    target.contents.flags = view.flags
    target.contents.tensor = view.tensor
    target.contents.stream = view.stream
