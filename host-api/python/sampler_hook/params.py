"""A plugin's parameters."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator, Mapping
from ctypes import byref, c_double, sizeof
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _abi
from ._abi import sh_param, sh_plugin_params
from ._convert import read_string
from .errors import InvalidArgumentError

if TYPE_CHECKING:
    from .plugin import Plugin

ParamValue = float | int | bool | str


class ParamKind(enum.IntEnum):
    """What values a parameter takes."""

    FLOAT = _abi.SH_PARAM_FLOAT
    INTEGER = _abi.SH_PARAM_INTEGER
    BOOLEAN = _abi.SH_PARAM_BOOLEAN
    CHOICE = _abi.SH_PARAM_CHOICE


@dataclass(frozen=True)
class ParamInfo:
    """What a user interface needs to know of a parameter."""

    name: str
    """The key in the configuration."""
    kind: ParamKind
    description: str
    unit: str
    """Empty when it has none."""
    minimum: float
    maximum: float
    default: ParamValue
    live: bool
    """Whether it may change during a run; others only before `prepare`."""
    choices: tuple[str, ...]
    """Empty unless the kind is `CHOICE`."""

    def decode(self, value: float) -> ParamValue:
        """The interface's number as a value: a bool, an int, or a choice's name where it is one."""
        if self.kind == ParamKind.CHOICE:
            return self.choices[int(value)]
        if self.kind == ParamKind.BOOLEAN:
            return value != 0
        return int(value) if self.kind == ParamKind.INTEGER else float(value)

    def encode(self, value: ParamValue) -> float:
        """The number for a value."""
        if not isinstance(value, str):
            return float(value)
        if value not in self.choices:
            expected = f"one of {', '.join(self.choices)}" if self.choices else "a number"
            raise InvalidArgumentError(f"{self.name} is {value!r}, expected {expected}")
        return float(self.choices.index(value))


class Params(Mapping[str, ParamValue]):
    """Parameters by name: read, and set by assignment, which takes effect at the next step. On any thread at any time.

    Unknown names raise `KeyError`, values out of range `InvalidArgumentError`. Empty when the plugin has no parameters.
    """

    def __init__(self, plugin: Plugin, table: sh_plugin_params | None) -> None:
        self._plugin = plugin
        self._table: Any = table
        self._infos: dict[str, tuple[int, ParamInfo]] = {}
        if table is None:
            return
        with plugin.entered() as address:
            count = table.count(address)
        for index in range(count):
            raw = sh_param(struct_size=sizeof(sh_param))
            plugin.call(table.info, index, byref(raw))
            info = _read(raw)
            self._infos[info.name] = (index, info)

    def info(self, name: str) -> ParamInfo:
        """Kind, range, default and more of a parameter."""
        return self._infos[name][1]

    def __getitem__(self, name: str) -> ParamValue:
        index, info = self._infos[name]
        value = c_double()
        self._plugin.call(self._table.get, index, byref(value), concurrent=True)
        return info.decode(value.value)

    def __setitem__(self, name: str, value: ParamValue) -> None:
        index, info = self._infos[name]
        self._plugin.call(self._table.set, index, info.encode(value), concurrent=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __repr__(self) -> str:
        return f"Params({dict(self)})"

    @property
    def schema(self) -> dict[str, Any] | None:
        """JSON schema of the configuration that `Library.create` takes."""
        if self._table is None:
            return None
        with self._plugin.entered() as address:
            schema: dict[str, Any] = json.loads(read_string(self._table.schema(address)))
        return schema


def _read(raw: sh_param) -> ParamInfo:
    kind, choices = ParamKind(raw.kind), tuple(read_string(raw.choices[i]) for i in range(raw.choice_count))
    name, description, unit = (read_string(text) for text in (raw.name, raw.description, raw.unit))
    live = bool(raw.flags & _abi.SH_PARAM_LIVE)
    info = ParamInfo(name, kind, description, unit, raw.minimum, raw.maximum, raw.default_value, live, choices)
    return ParamInfo(**{**vars(info), "default": info.decode(raw.default_value)})
