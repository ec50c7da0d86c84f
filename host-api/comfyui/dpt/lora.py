"""The plugin's LoRA as patches of ComfyUI's own, merged when the model is loaded and taken out from its kept copy."""

from collections.abc import Iterable
from typing import Any

import sampler_hook
import torch


def patches(entries: Iterable[sampler_hook.LoraEntry], model: Any) -> dict[str, Any]:
    """Patches by ComfyUI's key. Fails when an entry is for no weight of the model."""
    import comfy.lora

    entries = list(entries)
    loaded = comfy.lora.load_lora(state_dict(entries), comfy.lora.model_lora_keys_unet(model, {}), log_missing=False)
    if len(loaded) != len(entries):
        raise ValueError(f"DPT's LoRA has {len(entries)} entries, of which {len(loaded)} fit this MODEL: it is of another model")
    for key, patch in loaded.items():
        up, down, shape = patch.weights[0], patch.weights[1], model.get_parameter(key).shape
        if (up.shape[0], down.shape[1]) != (shape[0], shape[1:].numel()):
            found = f"{up.shape[0]} x {down.shape[1]}"
            raise ValueError(f"DPT's LoRA for {key} is {found}, the MODEL's weight {list(shape)}: it is of another model")
    return loaded


def state_dict(entries: Iterable[sampler_hook.LoraEntry]) -> dict[str, torch.Tensor]:
    """Entries under kohya's names. Alpha carries the scale, as scale = alpha / rank."""
    found: dict[str, torch.Tensor] = {}
    for entry in entries:
        name = f"lora_unet_{entry.module.replace('.', '_')}"
        found[f"{name}.lora_up.weight"] = torch.from_dlpack(entry.up)
        found[f"{name}.lora_down.weight"] = torch.from_dlpack(entry.down)
        found[f"{name}.alpha"] = torch.tensor(entry.scale * entry.rank, dtype=torch.float64)
    return found
