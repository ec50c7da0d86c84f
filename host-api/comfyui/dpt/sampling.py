"""Where the correction hooks into ComfyUI.

An `OUTER_SAMPLE` wrapper gives the guider a copy of the sampler whose function sees the model through `CorrectedModel`: it is told of
every evaluation, with the latents that the sampler goes on from. In the paper's mode these are corrected in place (Eq. 9), before the
model sees them. In the mode condition-only a `DIFFUSION_MODEL` wrapper corrects the rows of the positive conditionings in the U-Net's
input, which is z in VP space, and the sampler's latents stay; a `CALC_COND_BATCH` wrapper tells which rows these are.
"""

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .adapter import Dpt
from .evaluations import Evaluations, refusal
from .prompts import active, blend, prompt_of
from .report import Report
from .run import Run, Settings

logger = logging.getLogger("dpt")


class Correction:
    """One DPT Apply. Its wrappers go with the MODEL and its clones; a run at a time."""

    def __init__(self, dpt: Dpt, settings: Settings) -> None:
        self.dpt, self.settings, self.report = dpt, settings, Report()
        self._run: Run | None = None
        self._positive: int | None = None

    def attach(self, patcher: Any) -> None:
        """Adds the wrappers to a patcher."""
        from comfy.patcher_extension import WrappersMP

        # All of them in every mode: ComfyUI compares the wrappers of two clones by the kinds that the first has.
        patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "dpt", self.outer_sample)
        patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "dpt", self.calc_cond_batch)
        patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "dpt", self.diffusion_model)

    def outer_sample(self, executor: Any, noise: torch.Tensor, latent_image: Any, sampler: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Wraps `CFGGuider.outer_sample`: samples with a corrected copy of the sampler."""
        guider = executor.class_obj
        if not guider.conds.get("positive"):
            raise ValueError("the guider has no positive conditioning, which DPT scores")
        return executor(noise, latent_image, self.corrected(sampler, guider), *args, **kwargs)

    def corrected(self, sampler: Any, guider: Any) -> Any:
        """A copy of a sampler that corrects as it samples."""
        function = getattr(sampler, "sampler_function", None)
        if function is None:
            raise ValueError(f"the sampler is a {type(sampler).__name__}, which has no function that could be corrected; choose a KSAMPLER")
        name = getattr(function, "__name__", type(function).__name__)
        reason = refusal(name, self.settings.condition_only)
        if reason:
            raise ValueError(reason)

        @functools.wraps(function)
        def sample(model: Any, x: torch.Tensor, sigmas: torch.Tensor, *args: Any, callback: Any = None, **kwargs: Any) -> torch.Tensor:
            evaluations = Evaluations(sigmas.tolist(), name, kwargs)
            with self._running(guider, evaluations, name) as run:
                seen = CorrectedModel(model, self, run)
                result = function(seen, x, sigmas, *args, callback=seen.watch(callback), **kwargs)
                if seen.unseen:
                    logger.warning("DPT could not see that the sampler %s goes on from the corrected latents", name)
                return result

        other = copy.copy(sampler)
        other.sampler_function = sample
        return other

    @contextlib.contextmanager
    def _running(self, guider: Any, evaluations: Evaluations, name: str) -> Iterator[Run]:
        if self._run is not None:
            raise RuntimeError("DPT Apply is in a run already: a sampler within a sampler needs a DPT Apply of its own")
        short = name.removeprefix("sample_").removesuffix("_function")
        self.report.start(short, evaluations.count, "condition-only" if self.settings.condition_only else "paper")
        self._run = Run(self.dpt, self.settings, self.report, guider, evaluations)
        try:
            with self._run as run:
                yield run
        finally:
            self._run = self._positive = None

    def evaluate(self, run: Run, x: torch.Tensor, sigma: torch.Tensor, seen: Callable[[], torch.Tensor], options: dict) -> bool:
        """Before an evaluation at sigma `[B]`: corrects the sampler's latents `x` in place, and says whether it did. `seen` gives them
        as the model will see them, which differs from `x` under a noise mask."""
        now = run.see(_one(sigma))
        if now is None or self.settings.condition_only or (now.reason and not self.settings.monitor):
            return False
        latents = seen()
        prompts = active(run.guider.conds["positive"], latents, sigma)
        transformer = options.get("transformer_options", {})
        parts = [latents[(slice(None), slice(None), *prompt.area)] for prompt in prompts]
        corrected = [run.correct(now, prompt, part, "ve", transformer, False) for prompt, part in zip(prompts, parts, strict=True)]
        if all(new is old for new, old in zip(corrected, parts, strict=True)):
            return False
        result = blend(latents, prompts, corrected)
        if latents is x:
            x.copy_(result)
        else:
            x.add_(result - latents)
        return True

    def calc_cond_batch(self, executor: Any, model: Any, conds: list, x_in: torch.Tensor, timestep: torch.Tensor, options: dict) -> list:
        """Wraps `calc_cond_batch`: which of the lists of conditionings is the positive one. Guidance of other nodes' making also
        evaluates the negative one alone."""
        if self._run is None or not self.settings.condition_only:
            return executor(model, conds, x_in, timestep, options)
        positive = self._run.guider.conds["positive"]
        self._positive = next((place for place, entries in enumerate(conds) if entries is positive), None)
        try:
            return executor(model, conds, x_in, timestep, options)
        finally:
            self._positive = None

    def diffusion_model(
        self,
        executor: Any,
        z: torch.Tensor,
        timesteps: Any,
        context: Any = None,
        y: Any = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Wraps the U-Net: corrects the rows of the positive conditionings in its input, z in VP space."""
        options = transformer_options if transformer_options is not None else {}
        run, now = self._run, self._run.now if self._run is not None else None
        if run is not None and now is not None and self._positive is not None and not (now.reason and not self.settings.monitor):
            positive, kinds, uuids = run.guider.conds["positive"], options["cond_or_uncond"], options["uuids"]
            chunks = list(z.chunk(len(kinds)))
            for place, (kind, uuid) in enumerate(zip(kinds, uuids, strict=True)):
                if kind == self._positive:
                    number = next(number for number, entry in enumerate(positive) if entry["uuid"] == uuid)
                    prompt = prompt_of(positive, number, chunks[place], options["sigmas"], cropped=True)
                    chunks[place] = run.correct(now, prompt, chunks[place], "vp", options, control is not None)
            z = torch.cat(chunks)
        return executor(z, timesteps, context, y, control, options, **kwargs)


class CorrectedModel:
    """The model as the sampler's function sees it: an evaluation at latents and sigma, corrected before."""

    def __init__(self, inner: Any, correction: Correction, run: Run) -> None:
        self._inner, self._correction, self._run = inner, correction, run
        self._last: torch.Tensor | None = None
        self._is_seen: bool | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        denoise_mask: Any = None,
        model_options: dict | None = None,
        seed: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        options = model_options or {}

        def seen() -> torch.Tensor:
            return x if denoise_mask is None else self._masked(x, sigma, denoise_mask, options)

        if self._correction.evaluate(self._run, x, sigma, seen, options):
            self._last = x
        return self._inner(x, sigma, denoise_mask=denoise_mask, model_options=options, seed=seed, **kwargs)

    def _masked(self, x: torch.Tensor, sigma: torch.Tensor, mask: torch.Tensor, options: dict) -> torch.Tensor:
        """Latents under a noise mask as ComfyUI's KSamplerX0Inpaint shows them to the model."""
        inner = self._inner
        if "denoise_mask_function" in options:
            mask = options["denoise_mask_function"](sigma, mask, extra_options={"model": inner.inner_model, "sigmas": inner.sigmas})
        known = inner.inner_model.inner_model.scale_latent_inpaint(x=x, sigma=sigma, noise=inner.noise, latent_image=inner.latent_image)
        return x * mask + known * (1.0 - mask)

    def watch(self, callback: Any) -> Any:
        """A sampler's callback that also looks whether the step goes on from the latents that were corrected."""

        def called(state: dict[str, Any]) -> Any:
            if self._last is not None and isinstance(state.get("x"), torch.Tensor):
                self._is_seen = bool(self._is_seen) or state["x"].data_ptr() == self._last.data_ptr()
                self._last = None
            return None if callback is None else callback(state)

        return called

    @property
    def unseen(self) -> bool:
        """Whether latents were corrected and the sampler's callback never showed them."""
        return self._is_seen is False or (self._is_seen is None and self._last is not None)


def _one(sigma: torch.Tensor) -> float:
    values = set(sigma.flatten().tolist())
    if len(values) != 1:
        raise ValueError(f"the sampler evaluates latents at several sigmas at once ({sorted(values)}), which DPT does not correct")
    return values.pop()
