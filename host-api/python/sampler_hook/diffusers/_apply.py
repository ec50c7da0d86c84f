"""Putting a plugin into a pipeline."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import diffusers

from ..errors import InvalidArgumentError, InvalidConfigError, UnsupportedError
from ..library import Library
from ..params import ParamValue
from ..plugin import Plugin
from ._correction import Correction, Mode
from ._host import PipelineHost, check_autograd, unet_of
from ._lora import LoraMode, bring
from ._schedule import prediction_of

GradientSource = Literal["host", "weights", "plugin"]
_PIPELINES: tuple[type[Any], ...] = (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionImg2ImgPipeline)


def apply(
    pipe: Any,
    plugin: Plugin | Mapping[str, Any],
    *,
    mode: Mode = "paper",
    gradient: GradientSource | None = None,
    lora: LoraMode = "merge",
    lora_strength: float = 1.0,
    library: Library | str | os.PathLike[str] | None = None,
    id: str = "dpt",
    **params: ParamValue,
) -> Correction:
    """Has a plugin correct the latents of every image that the pipeline draws, until `Correction.remove`.

    `plugin` is a configuration, from which the plugin `id` of `library` (None: this package's) is created, or a plugin
    that was created with a `PipelineHost` of this pipeline, which is not destroyed at the end. `params` are parameters
    of the plugin's: `eta`, `start`, `end`, `every`, ...

    `mode`: in `"paper"` (Eq. 9) both halves of the guidance and the scheduler's step start from the corrected latents;
    in `"condition-only"` the conditional half alone sees them. `gradient`: whose U-Net computes the score's gradient:
    `"host"`, the pipeline's, by autograd; `"weights"`, the plugin's own on the pipeline's weights; `"plugin"`, the
    plugin's own from the folder that the pipeline was loaded from. None: what the configuration says, else `"host"`.
    `lora`: what becomes of the LoRA that the plugin brings: `"merge"` into the weights, `"load"` through the pipeline's
    own loader, or `"none"`. Either is taken out again by `remove`, bit for bit.

    Raises `NotImplementedError` for pipelines, models and schedulers that are not supported, by name.
    """
    _check_pipeline(pipe)
    with ExitStack() as stack:  # on an error all that was done is taken back
        if isinstance(plugin, Plugin):
            instance, host = plugin, _host_of(plugin, pipe)
            if gradient is not None or library is not None:
                raise InvalidArgumentError("gradient and library are for a configuration; this plugin is made already")
        else:
            host = PipelineHost(pipe)
            opened = library if isinstance(library, Library) else Library.open(library, pipe._execution_device)
            instance = opened.create(id, _configuration(pipe, plugin, gradient), host)
            stack.callback(instance.destroy)
        for name, value in params.items():
            if name not in instance.params:
                known = ", ".join(instance.params)
                raise InvalidArgumentError(f"the plugin has no parameter {name!r}; it has {known}")
            instance.params[name] = value
        correction = Correction(pipe, instance, host, mode)
        stack.callback(bring(pipe, instance.lora, lora, lora_strength))
        correction.install(stack)
        if instance.needs.gradient:
            check_autograd(unet_of(pipe))
        correction.keep(stack.pop_all())
    return correction


def _check_pipeline(pipe: Any) -> None:
    if not isinstance(pipe, _PIPELINES):
        supported = ", ".join(kind.__name__ for kind in _PIPELINES)
        raise UnsupportedError(f"{type(pipe).__name__} is not supported; these pipelines are: {supported}")
    taken, latents = unet_of(pipe).config.in_channels, pipe.vae.config.latent_channels
    if taken != latents:
        raise UnsupportedError(
            f"the U-Net takes {taken} channels for latents of {latents}: inpainting is not supported"
        )
    prediction_of(pipe.scheduler)


def _host_of(plugin: Plugin, pipe: Any) -> PipelineHost:
    host = plugin.host
    if not isinstance(host, PipelineHost) or host.pipe is not pipe:
        raise InvalidArgumentError("the plugin was not created with a PipelineHost of this pipeline as its host")
    return host


def _configuration(pipe: Any, given: Mapping[str, Any], gradient: GradientSource | None) -> dict[str, Any]:
    config = dict(given)
    if gradient is not None:
        config["gradient"] = gradient
    elif "base_model" not in config:
        config.setdefault("gradient", "host")
    if config.get("gradient") == "split":
        raise InvalidConfigError(
            "gradient 'split' is for hosts that call the halves of a step; 'host' is the same here"
        )
    if config.get("gradient") == "plugin" and "base_model" not in config:
        folder = Path(pipe.name_or_path)
        if not folder.is_dir():
            raise InvalidConfigError(f"gradient 'plugin' needs a base_model: the pipeline is from {folder}, no folder")
        config["base_model"] = folder
    return config
