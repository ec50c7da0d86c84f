"""Which evaluations of the model are the first of a sampler's steps. Only those are corrected: Heun, DPM-2 and their like evaluate
again within a step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

OWN_SCHEDULE = {"dpm_fast_function", "dpm_adaptive_function", "sample_dpm_fast", "sample_dpm_adaptive"}
"""Samplers that choose sigmas of their own."""
PREDICTOR_CORRECTOR = {"sample_unipc", "sample_unipc_bh2", "sample_sa_solver", "sample_sa_solver_pece"}
"""Samplers that evaluate a prediction and go on from another latent, so that a correction of the former is lost."""
_RELATIVE = 1e-4
"""How far a sigma may be from the schedule's, for rounding in half precision of samplers' own sums."""


def refusal(sampler: str, condition_only: bool) -> str | None:
    """Why a sampler, by the name of its function, cannot be corrected; None where it can."""
    if sampler in OWN_SCHEDULE:
        return f"the sampler {_short(sampler)} chooses its own sigmas, so its steps are not known: choose another"
    if sampler in PREDICTOR_CORRECTOR and not condition_only:
        return (
            f"the sampler {_short(sampler)} evaluates a prediction and goes on from another latent, so that the correction would be "
            "lost: choose another, or the mode condition-only"
        )
    return None


def _short(sampler: str) -> str:
    return sampler.removeprefix("sample_").removesuffix("_function")


class Evaluations:
    """Follows a sampler through its schedule.

    The first evaluation of a step is at the step's sigma. Samplers of Heun's kind also evaluate at the next step's sigma before they
    get there: how often is known by name.
    """

    def __init__(self, sigmas: Sequence[float], sampler: str = "", options: Mapping[str, Any] | None = None) -> None:
        """`sigmas` is the schedule, which ends with the sigma that is sampled to; `sampler` the name of the sampler's function;
        `options` its extra options."""
        options = options or {}
        self.sigmas = list(sigmas)
        self.first = [sigma * _churn(sigma, len(sigmas) - 1, options) for sigma in self.sigmas[:-1]]
        self._ahead = [_ahead(sampler, self.sigmas, index, options) for index in range(self.count)]
        self._index: int | None = None
        self._sub = 0
        self._pending = 0

    @property
    def count(self) -> int:
        """Steps of the schedule."""
        return max(len(self.sigmas) - 1, 0)

    def see(self, sigma: float) -> tuple[int, int]:
        """Index of the step and number of the evaluation within it, for the next evaluation, at `sigma`."""
        found = None
        if self._pending == 0:
            found = self._step_at(sigma)
        else:
            self._pending -= 1
        if found is None:
            self._sub += 1
            # Before any step's sigma was seen: an evaluation within the first.
            return self._index or 0, self._sub
        self._index, self._sub, self._pending = found, 0, self._ahead[found]
        return found, 0

    def _step_at(self, sigma: float) -> int | None:
        """The step that starts at `sigma`, other than the one in progress: the next one of them, else an earlier one, since there are
        samplers that go back."""
        matches = [index for index, first in enumerate(self.first) if math.isclose(sigma, first, rel_tol=_RELATIVE)]
        here = -1 if self._index is None else self._index
        later = [index for index in matches if index > here]
        earlier = [index for index in matches if index < here]
        return later[0] if later else (earlier[-1] if earlier else None)


def _churn(sigma: float, steps: int, options: Mapping[str, Any]) -> float:
    """Karras et al.'s stochastic samplers evaluate at sigma (1 + gamma)."""
    s_churn = options.get("s_churn", 0.0)
    if s_churn <= 0 or not options.get("s_tmin", 0.0) <= sigma <= options.get("s_tmax", math.inf):
        return 1.0
    return 1.0 + min(s_churn / steps, 2**0.5 - 1)


def _ahead(sampler: str, sigmas: list[float], index: int, options: Mapping[str, Any]) -> int:
    """Evaluations at sigmas of later steps within step `index`."""
    last = sigmas[-1]
    after = sigmas[index + 1 : index + 3]
    if sampler == "sample_heun" or sampler.startswith("sample_exp_heun_2"):
        return int(after[0] != 0)
    if sampler == "sample_seeds_2" and options.get("r", 0.5) == 1:
        return int(after[0] != 0)
    if sampler == "sample_heunpp2":
        return 0 if after[0] == last else (1 if after[1] == last else 2)
    return 0
