"""Nodes as plain data, from which both of ComfyUI's node definitions are made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Field:
    """An input."""

    name: str
    type: str
    """`FLOAT`, `INT`, `BOOLEAN`, `STRING`, `COMBO`, or the type of a socket."""
    tooltip: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Default, min, max and the like."""
    choices: Callable[[], list[str]] | None = None
    """Of a `COMBO`, asked for whenever the definition is."""


@dataclass(frozen=True)
class Node:
    """A node. `run` takes the inputs by name and returns the outputs."""

    id: str
    name: str
    description: str
    inputs: tuple[Field, ...]
    outputs: tuple[tuple[str, str], ...]
    """Type and name of each."""
    run: Callable[..., tuple]
    fingerprint: Callable[..., Any] | None = None
    """Something that differs when the node must run again although its inputs are the same."""
    category: str = "DPT"


def choices(*names: str) -> Callable[[], list[str]]:
    """Choices that are always the same."""
    return lambda: list(names)
