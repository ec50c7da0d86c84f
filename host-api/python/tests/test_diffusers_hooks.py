"""What a plugin leaves behind in a pipeline: nothing. And what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import PARITY, PROMPT, Case, relative_error

import sampler_hook as sh

for name in ("torch", "diffusers", "transformers"):
    pytest.importorskip(name)
import diffusers
import torch
from pipelines import ETA, draw, pipeline

import sampler_hook.diffusers as shd

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def state(pipe: Any) -> dict[str, Any]:
    """All that a plugin could have changed."""
    modules = {name: (type(module), dict(vars(module))) for name, module in pipe.unet.named_modules()}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return {
        "weights": {name: value.clone() for name, value in pipe.unet.state_dict().items()},
        "modules": {name: kind for name, (kind, _) in modules.items()},
        "forward": {name: variables.get("forward") for name, (_, variables) in modules.items()},
        "hooks": {(name, hook): dict(v[hook]) for name, (_, v) in modules.items() for hook in hooks},
        "text": [dict(vars(pipe.text_encoder)[hook]) for hook in hooks],
        "grads": {name: value.requires_grad for name, value in pipe.unet.named_parameters()},
        "pipe": set(vars(pipe)),
        "scheduler": {key for key in vars(pipe.scheduler) if key in ("step", "scale_model_input")},
        "functions": (pipe.scheduler.step, pipe.scheduler.scale_model_input, pipe.encode_prompt, pipe.unet.forward),
    }


@contextmanager
def untouched(pipe: Any, case: Case) -> Iterator[np.ndarray]:
    """Holds state and outputs after the block against those before it; gives the latter."""
    drawn = draw(pipe, case, steps=2)
    before = state(pipe)
    yield drawn
    after = state(pipe)
    weights = before.pop("weights"), after.pop("weights")
    assert after == before
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    np.testing.assert_array_equal(draw(pipe, case, steps=2), drawn)


@pytest.fixture(scope="module")
def pipe(case: Case) -> Any:
    return pipeline(case)


@pytest.mark.parametrize("gradient", ["host", "weights", "plugin"])
@pytest.mark.parametrize("lora", ["none", "merge", "load"])
@pytest.mark.parametrize("mode", ["paper", "condition-only"])
def test_removing_restores_the_pipeline(
    pipe: Any, case: Case, library: sh.Library, gradient: Any, lora: Any, mode: Any
) -> None:
    if gradient == "weights" and library.abi < (0, 3):
        pytest.skip("the library's weights/1 cannot be offered from Python")
    if lora == "load":
        pytest.importorskip("peft")
    with untouched(pipe, case) as plain:
        options = {"gradient": gradient, "lora": lora, "mode": mode, "library": library}
        with shd.apply(pipe, case.config(gradient="host"), **options) as correction:
            assert relative_error(draw(pipe, case, steps=2), plain) > 1e-3
            correction.plugin.params["eta"] = 0.0
            without = draw(pipe, case, steps=2)
            assert {entry.report.outcome for entry in correction.reports} == {sh.Outcome.SKIPPED_STRENGTH}
        if lora == "none":
            np.testing.assert_array_equal(without, plain)
        else:
            assert relative_error(without, plain) > 1e-3
        assert correction.plugin.is_destroyed
        correction.remove()


def test_loaded_lora_stands_beside_others(case: Case, library: sh.Library) -> None:
    pytest.importorskip("peft")
    pipe = pipeline(case)
    pipe.load_lora_weights(PARITY / "sd1-cases", weight_name="lora_kohya.safetensors", adapter_name="mine")
    pipe.set_adapters(["mine"], [0.7])
    before = draw(pipe, case, steps=2)
    drawn = {}
    for gradient in ("host", "weights") if library.abi >= (0, 3) else ("host",):
        with shd.apply(pipe, case.config(gradient="host"), gradient=gradient, lora="load", library=library):
            assert set(pipe.get_active_adapters()) == {"mine", "sampler_hook"}
            drawn[gradient] = draw(pipe, case, steps=2)
        assert pipe.get_active_adapters() == ["mine"]
        np.testing.assert_array_equal(draw(pipe, case, steps=2), before)
    assert relative_error(drawn["host"], before) > 1e-3
    if "weights" in drawn:  # what PEFT adds in its layers is in the weights that are lent
        assert relative_error(drawn["weights"], drawn["host"]) < 1e-5


class Stopped(Exception):
    pass


def test_after_an_exception_the_next_picture_is_right(pipe: Any, case: Case, library: sh.Library) -> None:
    def stop(_pipe: Any, index: int, _timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            raise Stopped
        return arguments

    with untouched(pipe, case), shd.apply(pipe, case.config(gradient="host"), library=library) as correction:
        with pytest.raises(Stopped):
            draw(pipe, case, callback_on_step_end=stop)
        assert len(correction.reports) == 2
        assert relative_error(draw(pipe, case), case.tensors["latents.paper"][-1]) < 1e-3
        assert len(correction.reports) == 6


def test_an_interrupted_pipeline_stops(pipe: Any, case: Case, library: sh.Library) -> None:
    def interrupt(running: Any, index: int, _timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        running._interrupt = index == 1
        return arguments

    with shd.apply(pipe, case.config(gradient="host"), library=library) as correction:
        draw(pipe, case, callback_on_step_end=interrupt)
        assert len(correction.reports) == 2
    pipe._interrupt = False


def test_parameters_choose_steps(pipe: Any, case: Case, library: sh.Library) -> None:
    config = case.config(gradient="host")
    del config["eta"]
    options = {"lora": "none", "library": library, "start": 0.3, "end": 0.9, "every": 2, "monitor": True}
    with shd.apply(pipe, config, eta=ETA, **options) as correction:
        draw(pipe, case)
    corrected = [entry.step.index for entry in correction.reports if entry.report.outcome == sh.Outcome.CORRECTED]
    assert corrected == [2, 4]
    assert np.isfinite(correction.scores).all()
    assert np.shape(correction.scores) == (6, 2)


def test_a_plugin_of_ones_own(pipe: Any, case: Case, library: sh.Library) -> None:
    with library.create("dpt", case.config(gradient="host"), shd.PipelineHost(pipe)) as plugin:
        with untouched(pipe, case), shd.apply(pipe, plugin):
            assert relative_error(draw(pipe, case), case.tensors["latents.paper"][-1]) < 1e-3
            with plugin.run(batch=0, steps=1):  # the picture is drawn, and its run has ended
                pass
        assert not plugin.is_destroyed
        with shd.apply(pipe, plugin, mode="condition-only"):
            assert relative_error(draw(pipe, case), case.tensors["latents.condition"][-1]) < 1e-3
    with library.create("dpt", case.config(gradient="host")) as plugin, pytest.raises(ValueError, match="PipelineHost"):
        shd.apply(pipe, plugin)


def test_another_scheduler_while_applied(case: Case, library: sh.Library) -> None:
    pipe = pipeline(case)
    ddim = pipe.scheduler
    with shd.apply(pipe, case.config(gradient="host"), library=library) as correction:
        draw(pipe, case, steps=2)
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(ddim.config)
        draw(pipe, case)
        assert {entry.step.space for entry in correction.reports} == {"ve"}
        assert "step" not in vars(ddim)
        pipe.scheduler = ddim
        assert relative_error(draw(pipe, case), case.tensors["latents.paper"][-1]) < 1e-3
    assert "step" not in vars(ddim)


def test_under_inference_mode(pipe: Any, case: Case, library: sh.Library) -> None:
    with shd.apply(pipe, case.config(gradient="host"), library=library), torch.inference_mode():
        assert relative_error(draw(pipe, case), case.tensors["latents.paper"][-1]) < 1e-3
    with torch.inference_mode():
        lazily = pipeline(case)
    for lora in ("merge", "none"):
        with pytest.raises(NotImplementedError, match=r"inference"):
            shd.apply(lazily, case.config(gradient="host"), lora=lora, library=library)
    with shd.apply(lazily, case.config(gradient="plugin"), lora="none", library=library), torch.inference_mode():
        draw(lazily, case, steps=2)


def test_a_compiled_unet(case: Case, library: sh.Library) -> None:
    pipe = pipeline(case)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with shd.apply(pipe, case.config(gradient="host"), library=library):
        assert relative_error(draw(pipe, case), case.tensors["latents.paper"][-1]) < 1e-3
    assert relative_error(draw(pipe, case), case.tensors["latents.plain"][-1]) < 1e-3


def test_half_precision(case: Case, library: sh.Library) -> None:
    pipe = pipeline(case).to(torch.bfloat16)
    with shd.apply(pipe, case.config(gradient="host"), library=library) as correction:
        found = draw(pipe, case)
    assert relative_error(found, case.tensors["latents.paper"][-1]) < 0.2
    assert relative_error(np.array(correction.scores[0]), case.tensors["scores.paper"][0]) < 0.2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: scheduler(p, "UniPCMultistepScheduler"), "UniPCMultistepScheduler"),
        (lambda p: setattr(p, "scheduler", diffusers.FlowMatchEulerDiscreteScheduler()), "FlowMatch"),
        (lambda p: scheduler(p, "PNDMScheduler", skip_prk_steps=False), "Runge-Kutta"),
        (lambda p: scheduler(p, "DDIMScheduler", prediction_type="sample"), "'sample'"),
        (lambda p: p.unet.register_to_config(in_channels=9), "9 channels"),
        (lambda p: setattr(p.unet.conv_in, "_hf_hook", SimpleNamespace(offload=True)), "offload"),
    ],
)
def test_models_that_are_not_supported(case: Case, library: sh.Library, change: Any, words: str) -> None:
    pipe = pipeline(case)
    change(pipe)
    with pytest.raises(NotImplementedError, match=words):
        shd.apply(pipe, case.config(gradient="host"), library=library)
    assert "encode_prompt" not in vars(pipe)


def scheduler(pipe: Any, kind: str, **config: Any) -> None:
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **config)


def test_what_is_refused(pipe: Any, case: Case, library: sh.Library, tmp_path: Path) -> None:
    config = case.config(gradient="host")
    inpaint = diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    with untouched(pipe, case):
        with pytest.raises(NotImplementedError, match="StableDiffusionInpaintPipeline"):
            shd.apply(inpaint, config, library=library)
        for options, error, words in [
            ({"no_such": 1}, ValueError, "no parameter 'no_such'; it has eta"),
            ({"eta": -1}, ValueError, "eta"),
            ({"mode": "both"}, ValueError, "mode is 'both'"),
            ({"lora": "keep"}, ValueError, "lora is 'keep'"),
            ({"gradient": "split"}, ValueError, "'split'"),
            ({"gradient": "mine"}, ValueError, "mine"),
        ]:
            with pytest.raises(error, match=words):
                shd.apply(pipe, config, library=library, **options)
        with pytest.raises(FileNotFoundError, match="nothing"):
            shd.apply(pipe, {**config, "adapter": tmp_path / "nothing"}, library=library)
        sd2 = Case("sd2", "mid")
        other = {**config, "adapter": sd2.adapter.with_name("release_up1.safetensors"), "tap": "down0"}
        with pytest.raises(ValueError, match="channels"):
            shd.apply(pipe, other, library=library)
        with shd.apply(pipe, config, library=library):
            with pytest.raises(RuntimeError, match="another plugin"):
                shd.apply(pipe, config, library=library)
            embeddings, _ = pipe.encode_prompt([PROMPT] * 2, "cpu", 1, False)
            with pytest.raises(NotImplementedError, match="prompt_embeds without a prompt"):
                pipe(prompt_embeds=embeddings, negative_prompt_embeds=embeddings, height=128, width=128)
