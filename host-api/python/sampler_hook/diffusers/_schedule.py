"""Where a scheduler of diffusers is: the step, its space, and its alpha_bar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedError
from ..types import Prediction, Space

# Latents in k-diffusion's sigma space, x = z / sqrt(alpha_bar).
_SIGMA_SPACE = (
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
)
# Variance-preserving latents, steps from sigma to sigma.
_SIGMAS = ("DEISMultistepScheduler", "DPMSolverMultistepScheduler")
# Variance-preserving latents, steps from timestep to timestep.
_TIMESTEPS = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}


@dataclass(frozen=True)
class Position:
    """One evaluation of the U-Net in a schedule."""

    index: int
    """Step of the whole schedule."""
    sub_evaluation: int
    """0 for the step's first evaluation."""
    alpha_bar: float
    space: Space


def prediction_of(scheduler: Any) -> Prediction:
    """What the U-Net predicts. Fails for schedulers that are not supported, and says which are."""
    name = type(scheduler).__name__
    known = (*_SIGMA_SPACE, *_SIGMAS, *_TIMESTEPS)
    if name not in known:
        raise UnsupportedError(f"the scheduler {name} is not supported; these are: {', '.join(sorted(known))}")
    if name == "PNDMScheduler" and not scheduler.config.skip_prk_steps:
        raise UnsupportedError("PNDM with its Runge-Kutta start is not supported; set skip_prk_steps")
    if scheduler.config.prediction_type not in _PREDICTIONS:
        found, expected = scheduler.config.prediction_type, ", ".join(_PREDICTIONS)
        raise UnsupportedError(f"the prediction type {found!r} is not supported; these are: {expected}")
    return _PREDICTIONS[scheduler.config.prediction_type]


def position(scheduler: Any, timestep: Any) -> Position:
    """The evaluation that comes next, after `scale_model_input` was called for it."""
    name = type(scheduler).__name__
    if name in _TIMESTEPS:
        # The last place: PNDM lists its second timestep twice, and the first of them is for the end of its start.
        place = int((scheduler.timesteps == timestep).nonzero()[-1])
        index, sub_evaluation = place, 0
        if name == "PNDMScheduler":
            sub_evaluation = int(scheduler.counter == 1)
            index = max(place - 1, 0) - sub_evaluation
        return Position(index, sub_evaluation, float(scheduler.alphas_cumprod[int(timestep)]), "vp")
    place = _place(scheduler, timestep)
    index, sub_evaluation = divmod(place, scheduler.order)
    sigma = float(scheduler.sigmas[place])
    return Position(index, sub_evaluation, 1 / (sigma**2 + 1), "ve" if name in _SIGMA_SPACE else "vp")


def _place(scheduler: Any, timestep: Any) -> int:
    """Place in the scheduler's list of timesteps."""
    for known in (scheduler.step_index, scheduler.begin_index):
        if known is not None:
            return int(known)
    return int(scheduler.index_for_timestep(timestep))
