"""Features and gradient by ComfyUI's own U-Net and PyTorch's autograd.

ComfyUI samples in inference mode, and its weights are inference tensors, which autograd cannot keep. So every layer on the way to the
tap computes on an ordinary copy of its weights, made as it is called and freed with the graph.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sampler_hook
import torch


@dataclass
class Conditioned:
    """What a call is conditioned on."""

    unet: torch.nn.Module
    dtype: torch.dtype
    device: torch.device
    context: torch.Tensor
    """`[B, S, D]`"""
    transformer_options: dict[str, Any]


class HostGradient(sampler_hook.Gradient):
    """The host's U-Net up to a block and back."""

    def __init__(self) -> None:
        self.conditioned: Conditioned | None = None
        """Set before every step."""
        self._latents: torch.Tensor | None = None
        self._activation: torch.Tensor | None = None

    def features(self, step: sampler_hook.Step, latents: sampler_hook.Tensor, tap: str) -> torch.Tensor:
        given = self.conditioned
        if given is None:
            raise RuntimeError("the U-Net is lent while ComfyUI samples; it does not now")
        with torch.inference_mode(False), torch.enable_grad():
            self._latents = torch.from_dlpack(latents).to(given.device, torch.float32).clone().requires_grad_()
            timesteps = torch.full((self._latents.shape[0],), step.timestep, device=given.device)
            context = given.context.detach().to(given.device, given.dtype).clone()
            try:
                with ordinary_weights(given.unet):
                    self._activation = forward_to(
                        given.unet,
                        self._latents.to(given.dtype),
                        timesteps,
                        context,
                        tap,
                        dict(given.transformer_options),
                    )
            except RuntimeError as error:
                if "nference tensors" in str(error):
                    raise RuntimeError(
                        "the U-Net has layers whose weights autograd cannot keep (they were made in inference mode and are not "
                        "ComfyUI's own layers): choose the gradient weights in DPT Loader"
                    ) from error
                raise
            return self._activation.detach().float().cpu()

    def vjp(self, cotangent: sampler_hook.Tensor) -> torch.Tensor:
        latents, activation = self._latents, self._activation
        if latents is None or activation is None:
            raise RuntimeError("vjp follows features")
        self.release()
        with torch.inference_mode(False):
            slope = torch.from_dlpack(cotangent).clone()
            # Half precision loses small numbers: a power of two brings the largest near 1, and takes no bit.
            largest = float(slope.abs().max())
            scale = 2.0 ** -math.frexp(largest)[1] if math.isfinite(largest) and largest > 0 else 1.0
            slope = (slope * scale).to(activation.device, activation.dtype)
            (gradient,) = torch.autograd.grad(activation, latents, slope)
            return (gradient.float() / scale).cpu()

    def release(self) -> None:
        self._latents = self._activation = None


class _Reached(Exception):
    """Ends a forward pass at the tap."""

    def __init__(self, activation: torch.Tensor) -> None:
        super().__init__()
        self.activation = activation


def forward_to(unet: Any, z: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, tap: str, options: dict) -> torch.Tensor:
    """The output of the block `tap` of ComfyUI's U-Net for latents in VP space; nothing beyond it is computed."""

    def stop(_module, _inputs, output):
        raise _Reached(output)

    handle = tap_layer(unet, tap).register_forward_hook(stop)
    try:
        unet._forward(z, timesteps, context, None, None, options)
    except _Reached as reached:
        return reached.activation
    finally:
        handle.remove()
    raise RuntimeError(f"the U-Net's forward pass did not come by the block {tap}: another node replaces its layers")


def tap_layer(unet: Any, tap: str) -> torch.nn.Module:
    """The layer whose output is that of the block `tap`: its down- or upsampler where it has one."""
    kind, number = tap.rstrip("0123456789"), tap.lstrip("abcdefghijklmnopqrstuvwxyz")
    blocks = list(unet.num_res_blocks)
    if kind == "mid" and not number:
        return unet.middle_block[-1]
    if kind in ("down", "up") and number and int(number) < len(blocks):
        level = int(number)
        if kind == "down":
            # The first input block is conv_in; each level but the last ends in a downsampler.
            return unet.input_blocks[min(sum(blocks[: level + 1]) + level + 1, len(unet.input_blocks) - 1)][-1]
        return unet.output_blocks[sum(count + 1 for count in blocks[::-1][: level + 1]) - 1][-1]
    raise ValueError(f"the U-Net has no block {tap!r}; it has down0 to down{len(blocks) - 1}, mid, and up0 to up{len(blocks) - 1}")


@contextmanager
def ordinary_weights(unet: torch.nn.Module) -> Iterator[None]:
    """Every layer of ComfyUI's computes on a copy of its weights that autograd can keep and needs no gradient for."""
    changed = []

    def copy(weight: torch.Tensor) -> torch.Tensor:
        return weight.detach().clone()

    try:
        for module in unet.modules():
            for name in ("weight", "bias"):
                functions = getattr(module, f"{name}_function", None)
                if functions is not None and getattr(module, name, None) is not None:
                    changed.append((module, f"{name}_function", functions))
                    setattr(module, f"{name}_function", [*functions, copy])
        yield
    finally:
        for module, name, functions in changed:
            setattr(module, name, functions)
