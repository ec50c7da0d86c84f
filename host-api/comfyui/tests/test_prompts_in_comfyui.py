"""Batches, prompts with areas and masks, noise masks and guiders."""

import os

import pytest
import torch

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("COMFYUI_PATH names no checkout of ComfyUI", allow_module_level=True)

import comfy.model_base
import comfy.samplers
import tiny
from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG
from corrected import EMPTY, OTHER, PROMPT, SD1, STEPS, apply, first_step_by_hand, load, recorded_run
from tiny import relative

pytestmark = pytest.mark.usefixtures("adapters")


# Batches, prompts and masks.


def test_splitting_the_batch_by_memory_changes_nothing(monkeypatch):
    whole = {mode: recorded_run(apply(SD1.patcher(), load(), mode=mode)[0]) for mode in ("paper", "condition-only")}
    seen = []
    original = comfy.samplers.cond_cat
    monkeypatch.setattr(comfy.samplers, "cond_cat", lambda entries: (seen.append(len(entries)), original(entries))[1])
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *_args, **_kwargs: 1e30)
    for mode, expected in whole.items():
        assert relative(recorded_run(apply(SD1.patcher(), load(), mode=mode)[0]), expected) < 1e-5
    assert set(seen) == {1}


@pytest.mark.parametrize("mode", ["paper", "condition-only"])
def test_contexts_of_other_lengths(mode):
    """A negative prompt of two chunks: ComfyUI repeats the positive one to the same length, or samples them apart."""
    [[context, options]] = SD1.conditioning(EMPTY)
    negative = [[torch.cat([context, context], dim=1), options]]
    once = recorded_run(apply(SD1.patcher(), load(), mode=mode)[0])
    assert relative(recorded_run(apply(SD1.patcher(), load(), mode=mode)[0], negative=negative), once) < 1e-4


@pytest.mark.parametrize("mode", ["paper", "condition-only"])
def test_the_same_prompt_twice_is_the_prompt(mode):
    once = recorded_run(apply(SD1.patcher(), load(), mode=mode)[0])
    positive = SD1.conditioning(PROMPT) + SD1.conditioning(PROMPT)
    positive[1][1]["strength"] = 0.5
    patched, report = apply(SD1.patcher(), load(), mode=mode)
    assert relative(recorded_run(patched, positive=positive), once) < 1e-4
    assert {record.prompt for record in report.records} == {0, 1}


@pytest.mark.parametrize("mode", ["paper", "condition-only"])
def test_prompts_with_areas_are_each_scored_on_theirs(mode):
    """Left and right half with prompts of their own. Only the left one is corrected when the right has no weight."""
    left, right = SD1.conditioning(PROMPT), SD1.conditioning(OTHER)
    left[0][1]["area"], right[0][1]["area"] = (16, 8, 0, 0), (16, 8, 0, 8)
    patched, report = apply(SD1.patcher(), load(), mode=mode, every=1000)
    states = []
    recorded_run(patched, positive=left + right, callback=lambda i, denoised, x, n: states.append(x.clone()))
    first = [record for record in report.records if record.step == 0]
    assert [record.prompt for record in first] == ([0, 1] if mode == "paper" else [record.prompt for record in first])
    assert sorted(record.prompt for record in first) == [0, 1]
    # Each with its own text: as when it is the only one.
    for number, only in enumerate((left, right)):
        alone, other = apply(SD1.patcher(), load(), mode=mode, every=1000)
        recorded_run(alone, positive=only)
        [together] = [record for record in first if record.prompt == number]
        assert [item.score for item in together.items] == pytest.approx([item.score for item in other.records[0].items], rel=1e-4)
    if mode == "paper":
        recorded, _ = SD1.correction("mid")
        scale = (float(tiny.ddim_sigmas(STEPS)[0]) ** 2 + 1) ** 0.5
        moved = states[0] / scale - recorded["start"]
        norms = torch.stack([moved[..., :8].flatten(1).norm(dim=1), moved[..., 8:].flatten(1).norm(dim=1)])
        reported = torch.tensor([[item.correction_norm for item in record.items] for record in first])
        assert relative(norms, reported) < 1e-4


