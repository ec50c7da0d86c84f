"""Plugin libraries."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Mapping
from ctypes import byref, c_void_p
from pathlib import Path
from typing import Any

from . import _abi
from ._abi import sh_entry, sh_error
from ._bridge import Bridge
from ._convert import Arena, device_of, read_string
from .errors import InvalidDataError, NotFoundError, UnsupportedError, error_of
from .host import Host, logger
from .plugin import Plugin
from .types import Descriptor

LIBRARY_VARIABLE = "SAMPLER_HOOK_LIBRARY"
"""The environment variable that names a library to use in place of the one that came with this package."""
CUDA_LIBRARY_VARIABLE = "SAMPLER_HOOK_CUDA_LIBRARY"
"""The same for the library that computes on CUDA."""
_DRAFTS = ((0, 2), (0, 3))


def _file_name(stem: str) -> str:
    if sys.platform == "win32":
        return f"{stem}.dll"
    return f"lib{stem}.dylib" if sys.platform == "darwin" else f"lib{stem}.so"


class Library:
    """A plugin library. It is never unloaded, since it may own threads."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Loads the library at `path` through its one exported symbol."""
        self.path = Path(path)
        if not self.path.is_file():
            raise NotFoundError(f"no library at {self.path}")
        try:
            self._library = ctypes.CDLL(str(self.path.absolute()))
            entry_of = _abi.entry_fn((_abi.SH_ENTRY_SYMBOL, self._library))
        except (OSError, AttributeError) as error:
            raise InvalidDataError(f"{self.path} is no plugin library: {error}") from error
        entry = entry_of(_abi.SH_ABI_MAJOR)
        if not entry:
            raise UnsupportedError(f"{self.path} does not speak version {_abi.SH_ABI_MAJOR} of the interface")
        self._entry: sh_entry = entry.contents
        major, minor = self.abi
        # Drafts promise nothing to each other; from 1.0 on a major's minors only add to it.
        spoken = self.abi in _DRAFTS if major == 0 else major == _abi.SH_ABI_MAJOR
        if not spoken or self._entry.struct_size < ctypes.sizeof(sh_entry):
            own = f"{_abi.SH_ABI_MAJOR}.{_abi.SH_ABI_MINOR}"
            raise UnsupportedError(f"{self.path} speaks interface {major}.{minor}, this package {own}")
        self.descriptors: tuple[Descriptor, ...] = tuple(map(self._descriptor, range(self._entry.plugin_count)))
        """The plugins of the library."""

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None = None, device: Any = None) -> Library:
        """Loads a library: the one at `path`; None: the one that the environment names, else the one in this package.

        For a CUDA `device` (`"cuda:0"`, a `torch.device`) the CUDA build is tried first; where there is none, or it
        does not load, a warning says so and the CPU build is taken.
        """
        if path is not None:
            return cls(path)
        wants_cuda = device is not None and device_of(device).device_type == _abi.SH_DEVICE_CUDA
        if wants_cuda:
            try:
                return cls(_default(CUDA_LIBRARY_VARIABLE, "dpt_cuda"))
            except (NotFoundError, InvalidDataError, UnsupportedError) as error:
                logger.warning("the plugin will compute on the CPU, though %s was asked for: %s", device, error)
        return cls(_default(LIBRARY_VARIABLE, "dpt"))

    def __repr__(self) -> str:
        return f"Library({str(self.path)!r})"

    @property
    def abi(self) -> tuple[int, int]:
        """Version of the interface that the library speaks."""
        return self._entry.abi_major, self._entry.abi_minor

    def create(self, id: str, config: Mapping[str, Any] | None = None, host: Host | None = None) -> Plugin:
        """An instance of the plugin `id` with a configuration, for a host. Paths may be `Path`s.

        Fails with `InvalidConfigError`, with `NotFoundError` where the id or a file that the configuration names is
        missing, and with `InvalidDataError` where a file does not hold what it should.
        """
        arena, error = Arena(), sh_error(struct_size=ctypes.sizeof(sh_error))
        text = "" if config is None else json.dumps(dict(config), default=_json_of)
        bridge, pointer = Bridge(host if host is not None else Host(), self.abi), c_void_p()
        strings = arena.string(id), arena.string(text)
        with bridge.interruptible():
            status = self._entry.create(strings[0], byref(bridge.table), strings[1], byref(pointer), byref(error))
        raised = bridge.take_raised()
        if status != _abi.SH_OK:
            failure = error_of(status, error.message.decode("utf-8", "replace"))
            if raised is not None and not isinstance(raised, Exception):
                raise raised
            raise failure from raised
        assert pointer.value is not None, "the library says OK and gives no plugin"
        plugin = Plugin(self, id, pointer.value, bridge)
        if raised is not None:
            plugin.destroy()
            raise raised
        return plugin

    def _descriptor(self, index: int) -> Descriptor:
        raw = self._entry.descriptor(index)
        if not raw:
            raise InvalidDataError(f"{self.path} has no descriptor {index} of {self._entry.plugin_count}")
        names = ("id", "name", "version", "vendor", "description")
        return Descriptor(**{name: read_string(getattr(raw.contents, name)) for name in names})


def _json_of(value: object) -> object:
    """What JSON has no word for: paths."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"the configuration holds {value!r}, which JSON cannot say")


def _default(variable: str, stem: str) -> Path:
    named = os.environ.get(variable)
    if named:
        return Path(named)
    bundled = Path(__file__).parent / "lib" / _file_name(stem)
    if not bundled.is_file():
        raise NotFoundError(f"this package came without {bundled.name}: set {variable} to the path of a built library")
    return bundled
