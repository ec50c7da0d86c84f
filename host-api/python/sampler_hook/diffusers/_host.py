"""A pipeline of diffusers as plugins see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch.utils.dlpack import from_dlpack

from ..errors import InvalidStateError, NotFoundError, UnsupportedError
from ..host import Gradient, Host, Weights
from ..tensor import Tensor
from ..types import Step


@dataclass
class UNetCall:
    """The call of the U-Net that a step precedes, with the conditional text only."""

    timestep: Any
    arguments: dict[str, Any] = field(default_factory=dict)


class PipelineHost(Host):
    """A Stable Diffusion pipeline: lends its U-Net's gradient, by autograd, and its weights, LoRA included.

    `apply` makes one; make one yourself for a plugin that you create, and give that plugin to `apply`.
    """

    name = "diffusers"
    version = diffusers.__version__

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.gradient: UNetGradient = UNetGradient(lambda: unet_of(pipe))
        self.weights: UNetWeights = UNetWeights(lambda: unet_of(pipe))

    def cancelled(self) -> bool:
        """Whether the pipeline was interrupted."""
        return bool(getattr(self.pipe, "_interrupt", False))


def unet_of(pipe: Any) -> Any:
    """The U-Net itself, not what `torch.compile` made of it."""
    return getattr(pipe.unet, "_orig_mod", pipe.unet)


def check_autograd(unet: Any) -> None:
    """Fails where autograd cannot go through the U-Net."""
    inference = next((name for name, value in unet.named_parameters() if value.is_inference()), None)
    if inference is not None:
        message = f"{inference} was made under torch.inference_mode, so autograd cannot go through the U-Net"
        raise UnsupportedError(f"{message}; load the pipeline outside of it, or use gradient 'weights' or 'plugin'")
    if any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in unet.modules()):
        message = "sequential offload takes the U-Net's weights away before the backward pass"
        raise UnsupportedError(f"{message}; use gradient 'plugin', or enable_model_cpu_offload")


class _Reached(BaseException):
    """Stops the U-Net at the tap. Nothing between the tap and us may take it for an error of its own."""

    def __init__(self, output: torch.Tensor) -> None:
        self.output = output


@contextmanager
def _frozen(unet: Any) -> Iterator[None]:
    """Nothing is kept for gradients of the weights."""
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _ordinary(value: Any) -> Any:
    """The same without inference tensors, which autograd does not save."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: _ordinary(entry) for key, entry in value.items()}
    return type(value)(map(_ordinary, value)) if isinstance(value, list | tuple) else value


class UNetGradient(Gradient):
    """The pipeline's own U-Net up to the tap, and back by autograd."""

    def __init__(self, unet: Callable[[], Any]) -> None:
        self._unet = unet
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self.call: UNetCall | None = None
        """The call of the U-Net that is about to be made."""

    def features(self, step: Step, latents: Tensor, tap: str) -> torch.Tensor:
        """Output [B, C, h, w] of the block `tap`, where the latents are."""
        if self.call is None:
            raise InvalidStateError("features were asked for outside a step of the pipeline")
        unet = self._unet()
        block = block_at(unet, tap)
        with torch.inference_mode(False), torch.enable_grad():
            lent = from_dlpack(latents)
            z = lent.to(unet.device, torch.float32).clone().requires_grad_()

            def stop(_module: Any, _arguments: Any, output: Any) -> None:
                raise _Reached(output[0] if isinstance(output, tuple) else output)

            hook = block.register_forward_hook(stop)
            try:
                with _frozen(unet):
                    unet.forward(z.to(unet.dtype), _ordinary(self.call.timestep), **_ordinary(self.call.arguments))
            except _Reached as reached:
                self._kept = (z, reached.output)
            finally:
                hook.remove()
        if self._kept is None:
            raise InvalidStateError(f"the U-Net ran without coming to its block {tap}")
        return self._kept[1].detach().to(lent.device)

    def vjp(self, cotangent: Tensor) -> torch.Tensor:
        """Gradient [B, c, H, W], f32."""
        if self._kept is None:
            raise InvalidStateError("a gradient was asked for without features before it")
        (z, activation), self._kept = self._kept, None
        with torch.inference_mode(False):
            slope = from_dlpack(cotangent).to(activation.device)
            scale = _half_precision_scale(slope, activation.dtype)
            (gradient,) = torch.autograd.grad(activation, z, (slope * scale).to(activation.dtype))
            return gradient / scale

    def release(self) -> None:
        """Drops the graph."""
        self._kept = None


