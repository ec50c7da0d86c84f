"""What is scored: the positive conditionings that are active at a sigma, each on its own area of the latents.

ComfyUI predicts noise for every conditioning, batched with the negative ones in an order of its own, and blends the predictions by
strength, mask and area. Corrections are blended by the same weights. The negative conditionings are not scored.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .text import pooled_of


@dataclass(frozen=True)
class Prompt:
    """One positive conditioning at one sigma."""

    number: int
    """Its place among the positive conditionings."""
    uuid: Any
    area: tuple[slice, ...]
    """Where in the latents, in `[h, w]`."""
    weight: torch.Tensor | None
    """Of the blend, `[B, C, h, w]` of the area; None: all of the latents, with nothing else active."""
    context: torch.Tensor
    """`[B, S, D]`"""
    pooled: torch.Tensor
    """`[B, D]`"""
    key: tuple
    """The same for the same text."""
    extra_inputs: bool
    """ControlNet or GLIGEN."""


def active(positive: Sequence[dict[str, Any]], latents: torch.Tensor, sigma: torch.Tensor) -> list[Prompt]:
    """The conditionings of a guider, as ComfyUI has processed them, that are active at sigma `[B]` for latents `[B, C, h, w]`."""
    found = [prompt_of(positive, number, latents, sigma) for number in range(len(positive))]
    prompts = [prompt for prompt in found if prompt is not None]
    if len(prompts) == 1 and _is_plain(positive[prompts[0].number]):
        prompts = [dataclasses.replace(prompts[0], weight=None)]
    return prompts


def prompt_of(
    positive: Sequence[dict[str, Any]], number: int, latents: torch.Tensor, sigma: torch.Tensor, cropped: bool = False
) -> Prompt | None:
    """One of the conditionings, or None where it is not active. `cropped` says that the latents are its area already."""
    import comfy.samplers

    conditioning = positive[number]
    if "default" in conditioning:
        raise ValueError("default conditionings (Cond Set Default Combine) are not supported by DPT")
    placed = {key: value for key, value in conditioning.items() if key not in ("area", "mask")} if cropped else conditioning
    processed = comfy.samplers.get_area_and_mult(placed, latents, sigma)
    if processed is None:
        return None
    if processed.hooks is not None:
        raise ValueError("conditionings with hooks, such as LoRA for one prompt alone, are not supported by DPT")
    return _prompt(number, conditioning, processed, positive, latents)


def _is_plain(conditioning: dict[str, Any]) -> bool:
    """Whether its prediction is taken as it is: strengths of a single one cancel."""
    return "area" not in conditioning and "mask" not in conditioning and conditioning.get("strength", 1.0) != 0


def _prompt(number: int, conditioning: dict, processed: Any, positive: Sequence[dict], latents: torch.Tensor) -> Prompt:
    cross_attention = processed.conditioning.get("c_crossattn")
    if cross_attention is None:
        raise ValueError(f"positive conditioning {number} has no text, which DPT scores against")
    original = conditioning["model_conds"]["c_crossattn"].cond
    # An area of the negative side gets a partner with the text of one of these, but otherwise the negative's own options.
    owner = next((entry for entry in positive if entry.get("cross_attn") is original), None)
    if owner is None:
        raise ValueError(f"another node replaced the text of positive conditioning {number}, so that its end of text is not known")
    batch, pooled = latents.shape[0], pooled_of(original, owner)
    rows = [row % pooled.shape[0] for row in range(batch)]
    sizes = processed.area
    if sizes is None:
        area = tuple(slice(0, size) for size in latents.shape[2:])
    else:
        count = len(sizes) // 2
        area = tuple(slice(start, start + size) for size, start in zip(sizes[:count], sizes[count:], strict=True))
    extra = processed.control is not None or processed.patches is not None
    context, weight, key = cross_attention.cond, processed.mult, (id(original), batch)
    return Prompt(number, conditioning["uuid"], area, weight, context, pooled[rows], key, extra)


def blend(latents: torch.Tensor, prompts: Sequence[Prompt], corrected: Sequence[torch.Tensor]) -> torch.Tensor:
    """Latents with the corrections of each prompt's area blended as ComfyUI blends their predictions."""
    if len(prompts) == 1 and prompts[0].weight is None:
        return corrected[0]
    total, weights = torch.zeros_like(latents), torch.zeros_like(latents)
    for prompt, result in zip(prompts, corrected, strict=True):
        place = (slice(None), slice(None), *prompt.area)
        total[place] += (result - latents[place]) * prompt.weight
        weights[place] += prompt.weight
    return latents + torch.where(weights > 0, total / weights.clamp(min=1e-37), torch.zeros_like(total))
