"""What host and plugin tell each other: plain data."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from . import _abi
from .errors import Status
from .tensor import SupportsDLPack

Prediction = Literal["epsilon", "v", "flow"]
Space = Literal["vp", "ve"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The diffusion model in use."""

    prediction: Prediction
    """What the U-Net predicts."""
    family: str
    """`"sd1"`, `"sd2"` or another name."""
    alphas_cumprod: Iterable[float]
    """Cumulative alphas by training timestep; a tensor will do."""
    unet_in_channels: int = 4
    """9 for inpainting models."""
    latent_channels: int = 4
    unet_config: Mapping[str, Any] | None = None
    """The U-Net's `config.json` in diffusers' terms, where the host knows it."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """The conditional text of each item of a batch of B. Hooks never see the unconditional half of the guidance."""

    context: SupportsDLPack | None = None
    """[B, S, D]: the text encoder's last hidden state, after the final layer norm."""
    pooled: SupportsDLPack | None = None
    """[B, D]: that state at the end-of-text token, no projection."""
    end_of_text: Iterable[int] | None = None
    """B positions in the first chunk of S; instead of `pooled`."""
    prompts: Sequence[str] | None = None
    """B prompts."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One noise prediction of a run."""

    index: int
    """0 .. count - 1; a run that starts within the schedule (from a noised image) begins above 0."""
    count: int
    """Steps of the whole schedule, as in the run."""
    timestep: float
    """Training timestep, may be fractional."""
    alpha_bar: float
    """Cumulative alpha at that timestep, in [0, 1]; in `"ve"` above 0."""
    space: Space = "vp"
    """`"vp"`: latents are z, variance-preserving; `"ve"`: x = z / sqrt(alpha_bar), k-diffusion's sigma space."""
    sub_evaluation: int = 0
    """0 for the first noise prediction of the step, 1, 2, ... for those that samplers add."""
    extra_inputs: bool = False
    """The host adds inputs to the U-Net that a plugin's own U-Net cannot see (ControlNet, IP-Adapter, ...)."""
    text: Text | None = None
    """Replaces the run's text for this step; None: the run's."""


@dataclass(frozen=True)
class Needs:
    """What a plugin will ask of the host."""

    gradient: bool
    """`Host.gradient`."""
    context: bool
    """`Text.context`."""
    pooled: bool
    """`Text.pooled`, or `context` and `end_of_text`."""
    weights: bool
    """`Host.weights`."""
    tap: str
    """The U-Net block whose output is used: `"mid"`, `"up1"`, ..."""


class Outcome(enum.IntEnum):
    """Whether a step was corrected, or why not."""

    CORRECTED = _abi.SH_CORRECTED
    SKIPPED_STRENGTH = _abi.SH_SKIPPED_STRENGTH
    SKIPPED_RANGE = _abi.SH_SKIPPED_RANGE
    SKIPPED_INTERVAL = _abi.SH_SKIPPED_INTERVAL
    SKIPPED_SUB_EVALUATION = _abi.SH_SKIPPED_SUB_EVALUATION
    SKIPPED_EMPTY = _abi.SH_SKIPPED_EMPTY
    SKIPPED_OTHER = -1
    """For a reason that this version does not know."""

    @classmethod
    def _missing_(cls, value: object) -> Outcome:
        return cls.SKIPPED_OTHER


@dataclass(frozen=True)
class ItemReport:
    """What happened to one item of the batch."""

    status: Status
    """`OK`, or why this item was left as it was."""
    score: float
    """Before the correction; NaN when it was not computed."""
    gradient_norm: float
    """L2 norm of the score's gradient over the item's latents (VP); NaN when it was not computed."""
    correction_norm: float
    """L2 norm of what was added to the item's latents (VP); 0 when nothing was."""


@dataclass(frozen=True)
class Report:
    """What a step did."""

    outcome: Outcome
    seconds: float
    """Spent in the plugin, callbacks included."""
    items: tuple[ItemReport, ...]
    """One per item of the batch."""


@dataclass(frozen=True)
class Descriptor:
    """One plugin of a library."""

    id: str
    name: str
    version: str
    vendor: str
    description: str
