"""Plugins in pipelines of diffusers: Stable Diffusion 1.x and 2.x, from text or from an image.

with sampler_hook.diffusers.apply(pipe, {"adapter": "adapter.safetensors", "eta": 0.5}) as correction:
    image = pipe("a red circle left of a blue square").images[0]
print(correction.scores)
"""

from ._apply import apply
from ._correction import Correction, Mode, StepReport
from ._host import PipelineHost
from ._lora import LoraMode

__all__ = ["Correction", "LoraMode", "Mode", "PipelineHost", "StepReport", "apply"]
