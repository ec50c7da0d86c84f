"""One sampling run: scores latents and corrects them, step by step."""

import contextlib
import logging
from dataclasses import dataclass
from typing import Any

import sampler_hook
import torch

from .adapter import Dpt
from .autograd import Conditioned
from .curves import Range, percent_of
from .evaluations import Evaluations
from .model import alpha_bar, timestep
from .prompts import Prompt
from .report import Item, Record, Report

logger = logging.getLogger("dpt")


@dataclass(frozen=True)
class Settings:
    """What the user chose in DPT Apply."""

    range: Range
    max_correction: float = 0.0
    """Bound on the correction's norm relative to the latents'; 0: none."""
    condition_only: bool = False
    """The authors' release: the positive half of the guidance alone sees the correction."""
    monitor: bool = False
    """Compute scores also in steps that are not corrected."""


@dataclass(frozen=True)
class Now:
    """The evaluation in progress, the first of its step."""

    step: int
    sigma: float
    percent: float
    eta: float
    reason: str
    """Why it is not corrected; empty when it is."""


class Run:
    """Begins at the sampler's first evaluation, since the model is loaded then and prompts are processed."""

    def __init__(self, dpt: Dpt, settings: Settings, report: Report, guider: Any, evaluations: Evaluations) -> None:
        self.dpt, self.settings, self.report, self.guider = dpt, settings, report, guider
        self.evaluations = evaluations
        self.now: Now | None = None
        self._sampling = guider.model_patcher.get_model_object("model_sampling")
        self._begun: sampler_hook.Run | None = None
        self._begun_with: tuple | None = None
        self._texts: dict[tuple, sampler_hook.Text] = {}
        self._in_range = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        self._begun = self.now = None
        self._texts.clear()
        if error[0] is None and self.report.corrected == 0:
            reasons = sorted({record.outcome for record in self.report.records}) or [
                "no positive conditioning was evaluated at the sigma of a step"
            ]
            logger.warning("DPT corrected no step of %d: %s", self.evaluations.count, "; ".join(reasons))

    def see(self, sigma: float) -> Now | None:
        """Told of every evaluation before it is made. None where it is not the first of a step."""
        step, sub_evaluation = self.evaluations.see(sigma)
        self.now = None
        if sub_evaluation:
            return None
        chosen, to_sigma = self.settings.range, self._sampling.percent_to_sigma
        percent = percent_of(sigma, to_sigma)
        eta, reason = 0.0, ""
        if not chosen.holds(sigma, to_sigma):
            reason = f"outside {chosen.start:g} to {chosen.end:g} of sampling"
        else:
            eta = chosen.strength(percent, self._in_range)
            reason = "" if eta else ("eta is 0" if chosen.eta == 0 or self._in_range % chosen.every == 0 else "between two steps")
            self._in_range += 1
        self.now = Now(step, sigma, percent, eta, reason)
        if reason and not self.settings.monitor:
            self.report.records.append(self._record(self.now, 0, reason, None))
        return self.now

    def correct(self, now: Now, prompt: Prompt, latents: torch.Tensor, space: str, options: dict[str, Any], control: bool) -> torch.Tensor:
        """Latents `[B, 4, h, w]` of one prompt's area, corrected; a new tensor, or the same where nothing was corrected.

        `space` is "ve" for ComfyUI's latents and "vp" for the U-Net's input. `options` are the transformer options of this evaluation;
        `control` says that ControlNet takes part.
        """
        if now.reason and not self.settings.monitor:
            return latents
        text = self._text(prompt, latents.shape[0])
        run = self._begin(prompt, text, latents.shape[0])
        params = self.dpt.plugin.params
        params["eta"], params["max_correction"], params["monitor"] = (
            now.eta,
            self.settings.max_correction,
            self.settings.monitor,
        )
        step = sampler_hook.Step(
            index=now.step,
            count=self.evaluations.count,
            timestep=timestep(self._sampling, now.sigma),
            alpha_bar=alpha_bar(now.sigma),
            space=space,
            extra_inputs=self._extra_inputs(prompt, options, control),
            text=None if prompt.key == self._begun_with else text,
        )
        if self.dpt.host_gradient is not None:
            self.dpt.host_gradient.conditioned = self._conditioned(prompt, latents, now.sigma, options)
        working = latents.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
        report = self._step(run, step, working)
        outcome = "corrected" if report.outcome == sampler_hook.Outcome.CORRECTED else (now.reason or report.outcome.name.lower())
        self.report.records.append(self._record(now, prompt.number, outcome, report))
        for number, item in enumerate(report.items):
            if item.status != sampler_hook.Status.OK:
                logger.warning("DPT left item %d of step %d as it was: %s", number, now.step, item.status.name)
        return working.to(latents) if outcome == "corrected" else latents

    def _step(self, run: sampler_hook.Run, step: sampler_hook.Step, latents: torch.Tensor) -> sampler_hook.Report:
        import comfy.model_management

        try:
            return run.step(step, latents)
        except sampler_hook.CancelledError:
            comfy.model_management.throw_exception_if_processing_interrupted()
            raise

    def _begin(self, prompt: Prompt, text: sampler_hook.Text, batch: int) -> sampler_hook.Run:
        """The plugin's run, begun with the first prompt that is corrected."""
        if self._begun is not None and self._begun.batch != batch:
            raise ValueError(f"the batch was {self._begun.batch} latents and is now {batch}: samplers that change it are not supported")
        if self._begun is None:
            self._stack.enter_context(self.dpt.bound(self.guider.model_patcher))
            scale = float(getattr(self.guider, "cfg", 1.0))
            run = self.dpt.plugin.run(batch=batch, steps=self.evaluations.count, guidance_scale=scale, text=text)
            self._begun, self._begun_with = self._stack.enter_context(run), prompt.key
        return self._begun

    def _text(self, prompt: Prompt, batch: int) -> sampler_hook.Text:
        """The prompt's text in main memory, kept for the run: the guider keeps the tensor that its key is the identity of."""
        if prompt.key not in self._texts:
            context, pooled = (tensor.detach().float().cpu().contiguous() for tensor in (prompt.context, prompt.pooled))
            self._texts[prompt.key] = sampler_hook.Text(context=context, pooled=pooled)
        return self._texts[prompt.key]

    def _extra_inputs(self, prompt: Prompt, options: dict[str, Any], control: bool) -> bool:
        """Whether something that the plugin's U-Net does not see takes part. ComfyUI's own U-Net sees patches, but not ControlNet."""
        control = control or prompt.extra_inputs
        if self.dpt.host_gradient is None:
            return control or any(options.get(name) for name in ("patches", "patches_replace"))
        if control and not self.dpt.ignore_extra_inputs:
            raise ValueError(
                "ControlNet and GLIGEN are not seen by the correction: set ignore_extra_inputs in DPT Loader to correct without them"
            )
        return False

    def _conditioned(self, prompt: Prompt, latents: torch.Tensor, sigma: float, options: dict[str, Any]) -> Conditioned:
        model = self.guider.model_patcher.model
        options = {
            **options,
            "cond_or_uncond": [0],
            "uuids": [prompt.uuid],
            "sigmas": torch.full((latents.shape[0],), sigma, device=latents.device),
        }
        dtype = model.manual_cast_dtype or model.get_dtype()
        return Conditioned(model.diffusion_model, dtype, latents.device, prompt.context, options)

    def _record(self, now: Now, prompt: int, outcome: str, report: sampler_hook.Report | None) -> Record:
        items = () if report is None else report.items
        return Record(
            step=now.step,
            sigma=now.sigma,
            timestep=timestep(self._sampling, now.sigma),
            percent=now.percent,
            eta=now.eta,
            prompt=prompt,
            outcome=outcome,
            seconds=0.0 if report is None else report.seconds,
            items=tuple(Item(item.score, item.gradient_norm, item.correction_norm, item.status.name) for item in items),
        )