def _half_precision_scale(slope: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Power of two per item [B, 1, 1, 1] that brings slopes near 1, where half precision would lose them; else 1."""
    largest = slope.abs().flatten(1).amax(1)
    exponent = torch.where(largest > 0, -torch.log2(largest).floor(), 0)
    if dtype.itemsize > 2:
        exponent = torch.zeros_like(largest)
    return torch.exp2(exponent)[:, None, None, None]


def block_at(unet: Any, tap: str) -> Any:
    """The block that a tap names: down0, ..., mid, up0, ..."""
    blocks = {f"down{i}": block for i, block in enumerate(unet.down_blocks)}
    blocks["mid"] = unet.mid_block
    blocks.update({f"up{i}": block for i, block in enumerate(unet.up_blocks)})
    if blocks.get(tap) is None:
        raise NotFoundError(f"the U-Net has no block {tap!r}; it has {', '.join(blocks)}")
    return blocks[tap]


class UNetWeights(Weights):
    """The pipeline's weights as it samples with them: LoRA of PEFT's layers is added to what they wrap."""

    def __init__(self, unet: Callable[[], Any]) -> None:
        self._unet = unet
        self._revisions: dict[str, int] = {}
        self._seen: object = None
        self._count = 0

    def refresh(self) -> None:
        """Looks at all tensors anew; called when a run begins."""
        self._seen = None

    @property
    def names(self) -> Sequence[str]:
        """Diffusers' names, without those of PEFT's layers."""
        return list(self._sources())

    def revision(self) -> int:
        """Counts changes: of the tensors' checksums when a run begins, of their versions and of LoRA's scales within
        it.
        """
        sources = self._sources()
        seen = tuple((name, value.data_ptr(), _version(value), _scales(on)) for name, (value, on) in sources.items())
        if seen != self._seen:
            revisions = {name: hash((_checksum(value), _lora_sum(layer))) for name, (value, layer) in sources.items()}
            self._count += revisions != self._revisions
            self._seen, self._revisions = seen, revisions
        return self._count

    def tensor_revision(self, name: str) -> int:
        """A checksum."""
        return self._revisions[name]

    def tensor(self, name: str) -> torch.Tensor:
        """On the CPU."""
        value, layer = self._sources()[name]
        with torch.inference_mode(False), torch.no_grad():
            value = value.detach()
            deltas = [layer.get_delta_weight(adapter) for adapter in _adapters(layer)]
            for delta in deltas:
                value = value + delta.to(value.dtype)
            return value.to("cpu").clone() if value.is_inference() else value.to("cpu")

    def _sources(self) -> dict[str, tuple[torch.Tensor, Any]]:
        """Each tensor by its diffusers name, with the LoRA layer that is on top of it, if there is one."""
        unet, found = self._unet(), {}
        for name, value in unet.named_parameters():
            path, _, kind = name.rpartition(".")
            if ".lora_" in name:
                continue
            if path.endswith(".base_layer"):
                path = path.removesuffix(".base_layer")
                layer = unet.get_submodule(path) if kind == "weight" else None
                found[f"{path}.{kind}"] = (value, layer)
            else:
                found[name] = (value, None)
        return found


def _adapters(layer: Any) -> list[str]:
    """Adapters of a PEFT layer that count and are not merged."""
    if layer is None or layer.disable_adapters or layer.merged:
        return []
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


def _scales(layer: Any) -> tuple[tuple[str, float], ...]:
    return tuple((adapter, float(layer.scaling[adapter])) for adapter in _adapters(layer))


def _lora_sum(layer: Any) -> tuple[Any, ...]:
    factors = (getattr(layer, part)[adapter].weight for adapter in _adapters(layer) for part in ("lora_A", "lora_B"))
    return (_scales(layer), *map(_checksum, factors))


def _version(value: torch.Tensor) -> int:
    return 0 if value.is_inference() else value._version


def _checksum(value: torch.Tensor) -> tuple[int, int]:
    """Of a tensor's bits as whole numbers: the sum of all, and of the first half."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = value.detach().contiguous().view(-1).view(kinds[value.dtype.itemsize])
    half = bits[: bits.numel() // 2]
    return int(bits.sum(dtype=torch.int64)), int(half.sum(dtype=torch.int64))
