"""The hooks that a pipeline samples through."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch

from ..errors import CancelledError, InvalidArgumentError, InvalidStateError, Status, UnsupportedError
from ..host import logger
from ..plugin import Plugin
from ..run import Run
from ..types import Model, Outcome, Report, Step, Text
from ._host import PipelineHost, UNetCall, unet_of
from ._schedule import position, prediction_of
from ._text import TextWatch

Mode = Literal["paper", "condition-only"]
_ABSENT = object()


@dataclass(frozen=True)
class StepReport:
    """What the plugin did before one evaluation of the U-Net."""

    step: Step
    report: Report


class Correction:
    """A plugin in a pipeline, made by `apply`; a context manager that removes it."""

    def __init__(self, pipe: Any, plugin: Plugin, host: PipelineHost, mode: Mode) -> None:
        if mode not in ("paper", "condition-only"):
            raise InvalidArgumentError(f"mode is {mode!r}, expected paper or condition-only")
        self.pipe, self.plugin, self.mode = pipe, plugin, mode
        self.reports: list[StepReport] = []
        """One per evaluation of the U-Net in the last run."""
        self._host = host
        self._run: Run | None = None
        self._text = TextWatch()
        self._context: torch.Tensor | None = None
        self._sample: torch.Tensor | None = None
        self._corrected: torch.Tensor | None = None
        self._on_cpu = False
        self._scheduler: Any = None
        self._scheduler_hooks = ExitStack()
        self._stack = ExitStack()

    def __enter__(self) -> Correction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def scores(self) -> list[list[float]]:
        """Scores before each step's first evaluation in the last run, one per item; NaN where none was computed."""
        first = (entry.report for entry in self.reports if entry.step.sub_evaluation == 0)
        return [[item.score for item in report.items] for report in first]

    def install(self, stack: ExitStack) -> None:
        """Hooks into the pipeline; closing `stack` takes the hooks out."""
        stack.callback(self._scheduler_hooks.close)
        stack.callback(self._end_run)
        self._follow_scheduler()
        stack.callback(self.pipe.unet.register_forward_pre_hook(self._before_unet, with_kwargs=True).remove)
        stack.callback(patch(self.pipe, "encode_prompt", self._encode_prompt))

    def keep(self, stack: ExitStack) -> None:
        """Closes `stack` when it is removed."""
        self._stack = stack

    def remove(self) -> None:
        """Takes everything out: the pipeline is what it was. Nothing when that was done before."""
        self._stack.close()

    # What the pipeline calls, in its order.

    def _encode_prompt(self, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        self._end_run()
        self._follow_scheduler()
        return self._text.encode(self.pipe, original, *arguments, **named)

    def _scale_model_input(self, original: Callable[..., Any], sample: Any, *arguments: Any, **named: Any) -> Any:
        self._sample, self._corrected = sample, None
        return original(sample, *arguments, **named)

    def _before_unet(self, _unet: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Corrects the latents and has the U-Net see them."""
        sample, self._sample = self._sample, None
        if sample is None:
            return None  # not a step of the pipeline
        if len(given) < 2 or given[0].shape != sample.shape or "encoder_hidden_states" not in named:
            raise UnsupportedError("the pipeline calls its U-Net in a way that is not known here")
        timestep, guided = given[1], bool(self.pipe.do_classifier_free_guidance)
        batch = sample.shape[0] // (2 if guided else 1)
        latents = sample[-batch:]
        arguments = _conditional(named, 2 * batch, batch) if guided else dict(named)
        corrected = self._correct(latents, timestep, arguments)
        if corrected is None:
            return None
        if self.mode == "paper":
            self._corrected = corrected
        first = corrected if self.mode == "paper" else latents
        both = torch.cat([first, corrected]) if guided else corrected
        # The wrapped function, without our hook: the scheduler is not a step further.
        return (self._scale(both, timestep), *given[1:]), named

    def _step(
        self, original: Callable[..., Any], output: Any, timestep: Any, sample: Any, *arguments: Any, **named: Any
    ) -> Any:
        corrected, self._corrected = self._corrected, None
        stepped = original(output, timestep, sample if corrected is None else corrected, *arguments, **named)
        if self._run is not None and self.reports and self.reports[-1].step.index == self.reports[-1].step.count - 1:
            self._end_run()  # the last step has one evaluation, whatever the scheduler
        return stepped

    # One step.

    def _correct(self, latents: torch.Tensor, timestep: Any, arguments: dict[str, Any]) -> torch.Tensor | None:
        """Corrected latents [B, C, h, w], or None when they are as they were."""
        context = arguments["encoder_hidden_states"]
        if self._run is None:
            self._begin_run(latents.shape[0], context)
        elif not _same(context, self._context):
            raise UnsupportedError("the prompt embeddings were changed within a run, which the plugin cannot follow")
        at = position(self._scheduler, timestep)
        step = Step(
            index=at.index,
            count=self._scheduler.num_inference_steps,
            timestep=float(timestep),
            alpha_bar=at.alpha_bar,
            space=at.space,
            sub_evaluation=at.sub_evaluation,
            extra_inputs=any(arguments.get(name) is not None for name in _EXTRA_INPUTS),
        )
        self._host.gradient.call = UNetCall(timestep, {**arguments, "return_dict": False})
        target = latents.detach().to("cpu" if self._on_cpu else latents.device, copy=True).contiguous()
        assert self._run is not None
        try:
            report = self._run.step(step, target)
        except CancelledError as error:
            if error.__cause__ is None and self._host.cancelled():  # the pipeline does nothing more with its latents
                return None
            raise
        finally:
            self._host.gradient.call = None
        self.reports.append(StepReport(step, report))
        for item, found in enumerate(report.items):
            if found.status != Status.OK:
                logger.warning("step %d, item %d: not corrected (%s)", step.index, item, found.status.name)
        return target.to(latents.device) if report.outcome == Outcome.CORRECTED else None

    def _begin_run(self, batch: int, context: torch.Tensor) -> None:
        pooled = self._text.pooled
        if pooled is None and self.plugin.needs.pooled:
            raise UnsupportedError("prompt_embeds without a prompt: the plugin needs the pooled text, so give a prompt")
        if pooled is not None and pooled.shape[0] != batch:
            raise UnsupportedError(f"{pooled.shape[0]} prompts for a batch of {batch}")
        self._context = context
        text = Text(context=self._lend(context), pooled=None if pooled is None else self._lend(pooled))
        self._host.weights.refresh()
        self.reports = []
        guided = self.pipe.do_classifier_free_guidance
        self._run = self.plugin.run(
            batch=batch,
            steps=self._scheduler.num_inference_steps,
            guidance_scale=float(self.pipe.guidance_scale) if guided else 1.0,
            text=text,
        )

    def _lend(self, value: torch.Tensor) -> torch.Tensor:
        return value.detach().to("cpu") if self._on_cpu else value.detach()

    def _end_run(self) -> None:
        run, self._run = self._run, None
        self._sample = self._corrected = self._context = None
        if run is not None:
            run.end()

    # The model.

    def _follow_scheduler(self) -> None:
        """Hooks into the scheduler that the pipeline has now, and prepares the plugin for it."""
        scheduler = self.pipe.scheduler
        if scheduler is self._scheduler:
            return
        prediction = prediction_of(scheduler)
        if "scale_model_input" in vars(scheduler):
            raise InvalidStateError(
                "something else hooks into the pipeline's scheduler; is another plugin applied to it?"
            )
        self._prepare(prediction)
        self._scheduler_hooks.close()
        self._scheduler, self._scale = scheduler, scheduler.scale_model_input
        self._scheduler_hooks.callback(patch(scheduler, "scale_model_input", self._scale_model_input))
        self._scheduler_hooks.callback(patch(scheduler, "step", self._step))

    def _prepare(self, prediction: Any) -> None:
        unet = unet_of(self.pipe)
        config = {key: value for key, value in dict(unet.config).items() if not key.startswith("_")}
        model = Model(
            prediction=prediction,
            family="sd2" if unet.config.use_linear_projection else "sd1",
            alphas_cumprod=self.pipe.scheduler.alphas_cumprod,
            unet_in_channels=unet.config.in_channels,
            latent_channels=self.pipe.vae.config.latent_channels,
            unet_config=config,
        )
        device = self.pipe._execution_device
        self._on_cpu = device.type == "cpu"
        if not self._on_cpu:
            try:
                self.plugin.prepare(model, device)
                return
            except UnsupportedError as error:
                logger.warning("latents go through main memory: %s", error)
                self._on_cpu = True
        self.plugin.prepare(model, "cpu")


def _same(value: torch.Tensor, known: torch.Tensor | None) -> bool:
    if known is None or value.shape != known.shape:
        return False
    return value.data_ptr() == known.data_ptr() or torch.equal(value, known)


_EXTRA_INPUTS = ("added_cond_kwargs", "timestep_cond", "class_labels", "down_block_additional_residuals")


def _conditional(value: Any, rows: int, batch: int) -> Any:
    """The last `batch` rows of every tensor that has `rows` of them: the conditional half of the guidance."""
    if isinstance(value, torch.Tensor):
        return value[-batch:] if value.ndim > 0 and value.shape[0] == rows else value
    if isinstance(value, dict):
        return {key: _conditional(entry, rows, batch) for key, entry in value.items()}
    return type(value)(_conditional(e, rows, batch) for e in value) if isinstance(value, list | tuple) else value


def patch(owner: Any, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Puts `wrapper(original, ...)` in place of a method of one object; the result puts back what was there."""
    before = vars(owner).get(name, _ABSENT)
    original = getattr(owner, name)

    @functools.wraps(original)  # diffusers looks at the signature
    def wrapped(*arguments: Any, **named: Any) -> Any:
        return wrapper(original, *arguments, **named)

    setattr(owner, name, wrapped)

    def undo() -> None:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo
