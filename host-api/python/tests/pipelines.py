"""Tiny pipelines, and sampling by hand: diffusers' loop, with Eq. 9 by autograd of the reference adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import torch
from conftest import PARITY, PROMPT, Case, load_safetensors

sys.path.insert(0, str(PARITY))
from dpt_reference import Adapter

ETA, GUIDANCE = 20.0, 5.0
# The models are so small that threads of a machine with more to do would only wait for each other.
torch.set_num_threads(1)


def pipeline(case: Case, scheduler: str | None = None, kind: str = "StableDiffusionPipeline", **config: Any) -> Any:
    """The case's pipeline, quiet, with a scheduler of another class on the same configuration."""
    pipe = getattr(diffusers, kind).from_pretrained(case.model_path)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.float()
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **config)
    return pipe


def draw(pipe: Any, case: Case, steps: int = 6, prompt: Any = None, **more: Any) -> np.ndarray:
    """Latents after a run from the case's start."""
    start = torch.from_numpy(case.start.copy()).to(pipe.unet.dtype)
    size = {} if "image" in more else {"height": 128, "width": 128, "latents": start}
    prompts = [PROMPT] * 2 if prompt is None else prompt
    known = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "latent", **size, **more}
    return pipe(prompts, **known).images.float().cpu().numpy()


@contextmanager
def merged(pipe: Any, case: Case) -> Iterator[None]:
    """The pipeline with the released LoRA merged by hand."""
    lora, before = load_safetensors(case.adapter), {}
    with torch.no_grad():
        for name, down in lora.items():
            if name.endswith("_lora.down.weight"):
                path, projection = name.removeprefix("unet.").removesuffix("_lora.down.weight").rsplit(".processor.", 1)
                linear = pipe.unet.get_submodule(f"{path}.{'to_out.0' if projection == 'to_out' else projection}")
                before[linear] = linear.weight.clone()
                linear.weight += torch.from_numpy(lora[name.replace(".down.", ".up.")] @ down)
    yield
    with torch.no_grad():
        for linear, weight in before.items():
            linear.weight.copy_(weight)


def reference(
    pipe: Any,
    case: Case,
    steps: int = 6,
    prompts: Any = None,
    mode: str = "paper",
    first: Any = None,
    guidance: float = 5,
) -> tuple[np.ndarray, list[list[float]]]:
    """Final latents and scores. `first`: whether an evaluation, by its place, is a step's first."""
    weights = {name: torch.from_numpy(value) for name, value in load_safetensors(case.adapter).items()}
    weights = {name: value for name, value in weights.items() if not name.startswith("unet.")}
    channels = weights["input_proj.weight"].shape[1]
    sizes = {"d": 32, "heads": 4, "ff": 64, "enc": 1, "dec": 1, "matching": 5, "grounding": 7}
    adapter = Adapter(channels, **sizes, clip_dim=32, classes=256, align=16, text_dim=24).eval()
    adapter.load_state_dict(weights)
    ids = pipe.tokenizer(
        prompts or [PROMPT] * 2, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    ids, x, scores = ids.input_ids, torch.from_numpy(case.start.copy()), []
    empty = pipe.tokenizer([""] * 2, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        context, uncond = pipe.text_encoder(ids)[0], pipe.text_encoder(empty)[0]
    pooled = context[torch.arange(2), (ids == 1023).int().argmax(1)]
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    for place, t in enumerate(scheduler.timesteps):
        c = scheduler.scale_model_input(torch.ones(1), t)
        corrected = x
        if first is None or first(place):
            z = (c * x).requires_grad_()
            kept: list[torch.Tensor] = []
            keep = pipe.unet.mid_block.register_forward_hook(lambda _m, _i, output, kept=kept: kept.append(output))
            pipe.unet(z, t, encoder_hidden_states=context)
            keep.remove()
            score = adapter.score(kept[0], t.repeat(2), pooled)
            corrected = x + ETA / c * torch.autograd.grad(score.sum(), z)[0]
            scores.append(score.tolist())
        start = corrected if mode == "paper" else x
        with torch.no_grad():
            noise = pipe.unet(scheduler.scale_model_input(corrected, t), t, encoder_hidden_states=context).sample
            if guidance != 1:
                other = pipe.unet(scheduler.scale_model_input(start, t), t, encoder_hidden_states=uncond).sample
                noise = other + guidance * (noise - other)
            x = scheduler.step(noise, t, start).prev_sample
    return x.numpy(), scores
