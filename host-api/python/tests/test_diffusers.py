"""Corrected pictures of diffusers' pipelines are those of PyTorch's reference and of the Rust host."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LIBRARY, PROMPT, ROOT, Case, relative_error

import sampler_hook as sh

for name in ("torch", "diffusers", "transformers"):
    pytest.importorskip(name)
import torch
from pipelines import ETA, draw, merged, pipeline, reference

import sampler_hook.diffusers as shd

WHOLE_RUN = 1e-3
HOST_DEMO = Path(os.environ.get("HOST_DEMO") or ROOT / "target" / "release" / "host-demo")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("tap", ["mid", "up1"])
def test_corrected_runs_are_pytorchs(family: str, tap: str, library: sh.Library) -> None:
    case = Case(family, tap)
    pipe = pipeline(case)
    assert relative_error(draw(pipe, case), case.tensors["latents.plain"][-1]) < WHOLE_RUN
    sources = ["host", "plugin"] + (["weights"] if library.abi >= (0, 3) else [])
    for mode, key in [("paper", "paper"), ("condition-only", "condition")]:
        found = []
        for gradient in sources:
            with shd.apply(
                pipe, case.config(gradient="host"), mode=mode, gradient=gradient, library=library
            ) as correction:
                found.append(draw(pipe, case))
            expected = case.tensors[f"latents.{key}"][-1]
            lora = case.tensors["latents.lora"][-1]
            assert relative_error(found[-1], expected) < WHOLE_RUN
            assert relative_error(found[-1] - lora, expected - lora) < 1e-2
            assert relative_error(np.array(correction.scores), case.tensors[f"scores.{key}"]) < 1e-3
            assert all(entry.report.outcome == sh.Outcome.CORRECTED for entry in correction.reports)
        for other in found[1:]:
            assert relative_error(other, found[0]) < 5e-5


@pytest.mark.parametrize(
    ("scheduler", "config", "first"),
    [
        ("DDIMScheduler", {}, None),
        ("PNDMScheduler", {"skip_prk_steps": True}, lambda place: place != 1),
        ("EulerDiscreteScheduler", {}, None),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, None),
        ("LMSDiscreteScheduler", {}, None),
        ("HeunDiscreteScheduler", {}, lambda place: place % 2 == 0),
        ("KDPM2DiscreteScheduler", {}, lambda place: place % 2 == 0),
        ("DPMSolverMultistepScheduler", {}, None),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, None),
        ("DEISMultistepScheduler", {}, None),
    ],
)
def test_every_scheduler_against_the_loop_by_hand(
    case: Case, library: sh.Library, scheduler: str, config: dict[str, Any], first: Any
) -> None:
    if scheduler == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    pipe = pipeline(case, scheduler, **config)
    with merged(pipe, case):
        expected, scores = reference(pipe, case, first=first)
        with shd.apply(pipe, case.config(gradient="host"), lora="none", library=library) as correction:
            found = draw(pipe, case)
        plain = draw(pipe, case)
    assert relative_error(found - plain, expected - plain) < 1e-3
    assert relative_error(np.array(correction.scores), np.array(scores)) < 1e-3
    indices = [entry.step.index for entry in correction.reports if entry.step.sub_evaluation == 0]
    assert indices == list(range(6))
    assert {entry.step.count for entry in correction.reports} == {6}


@pytest.mark.parametrize(
    "scheduler", ["EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DDPMScheduler"]
)
def test_schedulers_that_add_noise(case: Case, library: sh.Library, scheduler: str) -> None:
    """Their noise comes from the generator: without a correction the same, with one not."""
    pipe = pipeline(case, scheduler)
    plain = draw(pipe, case, generator=torch.Generator().manual_seed(1))
    with shd.apply(pipe, case.config(gradient="host"), lora="none", library=library) as correction:
        corrected = draw(pipe, case, generator=torch.Generator().manual_seed(1))
        correction.plugin.params["eta"] = 0
        same = draw(pipe, case, generator=torch.Generator().manual_seed(1))
    np.testing.assert_array_equal(same, plain)
    assert relative_error(corrected, plain) > 1e-2


def test_batches_modes_and_guidance(case: Case, library: sh.Library) -> None:
    pipe = pipeline(case)
    prompts = [PROMPT, "naïve café"]
    for arguments, more in [
        ({"prompts": prompts}, {"prompt": prompts}),
        ({}, {"prompt": PROMPT, "num_images_per_prompt": 2}),
        ({"guidance": 1}, {"guidance_scale": 1.0}),
        ({"guidance": 1, "mode": "condition-only"}, {"guidance_scale": 1.0}),
        ({"prompts": prompts, "mode": "condition-only"}, {"prompt": prompts}),
    ]:
        mode = arguments.get("mode", "paper")
        expected, _ = reference(pipe, case, steps=3, **arguments)
        with shd.apply(pipe, case.config(gradient="host"), mode=mode, lora="none", library=library):
            assert relative_error(draw(pipe, case, steps=3, **more), expected) < WHOLE_RUN


def test_the_score_is_of_the_pooled_text(case: Case, library: sh.Library) -> None:
    pipe = pipeline(case)
    prompts = [PROMPT, "naïve café"]
    with shd.apply(pipe, case.config(gradient="host"), library=library) as correction:
        pipe.encode_prompt(prompts, "cpu", 2, True)
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = pipe.text_encoder(ids).pooler_output.repeat_interleave(2, 0)
    assert torch.equal(correction._text.pooled, expected)


@pytest.mark.parametrize(
    ("name", "scheduler", "config"),
    [
        ("ddim", "DDIMScheduler", {}),
        ("pndm", "PNDMScheduler", {"skip_prk_steps": True}),
        ("euler", "EulerDiscreteScheduler", {}),
        ("dpmpp-2m", "DPMSolverMultistepScheduler", {}),
    ],
)
@pytest.mark.skipif(not HOST_DEMO.is_file(), reason=f"no {HOST_DEMO}")
def test_the_rust_host_draws_the_same(
    case: Case, library: sh.Library, tmp_path: Path, name: str, scheduler: str, config: dict[str, Any]
) -> None:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    save_file({"latents": case.start}, tmp_path / "latents.safetensors")
    plugin = json.dumps(case.config(gradient="host"), default=str)
    options = {
        "prompt": PROMPT, "model": case.model_path, "plugin": LIBRARY, "config": plugin, "scheduler": name,
        "steps": 6, "guidance": 5, "latents": tmp_path / "latents.safetensors", "report": tmp_path / "run.json",
        "out": tmp_path / "out.png",
    }  # fmt: skip
    command = [
        str(HOST_DEMO),
        "generate",
        *(str(word) for key, value in options.items() for word in (f"--{key}", value)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads((tmp_path / "run.json").read_text())

    pipe = pipeline(case, scheduler, **config)
    with shd.apply(pipe, case.config(gradient="host"), library=library) as correction:
        pictures = draw_pictures(pipe, case)
    assert len(report["steps"]) == len(correction.reports)
    for theirs, ours in zip(report["steps"], correction.reports, strict=True):
        assert (theirs["index"], theirs["sub_evaluation"]) == (ours.step.index, ours.step.sub_evaluation)
        assert theirs["timestep"] == pytest.approx(ours.step.timestep, abs=1e-3)
        assert theirs["alpha_bar"] == pytest.approx(ours.step.alpha_bar, rel=1e-5)
        assert (theirs["outcome"] == "corrected") == (ours.report.outcome == sh.Outcome.CORRECTED)
        for there, here in zip(theirs["items"], ours.report.items, strict=True):
            if ours.report.outcome == sh.Outcome.CORRECTED:
                assert there["score"] == pytest.approx(here.score, abs=1e-4)
                assert there["gradient_norm"] == pytest.approx(here.gradient_norm, rel=1e-3)
                assert there["correction_norm"] == pytest.approx(here.correction_norm, rel=1e-3)
    image = pytest.importorskip("PIL.Image")
    for item, path in enumerate(report["images"]):
        drawn = np.asarray(image.open(path).convert("RGB"), np.float32) / 255
        assert np.abs(drawn - pictures[item]).max() < 2.1 / 255


def draw_pictures(pipe: Any, case: Case) -> np.ndarray:
    latents = torch.from_numpy(case.start.copy())
    known = {"num_inference_steps": 6, "guidance_scale": 5, "height": 128, "width": 128, "output_type": "np"}
    return pipe([PROMPT] * 2, latents=latents, **known).images


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler"]
)
def test_from_an_image(case: Case, library: sh.Library, scheduler: str) -> None:
    pipe = pipeline(case, scheduler, kind="StableDiffusionImg2ImgPipeline", skip_prk_steps=True)
    picture = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))

    def run() -> np.ndarray:
        return draw(pipe, case, image=picture, strength=0.5, generator=torch.Generator().manual_seed(1))

    plain = run()
    with shd.apply(pipe, case.config(gradient="host"), lora="none", library=library) as correction:
        corrected = run()
        reports = correction.reports
        correction.plugin.params["eta"] = 0
        np.testing.assert_array_equal(run(), plain)
    assert relative_error(corrected, plain) > 1e-2
    firsts = [entry.step for entry in reports if entry.step.sub_evaluation == 0]
    # PNDM of diffusers starts one step above, and its start takes the place of a step.
    assert [step.index for step in firsts] == ([2, 4, 5] if scheduler == "PNDMScheduler" else [3, 4, 5])
    assert [step.count for step in firsts] == [6, 6, 6]
    schedule = pipeline(case, scheduler, skip_prk_steps=True).scheduler
    schedule.set_timesteps(6)
    assert firsts[0].timestep == pytest.approx(float(schedule.timesteps[3 * schedule.order]))
    assert float(ETA) == correction_eta(reports)


def correction_eta(reports: list[shd.StepReport]) -> float:
    """The step size that a report's norms speak of."""
    item = reports[0].report.items[0]
    return round(item.correction_norm / item.gradient_norm, 3)
