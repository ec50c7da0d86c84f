"""Hosts for sampler-hook plugins: load a plugin library, and let it correct latents at every step of a diffusion
sampler.

    library = Library.open()
    with library.create("dpt", {"adapter": "adapter.safetensors"}) as plugin:
        plugin.prepare(model)
        with plugin.run(batch=1, steps=25, text=text) as run:
            report = run.step(step, latents)    # before every noise prediction

`sampler_hook.diffusers` does all of it for pipelines of diffusers. The C interface below is `sampler_hook.h`.
"""

from .errors import (
    BusyError,
    CancelledError,
    DtypeMismatchError,
    HostFailedError,
    InternalError,
    InvalidArgumentError,
    InvalidConfigError,
    InvalidDataError,
    InvalidStateError,
    NonFiniteError,
    NotFoundError,
    OutOfMemoryError,
    PanicError,
    PoisonedError,
    SamplerHookError,
    ShapeMismatchError,
    Status,
    UnsupportedError,
)
from .host import Gradient, Host, Weights, __version__
from .library import Library
from .lora import Lora, LoraEntry
from .params import ParamInfo, ParamKind, Params
from .plugin import Plugin
from .run import Run
from .tensor import SupportsDLPack, Tensor
from .types import Descriptor, ItemReport, Model, Needs, Outcome, Report, Step, Text

__all__ = [
    "BusyError",
    "CancelledError",
    "Descriptor",
    "DtypeMismatchError",
    "Gradient",
    "Host",
    "HostFailedError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidConfigError",
    "InvalidDataError",
    "InvalidStateError",
    "ItemReport",
    "Library",
    "Lora",
    "LoraEntry",
    "Model",
    "Needs",
    "NonFiniteError",
    "NotFoundError",
    "OutOfMemoryError",
    "Outcome",
    "PanicError",
    "ParamInfo",
    "ParamKind",
    "Params",
    "Plugin",
    "PoisonedError",
    "Report",
    "Run",
    "SamplerHookError",
    "ShapeMismatchError",
    "Status",
    "Step",
    "SupportsDLPack",
    "Tensor",
    "Text",
    "UnsupportedError",
    "Weights",
    "__version__",
]
