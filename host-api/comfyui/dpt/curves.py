"""How strong the correction is, and at which steps. Percent is ComfyUI's: 0 at the start of sampling, 1 at its end."""

import math
from collections.abc import Callable
from dataclasses import dataclass

CURVES: dict[str, Callable[[float], float]] = {
    "constant": lambda position: 1.0,
    "linear": lambda position: 1.0 - position,
    "cosine": lambda position: (1.0 + math.cos(math.pi * position)) / 2,
}
"""Share of eta by position in the range, 0 at its start and 1 at its end."""


def percent_of(sigma: float, percent_to_sigma: Callable[[float], float]) -> float:
    """The percent in [0, 1] of a sigma: the inverse of the model sampling's own `percent_to_sigma`, which falls, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if percent_to_sigma(middle) > sigma:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True)
class Range:
    """Where in the schedule a correction acts, and how strongly."""

    eta: float = 0.5
    """Step size of the correction (Eq. 9)."""
    start: float = 0.0
    """Percent at which correction starts."""
    end: float = 1.0
    """Percent at which it ends."""
    every: int = 1
    """Correct every k-th step of the range."""
    curve: str = "constant"
    """One of `CURVES`."""

    def __post_init__(self) -> None:
        if self.curve not in CURVES:
            raise ValueError(f"curve is {self.curve!r}, expected one of {', '.join(CURVES)}")
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"start_percent is {self.start} and end_percent {self.end}, expected 0 <= start <= end <= 1")
        if self.every < 1:
            raise ValueError(f"every is {self.every}, expected at least 1")
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise ValueError(f"eta is {self.eta}, expected a finite number of at least 0")

    def holds(self, sigma: float, percent_to_sigma: Callable[[float], float]) -> bool:
        """Whether a sigma is within the range, both ends included, as in ComfyUI's own timestep ranges."""
        return percent_to_sigma(self.end) <= sigma <= percent_to_sigma(self.start)

    def strength(self, percent: float, nth: int) -> float:
        """Eta at a percent within the range, for its nth step, counted from 0; 0 between two corrected steps."""
        if nth % self.every:
            return 0.0
        width = self.end - self.start
        position = (percent - self.start) / width if width > 0 else 0.0
        return self.eta * CURVES[self.curve](min(max(position, 0.0), 1.0))