def test_prompts_of_time_ranges_take_turns():
    first, second = SD1.conditioning(PROMPT), SD1.conditioning(OTHER)
    first[0][1].update(start_percent=0.0, end_percent=0.5)
    second[0][1].update(start_percent=0.5, end_percent=1.0)
    patched, report = apply(SD1.patcher(), load())
    recorded_run(patched, positive=first + second)
    # Timesteps 831 and 665 are before half of sampling, which is 499.5.
    assert [record.prompt for record in report.records] == [0, 0, 1, 1, 1, 1]


def test_an_area_of_the_negative_prompt_alone_does_not_change_what_is_scored():
    """ComfyUI gives it a positive partner with the negative's own options."""
    negative = SD1.conditioning(EMPTY) + SD1.conditioning(OTHER)
    negative[1][1]["area"] = (16, 8, 0, 0)
    negative[1][1]["pooled_output"] = torch.full((1, 32), float("nan"))
    patched, report = apply(SD1.patcher(), load())
    assert recorded_run(patched, negative=negative).isfinite().all()
    assert report.corrected == STEPS


@pytest.mark.parametrize("soft", [False, True])
def test_a_noise_mask(soft):
    """Corrected at the first step alone, under a mask: the run from the start that is corrected by what the model saw."""
    recorded, _ = SD1.correction("mid")
    start, sigmas = recorded["start"], tiny.ddim_sigmas(STEPS)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 2:14] = 0.6 if soft else 1.0
    latent = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3)) / 0.18215
    shared = {"sigmas": sigmas, "denoise_mask": mask, "latent": latent}
    tuned, _ = apply(SD1.patcher(), load(), eta=0.0)
    patched, report = apply(SD1.patcher(), load(), every=1000)
    found, uncorrected = recorded_run(patched, **shared), recorded_run(tuned, **shared)
    assert [record.step for record in report.records if record.outcome == "corrected"] == [0]
    # The sampler's latents are noise * sigma + latent, and so is what the mask hides.
    sigma = float(sigmas[0])
    noisy = start * sigma + latent * 0.18215
    corrected = first_step_by_hand(noisy / (sigma**2 + 1) ** 0.5, sigmas[0], 20.0) * (sigma**2 + 1) ** 0.5
    # The same noise for what the mask hides, and latents that differ where it does not.
    states = []

    class FromCorrected:
        def __call__(self, model, x, sigmas, **kwargs):
            states.append(x)
            return comfy.samplers.k_diffusion_sampling.sample_euler(model, corrected.clone(), sigmas, **kwargs)

    expected = recorded_run(tuned, sampler=comfy.samplers.KSAMPLER(FromCorrected()), **shared)
    assert relative(states[0], noisy) < 1e-5
    assert relative(found - uncorrected, expected - uncorrected) < 1e-2
    assert relative(expected, uncorrected) > 1e-4
    if not soft:
        inside = (mask > 0).expand_as(found)
        sigma_end = float(sigmas[-1])
        hidden = (start * sigma_end + latent * 0.18215) / (sigma_end**2 + 1) ** 0.5
        assert (found[~inside] - hidden[~inside]).abs().max() < 0.1


@pytest.mark.parametrize("mode", ["paper", "condition-only"])
def test_guiders(mode):
    """Without a negative prompt, and with two: the positive one is scored."""
    recorded, _ = SD1.correction("mid")
    start, sigmas, latent = recorded["start"], tiny.ddim_sigmas(STEPS), torch.zeros(2, 4, 16, 16)
    positive, negative = SD1.conditioning(PROMPT), SD1.conditioning(EMPTY)
    for kind in (Guider_Basic, Guider_DualCFG):
        patched, report = apply(SD1.patcher(), load(), mode=mode)
        guider = kind(patched)
        if kind is Guider_Basic:
            guider.set_conds(positive)
        else:
            guider.set_conds(positive, SD1.conditioning(OTHER), negative)
            guider.set_cfg(5.0, 2.0)
        with torch.inference_mode():
            guider.sample(start.clone(), latent, comfy.samplers.ksampler("euler"), sigmas, disable_pbar=True, seed=0)
        assert report.corrected == STEPS
        # The first step sees the same latents in every run, and so gives the same score.
        scores = torch.tensor([item.score for item in report.records[0].items])
        reference, other = apply(SD1.patcher(), load(), mode=mode)
        recorded_run(reference, start=start * float(sigmas[0]) / (float(sigmas[0]) ** 2 + 1) ** 0.5)
        assert relative(scores, torch.tensor([item.score for item in other.records[0].items])) < 1e-4
