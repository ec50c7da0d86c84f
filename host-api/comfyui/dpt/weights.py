"""The U-Net's weights as ComfyUI samples with them, lent to the plugin under diffusers' names."""

import weakref
from collections.abc import Sequence
from typing import Any

import sampler_hook
import torch

_LENT = (torch.float32, torch.float16, torch.bfloat16)


class LoadedWeights(sampler_hook.Weights):
    """The weights of the model that is sampled, LoRA and other patches included. Bound to a model for the time of a run."""

    def __init__(self) -> None:
        self._patcher: Any = None
        self._keys: dict[str, str] = {}
        self._revisions: dict[str, int] = {}
        self._revision = 0
        self._unet: weakref.ref | None = None
        self._patches: dict[str, list[tuple]] = {}

    def bind(self, patcher: Any) -> None:
        """The weights are those of this patcher's model from now on; it is loaded. A weight's revision is another one when the model
        or the weight's patches are other ones than before."""
        unet, patches = patcher.model.diffusion_model, {key: list(found) for key, found in patcher.patches.items()}
        if self._unet is not None and self._unet() is unet:
            changed = [name for name, key in self._keys.items() if not _same(self._patches.get(key, []), patches.get(key, []))]
        else:
            self._keys = diffusers_names(patcher.model)
            changed = list(self._keys)
        if changed:
            self._revision += 1
            self._revisions.update(dict.fromkeys(changed, self._revision))
        self._patcher, self._unet, self._patches = patcher, weakref.ref(unet), patches

    def release(self) -> None:
        """Forgets the patcher after a run. What was lent is the plugin's own copy."""
        self._patcher = None

    @property
    def names(self) -> Sequence[str]:
        return list(self._keys)

    def revision(self) -> int:
        return self._revision

    def tensor_revision(self, name: str) -> int:
        return self._revisions[name]

    def tensor(self, name: str) -> torch.Tensor:
        if self._patcher is None:
            raise RuntimeError("weights are lent while ComfyUI samples; it does not now")
        return effective(self._patcher.model, self._keys[name])


def _same(before: list[tuple], after: list[tuple]) -> bool:
    """Whether two lists of patches are the same ones, in strength and by identity of their data."""
    alike = all(
        len(a) == len(b) and all(x is y or (isinstance(x, float | int) and x == y) for x, y in zip(a, b, strict=True))
        for a, b in zip(before, after, strict=False)
    )
    return len(before) == len(after) and alike


def diffusers_names(model: Any) -> dict[str, str]:
    """ComfyUI's key of each U-Net tensor by its diffusers name."""
    import comfy.utils

    present = {name for name, _ in model.named_parameters()}
    names = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    keys = {name: f"diffusion_model.{key}" for name, key in sorted(names.items())}
    keys = {name: key for name, key in keys.items() if key in present}
    missing = {key for key in present if key.startswith("diffusion_model.")} - set(keys.values())
    if missing:
        raise ValueError(f"no diffusers name is known for {len(missing)} tensors of the U-Net, such as {min(missing)}")
    return keys


def effective(model: torch.nn.Module, key: str) -> torch.Tensor:
    """A weight in main memory as the forward pass sees it: with the patches of a model that is loaded in part, which ComfyUI applies
    as it goes, and those that were merged when it was loaded."""
    path, name = key.rsplit(".", 1)
    module = model.get_submodule(path)
    weight = getattr(module, name).detach()
    if not isinstance(weight, torch.Tensor) or type(weight) not in (torch.Tensor, torch.nn.Parameter):
        raise ValueError(f"{key} is a {type(weight).__name__}: quantized weights are not lent to the plugin; load the model in f16 or f32")
    if getattr(module, "scale_weight", None) is not None:
        raise ValueError(f"{key} is in scaled fp8, which is not lent to the plugin; load the model in f16 or f32")
    weight = weight.to("cpu", torch.float32 if weight.dtype not in _LENT else weight.dtype)
    for function in getattr(module, f"{name}_function", []):
        weight = function(weight.clone())
    return weight.contiguous()
