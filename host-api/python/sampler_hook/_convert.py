"""Python's data as C structs for the time of a call, and C structs as Python's data."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_double, c_int64, c_void_p, pointer, sizeof
from typing import Any

from . import _abi
from ._abi import sh_model, sh_report, sh_run, sh_step, sh_string, sh_text
from .errors import InvalidArgumentError, Status
from .tensor import Borrowed, Tensor, borrow
from .types import ItemReport, Model, Outcome, Report, Step, Text

_PREDICTIONS = {"epsilon": _abi.SH_PREDICTION_EPSILON, "v": _abi.SH_PREDICTION_V, "flow": _abi.SH_PREDICTION_FLOW}
_SPACES = {"vp": _abi.SH_SPACE_VP, "ve": _abi.SH_SPACE_VE}


def read_string(string: sh_string) -> str:
    """A copy; what is not UTF-8 is replaced."""
    return ctypes.string_at(string.data, string.size).decode("utf-8", "replace") if string.size else ""


def device_of(device: Any) -> _abi.DLDevice:
    """`"cpu"`, `"cuda"` or `"cuda:N"`, or what prints like one of them, as `torch.device` does."""
    kind, _, number = str(device).partition(":")
    if kind == "cpu" and number in ("", "0"):
        return _abi.DLDevice(_abi.SH_DEVICE_CPU, 0)
    if kind == "cuda" and (not number or number.isdecimal()):
        return _abi.DLDevice(_abi.SH_DEVICE_CUDA, int(number or 0))
    raise InvalidArgumentError(f"device {str(device)!r}: expected cpu, cuda or cuda:N")


class Arena:
    """C structs for one call, and everything that they point to."""

    def __init__(self, stream: int | None = None) -> None:
        self._kept: list[object] = []
        self._stream = stream

    def _keep(self, value: Any) -> Any:
        self._kept.append(value)
        return value

    def string(self, text: str) -> sh_string:
        """UTF-8 with a length."""
        data = self._keep(text.encode())
        return sh_string(ctypes.cast(c_char_p(data), c_void_p), len(data))

    def tensor(self, value: Any, what: str, *, write: bool = False) -> Borrowed:
        """A tensor's memory, borrowed."""
        borrowed: Borrowed = self._keep(borrow(value, what, write=write, stream=self._stream))
        return borrowed

    def model(self, model: Model) -> sh_model:
        """The model with its schedule and configuration."""
        values = getattr(model.alphas_cumprod, "tolist", lambda: list(model.alphas_cumprod))()
        alphas = self._keep((c_double * len(values))(*values))
        config = "" if model.unet_config is None else json.dumps(dict(model.unet_config))
        return sh_model(
            struct_size=sizeof(sh_model),
            prediction=_one_of(_PREDICTIONS, model.prediction, "prediction"),
            family=self.string(model.family),
            unet_in_channels=_unsigned(model.unet_in_channels, "unet_in_channels"),
            latent_channels=_unsigned(model.latent_channels, "latent_channels"),
            alphas_cumprod=ctypes.cast(alphas, POINTER(c_double)),
            alphas_cumprod_count=len(values),
            unet_config=self.string(config),
        )

    def text(self, text: Text | None, batch: int) -> Any:
        """A pointer to the text of `batch` items, or None."""
        if text is None:
            return None
        raw = self._keep(sh_text(struct_size=sizeof(sh_text)))
        if text.context is not None:
            raw.context = self.tensor(text.context, "text.context").pointer
        if text.pooled is not None:
            raw.pooled = self.tensor(text.pooled, "text.pooled").pointer
        if text.end_of_text is not None:
            positions = [int(position) for position in text.end_of_text]
            _expect_batch("text.end_of_text", len(positions), batch)
            raw.end_of_text = ctypes.cast(self._keep((c_int64 * batch)(*positions)), POINTER(c_int64))
        if text.prompts is not None:
            if isinstance(text.prompts, str):
                raise InvalidArgumentError("text.prompts is one string, expected a list of one per item")
            _expect_batch("text.prompts", len(text.prompts), batch)
            prompts = self._keep((sh_string * batch)(*(self.string(prompt) for prompt in text.prompts)))
            raw.prompts = ctypes.cast(prompts, POINTER(sh_string))
        return pointer(raw)

    def run(self, batch: int, steps: int, guidance_scale: float, text: Text | None) -> sh_run:
        """A run."""
        return sh_run(
            struct_size=sizeof(sh_run),
            batch=_unsigned(batch, "batch"),
            steps=_unsigned(steps, "steps"),
            guidance_scale=float(guidance_scale),
            text=self.text(text, batch),
        )

    def step(self, step: Step, batch: int) -> sh_step:
        """A step of a run of `batch` items."""
        return sh_step(
            struct_size=sizeof(sh_step),
            index=_unsigned(step.index, "step.index"),
            count=_unsigned(step.count, "step.count"),
            sub_evaluation=_unsigned(step.sub_evaluation, "step.sub_evaluation"),
            timestep=float(step.timestep),
            alpha_bar=float(step.alpha_bar),
            space=_one_of(_SPACES, step.space, "step.space"),
            flags=_abi.SH_STEP_EXTRA_INPUTS if step.extra_inputs else 0,
            text=self.text(step.text, batch),
        )

    def report(self, batch: int) -> sh_report:
        """Room for what the plugin reports of `batch` items."""
        items = self._keep((_abi.sh_item_report * batch)())
        return sh_report(
            struct_size=sizeof(sh_report),
            item_size=sizeof(_abi.sh_item_report),
            items=ctypes.cast(items, POINTER(_abi.sh_item_report)),
            item_count=batch,
        )


