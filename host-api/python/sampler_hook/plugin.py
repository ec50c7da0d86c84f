"""Plugin instances."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from ctypes import byref, sizeof
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from . import _abi
from ._abi import sh_error, sh_needs, sh_plugin
from ._bridge import Bridge
from ._convert import Arena, device_of, read_string
from .errors import BusyError, InvalidStateError, UnsupportedError, error_of
from .host import Host
from .lora import Lora
from .params import Params
from .run import Run
from .types import Model, Needs, Text

if TYPE_CHECKING:
    from .library import Library

_Table = TypeVar("_Table", bound=ctypes.Structure)


class Plugin:
    """An instance of a plugin, made by `Library.create`; a context manager that destroys it.

    `prepare` fits it to a model, `run` starts a run. One call at a time: a second thread's raises `BusyError`, and so
    does `destroy` during another call. Parameters may be turned at any time.
    """

    def __init__(self, library: Library, id: str, address: int, bridge: Bridge) -> None:
        self.library = library
        self.id = id
        self._address: int | None = address
        self._bridge = bridge
        self._lock = threading.Lock()
        self._calls = 0
        self._table = ctypes.cast(address, ctypes.POINTER(sh_plugin)).contents
        _check_size(self._table, sh_plugin, id)
        self.params = Params(self, self._extension(_abi.SH_PLUGIN_PARAMS, _abi.sh_plugin_params))
        """Parameters by name; see `Params`."""
        self.lora = Lora(self, self._extension(_abi.SH_PLUGIN_LORA, _abi.sh_plugin_lora))
        """Low-rank weights that the plugin brings; see `Lora`."""
        self._split = self._extension(_abi.SH_PLUGIN_SPLIT, _abi.sh_plugin_split)

    def __repr__(self) -> str:
        return f"Plugin({self.id!r}, {self.library!r}{'' if self._address else ', destroyed'})"

    def __enter__(self) -> Plugin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    def __del__(self) -> None:
        if getattr(self, "_address", None) is not None:
            self.destroy()

    def destroy(self) -> None:
        """Ends the instance, whatever its state, and frees what it holds. Nothing when that was done before."""
        with self._lock:
            if self._calls:
                raise BusyError("the plugin cannot be destroyed during another call on it")
            address, self._address = self._address, None
        if address is not None:
            self._table.destroy(address)
            raised = self._bridge.take_raised()
            if raised is not None:
                raise raised

    @property
    def host(self) -> Host:
        """The host that it was created with."""
        return self._bridge.host

    @property
    def is_destroyed(self) -> bool:
        """Whether only `destroy` is left to call."""
        return self._address is None

    def prepare(self, model: Model, device: Any = "cpu") -> None:
        """Fits the plugin to a model and loads what it needs. `device` is where the latents will be: `"cpu"`,
        `"cuda:N"` or a `torch.device`. May be called again outside a run, after weights have changed.
        """
        arena = Arena()
        self.call(self._table.prepare, byref(arena.model(model)), device_of(device))

    @property
    def needs(self) -> Needs:
        """What runs and steps will ask of the host. From `prepare` on."""
        raw = sh_needs(struct_size=sizeof(sh_needs))
        self.call(self._table.needs, byref(raw))
        return Needs(
            gradient=bool(raw.flags & _abi.SH_NEEDS_GRADIENT),
            context=bool(raw.flags & _abi.SH_NEEDS_CONTEXT),
            pooled=bool(raw.flags & _abi.SH_NEEDS_POOLED),
            weights=bool(raw.flags & _abi.SH_NEEDS_WEIGHTS),
            tap=read_string(raw.tap),
        )

    def run(self, *, batch: int, steps: int, guidance_scale: float = 1.0, text: Text | None = None) -> Run:
        """Starts a run of `batch` items and `steps` steps of the whole schedule. End it with `Run.end`, or use it as a
        context manager. A batch of 0 is legal and makes every step a no-op.
        """
        arena = Arena()
        self.call(self._table.begin, byref(arena.run(batch, steps, guidance_scale, text)), undo=self._end)
        return Run(self, self._table, self._split, batch)

    def _end(self) -> None:
        self.call(self._table.end)

    @property
    def memory(self) -> int:
        """Bytes of weights that the instance holds now."""
        with self.entered() as address:
            return int(self._table.memory(address))

    @property
    def config_schema(self) -> dict[str, Any] | None:
        """JSON schema of the configuration; None where the plugin has none."""
        return self.params.schema

    # For the parts of an instance.

    @contextmanager
    def entered(self) -> Iterator[int]:
        """The instance's address for one call, during which it cannot be destroyed."""
        with self._lock:
            if self._address is None:
                raise InvalidStateError(f"the plugin {self.id!r} has been destroyed")
            self._calls += 1
            address = self._address
        try:
            yield address
        finally:
            with self._lock:
                self._calls -= 1

    def call(
        self, function: Any, *arguments: Any, undo: Callable[[], None] | None = None, concurrent: bool = False
    ) -> None:
        """Calls a function of the instance's and raises what it or a callback says.

        `undo` takes back a call that went well although a callback raised. A `concurrent` call leaves the exceptions of
        callbacks to the call that they belong to.
        """
        error = sh_error(struct_size=sizeof(sh_error))
        with self.entered() as address, nullcontext() if concurrent else self._bridge.interruptible():
            status = function(address, *arguments, byref(error))
        raised = None if concurrent or status == _abi.SH_BUSY else self._bridge.take_raised()
        if status != _abi.SH_OK and (raised is None or isinstance(raised, Exception)):
            raise error_of(status, error.message.decode("utf-8", "replace")) from raised
        if raised is not None:
            if status == _abi.SH_OK and undo is not None:
                undo()
            raise raised

    def _extension(self, id: str, table: type[_Table]) -> _Table | None:
        with self.entered() as address:
            found = self._table.extension(address, Arena().string(id))
        if not found:
            return None
        extension = ctypes.cast(found, ctypes.POINTER(table)).contents
        _check_size(extension, table, id)
        return extension


def _check_size(table: Any, known: type[ctypes.Structure], what: str) -> None:
    if table.struct_size < sizeof(known):
        raise UnsupportedError(f"{what}: the plugin's table has {table.struct_size} bytes, expected {sizeof(known)}")
