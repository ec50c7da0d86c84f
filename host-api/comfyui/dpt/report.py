"""What happened in the steps of a run."""

import json
import math
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Item:
    """One latent of the batch."""

    score: float
    """Before the correction; NaN when it was not computed."""
    gradient_norm: float
    correction_norm: float
    status: str
    """`OK`, or why it was left as it was."""


@dataclass(frozen=True)
class Record:
    """One first evaluation of a step, for one prompt."""

    step: int
    sigma: float
    timestep: float
    percent: float
    eta: float
    prompt: int
    """Which positive conditioning, in ComfyUI's order."""
    outcome: str
    """`corrected`, or why not."""
    seconds: float
    items: tuple[Item, ...] = ()


@dataclass
class Report:
    """The last run of one DPT Apply: the node's second output."""

    sampler: str = ""
    steps: int = 0
    mode: str = ""
    records: list[Record] = field(default_factory=list)

    def start(self, sampler: str, steps: int, mode: str) -> None:
        """Forgets the run before."""
        self.sampler, self.steps, self.mode, self.records = sampler, steps, mode, []

    @property
    def corrected(self) -> int:
        """Steps of which something was corrected."""
        return len({record.step for record in self.records if record.outcome == "corrected"})

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Scores by step, one curve for each prompt and item that has any."""
        found: dict[str, list[tuple[int, float]]] = {}
        prompts = {record.prompt for record in self.records}
        for record in self.records:
            for number, item in enumerate(record.items):
                if math.isfinite(item.score):
                    name = f"{number}" if len(prompts) == 1 else f"{number}, prompt {record.prompt}"
                    found.setdefault(name, []).append((record.step, item.score))
        return found

    def to_json(self) -> str:
        """All of it. What was not computed is null."""
        return json.dumps(_without_nan(asdict(self)), indent=1)


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
