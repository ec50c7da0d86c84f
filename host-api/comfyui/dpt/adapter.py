"""The DPT object of the loader node: the plugin with its adapter and LoRA, and what ComfyUI lends it."""

import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sampler_hook

from .autograd import HostGradient
from .model import describe
from .weights import LoadedWeights

logger = logging.getLogger("dpt")


class ComfyHost(sampler_hook.Host):
    """ComfyUI as the plugin sees it."""

    name = "ComfyUI"

    def __init__(self, lends_gradient: bool) -> None:
        try:
            from comfyui_version import __version__ as version
        except ImportError:  # before 0.3.10
            version = "unknown"
        self.version = version
        self.weights = LoadedWeights()
        self.gradient = HostGradient() if lends_gradient else None

    def log(self, level: int, message: str) -> None:
        logger.log(level, "%s", message)

    def cancelled(self) -> bool:
        import comfy.model_management

        return bool(comfy.model_management.processing_interrupted())


class Dpt:
    """A plugin instance. One run at a time; it is fitted to a model when it is sampled, and again when another one is."""

    def __init__(self, config: Mapping[str, Any], library: str | None = None) -> None:
        """`config` is the plugin's configuration. `library` is its library's path; None: the one that comes with sampler_hook, or
        that the environment names."""
        self.gradient = config["gradient"]
        self.ignore_extra_inputs = bool(config.get("ignore_extra_inputs", False))
        self._host = ComfyHost(lends_gradient=self.gradient == "host")
        self.plugin = sampler_hook.Library.open(library, config.get("device", "cpu")).create("dpt", config, self._host)
        self._fitted: tuple[weakref.ref, sampler_hook.Model] | None = None

    @property
    def lora(self) -> sampler_hook.Lora:
        """Low-rank weights that the adapter was trained with; empty where it has none."""
        return self.plugin.lora

    @property
    def host_gradient(self) -> HostGradient | None:
        """Where ComfyUI's own U-Net computes the gradient."""
        return self._host.gradient

    @contextmanager
    def bound(self, patcher: Any) -> Iterator[None]:
        """For the time of a run, weights and U-Net are those of the patcher's model, which is loaded; the plugin is fitted to it."""
        model = describe(patcher)
        self._host.weights.bind(patcher)
        try:
            unet = patcher.model.diffusion_model
            if self._fitted is None or self._fitted[0]() is not unet or self._fitted[1] != model:
                self._fitted = None
                self.plugin.prepare(model, "cpu")
                self._fitted = (weakref.ref(unet), model)
            yield
        finally:
            self._host.weights.release()
            if self._host.gradient is not None:
                self._host.gradient.release()
                self._host.gradient.conditioned = None
