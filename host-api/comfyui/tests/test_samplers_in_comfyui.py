"""Every sampler of ComfyUI's list, and its sampler nodes."""

import logging
import os

import pytest
import torch

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("COMFYUI_PATH names no checkout of ComfyUI", allow_module_level=True)

import comfy.samplers
import nodes as comfy_nodes
from corrected import EMPTY, PROMPT, SD1, STEPS, apply, first_step_by_hand, load, recorded_run
from tiny import relative

from dpt.evaluations import OWN_SCHEDULE, PREDICTOR_CORRECTOR

pytestmark = pytest.mark.usefixtures("adapters")


def refused(name):
    return name in {short.removeprefix("sample_").removesuffix("_function") for short in OWN_SCHEDULE | PREDICTOR_CORRECTOR}


def tuned_run(name, corrected_start):
    """A run of three steps with the LoRA alone, from the recorded start or that start corrected."""
    start = SD1.correction("mid")[0]["start"][:1]
    start = first_step_by_hand(start, SHORT[0], 20.0) if corrected_start else start
    tuned, _ = apply(SD1.patcher(), load(), eta=0.0)
    return recorded_run(tuned, start=start, sigmas=SHORT, sampler=name)


SHORT = torch.tensor([9.0, 3.1, 0.8, 0.0])
"""A schedule whose steps are uneven, so that a sampler's intermediate sigmas are none of the next."""


@pytest.mark.parametrize("name", comfy.samplers.KSAMPLER_NAMES)
def test_every_sampler_goes_on_from_the_corrected_latents(name):
    """A run that is corrected at its first step alone is the run from the corrected start."""
    patched, report = apply(SD1.patcher(), load(), every=1000)
    start = SD1.correction("mid")[0]["start"][:1]
    if refused(name):
        with pytest.raises(ValueError, match=r"own sigmas|would be lost"):
            recorded_run(patched, start=start, sigmas=SHORT, sampler=name)
        return
    found = recorded_run(patched, start=start, sigmas=SHORT, sampler=name)
    assert [record.outcome for record in report.records] == ["corrected", "between two steps", "between two steps"]
    assert [record.step for record in report.records] == [0, 1, 2]
    uncorrected, expected = tuned_run(name, corrected_start=False), tuned_run(name, corrected_start=True)
    # Some samplers amplify rounding more than others.
    assert relative(found - uncorrected, expected - uncorrected) < 1e-2
    assert relative(expected, uncorrected) > 1e-3


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "heunpp2", "dpmpp_sde", "seeds_3", "uni_pc", "sa_solver_pece"])
def test_condition_only_corrects_the_first_evaluation_of_every_step(name):
    patched, report = apply(SD1.patcher(), load(), mode="condition-only")
    sampler = {"uni_pc": comfy.samplers.sampler_object("uni_pc")}.get(name)
    recorded_run(patched, sampler=sampler or name)
    assert [record.step for record in report.records] == list(range(STEPS))
    assert report.corrected == STEPS


def test_churned_steps_are_corrected():
    patched, report = apply(SD1.patcher(), load())
    for name in ("euler", "heun", "dpm_2"):
        recorded_run(patched, sampler=name, options={"s_churn": 3.0})
        assert report.corrected == STEPS, name


def test_uni_pc_is_refused_by_its_own_name():
    patched, _ = apply(SD1.patcher(), load())
    with pytest.raises(ValueError, match="unipc evaluates a prediction"):
        recorded_run(patched, sampler=comfy.samplers.sampler_object("uni_pc"))


def test_a_sampler_that_loses_the_correction_is_told_of(caplog):
    def sample_elsewhere(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i, sigma in enumerate(sigmas[:-1]):
            denoised = model(x.clone(), sigma * x.new_ones([x.shape[0]]), **extra_args)
            callback({"x": x, "i": i, "denoised": denoised})
        return x

    patched, _ = apply(SD1.patcher(), load())
    with caplog.at_level(logging.WARNING):
        recorded_run(patched, sampler=comfy.samplers.KSAMPLER(sample_elsewhere))
    assert "could not see that the sampler sample_elsewhere goes on" in caplog.text


# ComfyUI's own sampler nodes.


def ksampler(patcher, latent, **steps):
    """KSampler (Advanced) with the recorded prompts; latents as ComfyUI's LATENT has them."""
    with torch.inference_mode():
        positive, negative = SD1.conditioning(PROMPT), SD1.conditioning(EMPTY)
        arguments = (7, 6, 5.0, "euler", "normal", positive, negative, {"samples": latent})
        return comfy_nodes.common_ksampler(patcher, *arguments, **steps)[0]["samples"]


@pytest.mark.parametrize("mode", ["paper", "condition-only"])
def test_two_samplers_of_half_the_steps_are_one_of_all(mode):
    latent = torch.zeros(1, 4, 16, 16)
    patched, report = apply(SD1.patcher(), load(), mode=mode, curve="linear", start_percent=0.1, end_percent=0.9)
    whole = ksampler(patched, latent)
    etas = [record.eta for record in report.records]
    first = ksampler(patched, latent, start_step=0, last_step=3)
    halves = [record.eta for record in report.records]
    second = ksampler(patched, first, disable_noise=True, start_step=3, last_step=6)
    halves += [record.eta for record in report.records]
    assert relative(second, whole) < 1e-5
    assert halves == pytest.approx(etas)
    assert relative(whole, ksampler(apply(SD1.patcher(), load(), eta=0.0)[0], latent)) > 1e-3
