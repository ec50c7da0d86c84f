"""The plugin's LoRA in a pipeline: merged, or through the pipeline's own loader."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.dlpack import from_dlpack

from ..errors import InvalidArgumentError, ShapeMismatchError, UnsupportedError
from ..lora import Lora, LoraEntry
from ._host import unet_of

LoraMode = Literal["merge", "load", "none"]
ADAPTER = "sampler_hook"
"""The adapter's name in the pipeline."""


def bring(pipe: Any, lora: Lora, mode: LoraMode, strength: float) -> Callable[[], None]:
    """Brings the plugin's LoRA into the pipeline's U-Net; the result takes it out again, bit for bit."""
    if mode not in ("merge", "load", "none"):
        raise InvalidArgumentError(f"lora is {mode!r}, expected merge, load or none")
    if mode == "none" or not len(lora):
        return lambda: None
    return _merge(unet_of(pipe), lora, strength) if mode == "merge" else _load(pipe, lora, strength)


def _merge(unet: Any, lora: Lora, strength: float) -> Callable[[], None]:
    """W + strength * scale * up @ down in place of W; the copies go back."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def restore() -> None:
        with torch.inference_mode(False), torch.no_grad():
            for weight, before in reversed(kept):
                weight.copy_(before)
        kept.clear()

    try:
        with torch.inference_mode(False), torch.no_grad():
            for entry in lora:
                weight = _weight(unet, entry)
                kept.append((weight, weight.clone()))
                down, up = (from_dlpack(factor).to(weight.device) for factor in (entry.down, entry.up))
                weight.copy_(weight.float() + strength * entry.scale * (up @ down).view_as(weight))
    except BaseException:
        restore()
        raise
    return restore


def _weight(unet: Any, entry: LoraEntry) -> torch.Tensor:
    """The weight that an entry changes."""
    module = unet.get_submodule(entry.module)
    weight: torch.Tensor = getattr(module, "base_layer", module).weight
    if not weight.is_floating_point() or weight.is_inference():
        message = f"{entry.module} is of {weight.dtype}{' and an inference tensor' if weight.is_inference() else ''}"
        raise UnsupportedError(f"{message}, which nothing can be merged into; use lora='load'")
    if weight.numel() != entry.up.shape[0] * entry.down.shape[1]:
        expected = [entry.up.shape[0], entry.down.shape[1]]
        raise ShapeMismatchError(f"{entry.module} has shape {list(weight.shape)}, the LoRA is for {expected}")
    return weight


def _load(pipe: Any, lora: Lora, strength: float) -> Callable[[], None]:
    """Through `pipe.load_lora_weights`, beside the adapters that the pipeline has."""
    before = {name: list(adapters) for name, adapters in pipe.get_list_adapters().items()}
    active = list(pipe.get_active_adapters()) if before else []
    trained = [value for value in unet_of(pipe).parameters() if value.requires_grad]
    with tempfile.TemporaryDirectory() as folder:
        lora.write(Path(folder) / "lora.safetensors", layout="peft")
        pipe.load_lora_weights(folder, weight_name="lora.safetensors", adapter_name=ADAPTER)
    if active or strength != 1:
        weights = _weights(pipe, active)
        pipe.set_adapters([*active, ADAPTER], [*weights, strength])
    else:
        weights = []

    def unload() -> None:
        if any(before.values()):
            pipe.delete_adapters(ADAPTER)
            if active:
                pipe.set_adapters(active, weights)
        else:
            pipe.unload_lora_weights()
        for value in trained:  # which PEFT has changed
            value.requires_grad_(True)

    return unload


def _weights(pipe: Any, adapters: list[str]) -> list[float]:
    """The strength of each adapter: what its layers' scale is of alpha / rank."""
    found: dict[str, float] = {}
    for module in unet_of(pipe).modules():
        for adapter in getattr(module, "lora_A", ()):
            rank, alpha = module.r[adapter], module.lora_alpha[adapter]
            found.setdefault(adapter, module.scaling[adapter] * rank / alpha)
    return [found.get(adapter, 1.0) for adapter in adapters]
