"""What a host is to a plugin. Subclass `Host` and override what you have; the defaults log and lend nothing."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from .tensor import SupportsDLPack, Tensor
from .types import Step

logger = logging.getLogger("sampler_hook")

try:
    __version__ = version("sampler-hook")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0"


class Gradient(ABC):
    """The host's own U-Net, up to a block's output and back (`sampler-hook.gradient/1`).

    Called inside `Run.step`, on its thread. Latents are in VP space whatever the step's space is, with the conditional
    text only.
    """

    @abstractmethod
    def features(self, step: Step, latents: Tensor, tap: str) -> SupportsDLPack:
        """The output [B, C, h, w] of block `tap` for latents [B, c, H, W] of this step. `step.text`, where it is not
        None, replaces the run's. The result is kept alive until `vjp` or `release`.
        """

    @abstractmethod
    def vjp(self, cotangent: Tensor) -> SupportsDLPack:
        """The gradient [B, c, H, W] of sum(cotangent * activation) for the latents of the last `features` call, which
        it ends. `cotangent` has the shape of that call's result.
        """

    def release(self) -> None:  # noqa: B027
        """Drops the last activation without a vjp; nothing when there is none."""


class Weights(ABC):
    """The host's U-Net weights as they are when it samples (`sampler-hook.weights/1`).

    Called inside `prepare`, `begin` and `step`, on their thread.
    """

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """The tensors' diffusers names, such as `"conv_in.weight"`."""

    @abstractmethod
    def revision(self) -> int:
        """Another number whenever a tensor has changed; asked before every run and step."""

    @abstractmethod
    def tensor(self, name: str) -> SupportsDLPack:
        """A tensor, f32, f16 or bf16; read before the next call of this method."""

    def tensor_revision(self, name: str) -> int:
        """Another number whenever this tensor has changed. By default that of all of them."""
        return self.revision()


class Host:
    """A host. Lives at least as long as the plugins that were created with it.

    An exception in any of its methods stops the call in progress, which then raises a `SamplerHookError` with the
    exception as its `__cause__`; one that is no `Exception`, as `KeyboardInterrupt`, comes through as it is.
    """

    name: str = "python"
    version: str = __version__
    gradient: Gradient | None = None
    """The host's own U-Net, where it lends it."""
    weights: Weights | None = None
    """The host's weights, where it lends them."""

    def log(self, level: int, message: str) -> None:
        """A message for the user, of a level of the module `logging` (5: trace). Called on any thread."""
        logger.log(level, "%s", message)

    def cancelled(self) -> bool:
        """True when the user wants the call in progress to stop: it raises `CancelledError`. Called on any thread."""
        return False

    def progress(self, task: str, done: int, total: int) -> None:
        """`done` parts of `total` of a task are finished. Called on any thread."""