def _one_of(known: dict[str, int], name: str, what: str) -> int:
    try:
        return known[name]
    except (KeyError, TypeError):
        raise InvalidArgumentError(f"{what} is {name!r}, expected one of {', '.join(known)}") from None


def _unsigned(value: int, what: str) -> int:
    if not 0 <= value < 2**32:
        raise InvalidArgumentError(f"{what} is {value}, expected 0 to {2**32 - 1}")
    return int(value)


def _expect_batch(what: str, found: int, batch: int) -> None:
    if found != batch:
        raise InvalidArgumentError(f"{what} has {found} entries for a batch of {batch}")


def read_report(raw: sh_report) -> Report:
    """What the plugin reports."""
    items = (raw.items[index] for index in range(raw.item_count))
    return Report(
        outcome=Outcome(raw.outcome),
        seconds=raw.seconds,
        items=tuple(
            ItemReport(Status(item.status), item.score, item.gradient_norm, item.correction_norm) for item in items
        ),
    )


def read_step(raw: sh_step, batch: int, is_lent: Callable[[], bool]) -> Step:
    """A step as the plugin passes it on, with its text, if it has one of its own."""
    return Step(
        index=raw.index,
        count=raw.count,
        timestep=raw.timestep,
        alpha_bar=raw.alpha_bar,
        space="ve" if raw.space == _abi.SH_SPACE_VE else "vp",
        sub_evaluation=raw.sub_evaluation,
        extra_inputs=bool(raw.flags & _abi.SH_STEP_EXTRA_INPUTS),
        text=read_text(raw.text.contents, batch, is_lent) if raw.text else None,
    )


def read_text(raw: sh_text, batch: int, is_lent: Callable[[], bool]) -> Text:
    """The text of `batch` items."""

    def tensor(view: Any) -> Tensor | None:
        return Tensor(view.contents, is_lent) if view else None

    return Text(
        context=tensor(raw.context),
        pooled=tensor(raw.pooled),
        end_of_text=[raw.end_of_text[item] for item in range(batch)] if raw.end_of_text else None,
        prompts=[read_string(raw.prompts[item]) for item in range(batch)] if raw.prompts else None,
    )
