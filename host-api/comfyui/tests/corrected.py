"""Corrected runs of the tiny models in ComfyUI."""

import sampler_hook
import tiny
from tiny import Tiny

from dpt import nodes

STEPS = 6
SD1 = Tiny("sd1")
PROMPT, OTHER, EMPTY = 0, 1, 6
"""Numbers of prompts in text.json."""


def load(model=SD1, tap="mid", **changes):
    changes = {"gradient": "host", **changes}
    [dpt] = nodes.load(adapter=str(model.cases / f"release_{tap}.safetensors"), **{**model.loader(tap), **changes})
    return dpt


def apply(patcher, dpt, **changes):
    settings = {
        "eta": 20.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "every": 1,
        "curve": "constant",
        "max_correction": 0.0,
        "mode": "paper",
        "monitor": False,
    }
    return nodes.apply(patcher, dpt, **{**settings, **changes})


def recorded_run(patcher, model=SD1, tap="mid", **changes):
    """The recorded run's start, schedule and prompts, sampled by ComfyUI."""
    recorded, settings = model.correction(tap)
    arguments = {
        "start": recorded["start"],
        "sigmas": tiny.ddim_sigmas(STEPS),
        "positive": model.conditioning(PROMPT),
        "negative": model.conditioning(EMPTY),
        "cfg": settings["guidance"],
    }
    return tiny.run(patcher, **{**arguments, **changes})


def weights_of(patcher):
    return {name: weight.clone() for name, weight in patcher.model.diffusion_model.state_dict().items()}


def first_step_by_hand(start, sigma, eta):
    """The start corrected once, in VP space, by the plugin with its own U-Net from the folder."""
    config = {"adapter": SD1.cases / "release_mid.safetensors", "tap": "mid", "heads": 4, "matching_queries": 5}
    with sampler_hook.Library.open().create("dpt", {**config, "base_model": SD1.folder, "eta": eta}) as plugin:
        sampling = SD1.patcher().get_model_object("model_sampling")
        plugin.prepare(sampler_hook.Model(prediction="epsilon", family="sd1", alphas_cumprod=[0.5]))
        [[context, options]] = SD1.conditioning(PROMPT, batch=len(start))
        text = sampler_hook.Text(context=context, pooled=options["pooled_output"])
        timestep = float(sampling.timestep(sigma))
        step = sampler_hook.Step(index=0, count=1, timestep=timestep, alpha_bar=float(1 / (sigma**2 + 1)))
        corrected = start.clone()
        with plugin.run(batch=len(start), steps=1, text=text) as run:
            run.step(step, corrected)
    return corrected
