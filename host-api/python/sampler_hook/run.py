"""Runs of a plugin."""

from __future__ import annotations

from contextlib import suppress
from ctypes import byref
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ._abi import sh_plugin, sh_plugin_split
from ._convert import Arena, read_report
from .errors import SamplerHookError, UnsupportedError
from .tensor import SupportsDLPack, increment_version
from .types import Report, Step

if TYPE_CHECKING:
    from .plugin import Plugin


class Run:
    """A run in progress, started by `Plugin.run`; a context manager that ends it.

    Tensors are read and written where they are, whatever their strides: f32, f16 or bf16, from anything that speaks
    DLPack. A call that fails leaves them as they were, and the host may sample on without correction.

    `stream`, on CUDA, is the pointer of the stream on which tensors are ready and results are expected; None: PyTorch's
    current stream for its tensors, else the legacy default stream.
    """

    def __init__(self, plugin: Plugin, table: sh_plugin, split: sh_plugin_split | None, batch: int) -> None:
        self.plugin = plugin
        self.batch = batch
        """Items of the batch."""
        self._table = table
        self._split = split
        self._ended = False

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
            return
        with suppress(SamplerHookError):  # what went wrong in the run is what the caller should see
            self.end()

    def end(self) -> None:
        """Ends the run, finished or not. Nothing when it was ended before, or the plugin destroyed."""
        if not self._ended and not self.plugin.is_destroyed:
            self.plugin.call(self._table.end)
        self._ended = True

    def step(
        self, step: Step, latents: SupportsDLPack, out: SupportsDLPack | None = None, *, stream: int | None = None
    ) -> Report:
        """Corrects latents [B, C, h, w] before a noise prediction: in place, or into `out`, of the same shape, dtype
        and device.

        When the outcome is not `CORRECTED`, `out` holds the input bit for bit. An item that is not finite is left as it
        was, with its own status; when no item could be corrected, the call fails.
        """
        arena = Arena(stream)
        source = arena.tensor(latents, "latents", write=out is None)
        target = source if out is None else arena.tensor(out, "out", write=True)
        report = arena.report(self.batch)
        arguments = (byref(arena.step(step, self.batch)), source.pointer, target.pointer, byref(report))
        self.plugin.call(self._table.step, *arguments)
        increment_version(latents if out is None else out)
        return read_report(report)

    def score(
        self,
        step: Step,
        activation: SupportsDLPack | None = None,
        cotangent: SupportsDLPack | None = None,
        *,
        stream: int | None = None,
    ) -> Report:
        """The first half of a step, for hosts with an autograd of their own (`sampler-hook.split/1`).

        `activation` [B, C, h, w] is the output of the block that `Plugin.needs` names, for the latents in VP space with
        the conditional text; None asks for the outcome alone. Writes the gradient of each item's score for its features
        to `cotangent`, of the same shape, when the outcome is `CORRECTED`.
        """
        arena = Arena(stream)
        features = None if activation is None else arena.tensor(activation, "activation").pointer
        slope = None if cotangent is None else arena.tensor(cotangent, "cotangent", write=True).pointer
        report = arena.report(self.batch)
        self.plugin.call(self._halves().score, byref(arena.step(step, self.batch)), features, slope, byref(report))
        increment_version(cotangent)
        return read_report(report)

    def apply(
        self,
        step: Step,
        latents: SupportsDLPack,
        gradient: SupportsDLPack,
        out: SupportsDLPack | None = None,
        *,
        stream: int | None = None,
    ) -> Report:
        """The second half: as `step`, with the gradient [B, C, h, w] of the scores for the latents in VP space,
        whatever the step's space is. The report has no scores.
        """
        arena = Arena(stream)
        source = arena.tensor(latents, "latents", write=out is None)
        target = source if out is None else arena.tensor(out, "out", write=True)
        slope = arena.tensor(gradient, "gradient")
        report = arena.report(self.batch)
        arguments = (source.pointer, slope.pointer, target.pointer, byref(report))
        self.plugin.call(self._halves().apply, byref(arena.step(step, self.batch)), *arguments)
        increment_version(latents if out is None else out)
        return read_report(report)

    def _halves(self) -> Any:
        if self._split is None:
            raise UnsupportedError(f"the plugin {self.plugin.id!r} has no sampler-hook.split/1")
        return self._split
