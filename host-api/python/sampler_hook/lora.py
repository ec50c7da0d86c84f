"""Low-rank weights that a plugin brings."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from ctypes import byref, sizeof
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

from . import _abi
from ._abi import sh_lora_entry, sh_plugin_lora
from ._convert import Arena, read_string
from .errors import InvalidArgumentError, UnsupportedError
from .tensor import SupportsDLPack, Tensor, increment_version

if TYPE_CHECKING:
    from .plugin import Plugin

Layout = Literal["peft", "kohya"]
_LAYOUTS = {"peft": _abi.SH_LORA_PEFT, "kohya": _abi.SH_LORA_KOHYA}


@dataclass(frozen=True)
class LoraEntry:
    """One projection's low-rank weights: W + strength * scale * up @ down."""

    module: str
    """Diffusers path: `"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"`."""
    rank: int
    scale: float
    """alpha / rank, or 1."""
    down: Tensor
    """[rank, in], f32, on the CPU; readable until the plugin is destroyed."""
    up: Tensor
    """[out, rank], likewise."""


class Lora(Sequence[LoraEntry]):
    """The entries of a plugin's LoRA; empty when it brings none.

    The host merges them into its own model when a run begins and takes them out from a kept copy when it ends.
    """

    def __init__(self, plugin: Plugin, table: sh_plugin_lora | None) -> None:
        self._plugin = plugin
        self._table: Any = table

    def __len__(self) -> int:
        if self._table is None:
            return 0
        with self._plugin.entered() as address:
            return int(self._table.count(address))

    @overload
    def __getitem__(self, index: int) -> LoraEntry: ...

    @overload
    def __getitem__(self, index: slice) -> list[LoraEntry]: ...

    def __getitem__(self, index: int | slice) -> LoraEntry | list[LoraEntry]:
        if isinstance(index, slice):
            return [self._entry(position) for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"LoRA entry {index} of {len(self)}")
        return self._entry(position)

    def __iter__(self) -> Iterator[LoraEntry]:
        return map(self._entry, range(len(self)))

    @property
    def entries(self) -> tuple[LoraEntry, ...]:
        """All of them."""
        return tuple(self)

    def merge(self, index: int, strength: float, weight: SupportsDLPack) -> None:
        """Adds strength * scale * up @ down of an entry to `weight` [out, in] in place; summed in f32 and rounded once.
        Keep a copy: subtracting does not restore the bits.
        """
        arena = Arena()
        target = arena.tensor(weight, "weight", write=True)
        self._plugin.call(self._extension().merge, index, float(strength), target.pointer)
        increment_version(weight)

    def write(self, path: str | os.PathLike[str], layout: Layout = "peft") -> None:
        """Writes all entries as a safetensors file, which appears whole or not at all, in PEFT's layout, as
        `pipe.load_lora_weights` takes it, or kohya's.
        """
        if layout not in _LAYOUTS:
            raise InvalidArgumentError(f"layout {layout!r}, expected one of {', '.join(_LAYOUTS)}")
        self._plugin.call(self._extension().write, Arena().string(os.fspath(path)), _LAYOUTS[layout])

    def _entry(self, index: int) -> LoraEntry:
        raw = sh_lora_entry(struct_size=sizeof(sh_lora_entry))
        self._plugin.call(self._extension().entry, index, byref(raw))

        def is_lent() -> bool:
            return not self._plugin.is_destroyed

        down, up = (Tensor(factor.contents, is_lent) for factor in (raw.down, raw.up))
        return LoraEntry(read_string(raw.module), raw.rank, raw.scale, down, up)

    def _extension(self) -> Any:
        if self._table is None:
            raise UnsupportedError(f"the plugin {self._plugin.id!r} has no sampler-hook.lora/1")
        return self._table
