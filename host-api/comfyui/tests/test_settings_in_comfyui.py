"""What the user sets, and what is refused."""

import logging
import os

import pytest
import torch

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("COMFYUI_PATH names no checkout of ComfyUI", allow_module_level=True)

import comfy.model_management
import comfy.samplers
import tiny
from corrected import PROMPT, SD1, STEPS, apply, load, recorded_run
from tiny import relative

pytestmark = pytest.mark.usefixtures("adapters")


# Settings.


def test_range_interval_and_curve():
    patched, report = apply(SD1.patcher(), load(), start_percent=0.2, end_percent=0.9, every=2, curve="linear", monitor=True)
    recorded_run(patched)
    outside, between = "outside 0.2 to 0.9 of sampling", "between two steps"
    # Timesteps 831, 665, 499, 333, 167, 1.
    assert [record.outcome for record in report.records] == [
        outside,
        "corrected",
        between,
        "corrected",
        between,
        outside,
    ]
    for record in report.records:
        assert record.percent == pytest.approx(1 - record.timestep / 999, abs=1e-4)
        assert all(torch.isfinite(torch.tensor(item.score)) for item in record.items)
        if record.outcome == "corrected":
            assert record.eta == pytest.approx(20 * (0.9 - record.percent) / 0.7, rel=1e-3)


def test_the_correction_is_bounded():
    patched, report = apply(SD1.patcher(), load(), eta=100.0, max_correction=0.01)
    states = []
    recorded_run(patched, callback=lambda i, denoised, x, n: states.append(x.clone()))
    sigmas = tiny.ddim_sigmas(STEPS)
    for record, state, sigma in zip(report.records, states, sigmas, strict=False):
        sizes = (state / (float(sigma) ** 2 + 1) ** 0.5).flatten(1).norm(dim=1)
        assert all(item.correction_norm <= 0.0102 * size for item, size in zip(record.items, sizes, strict=True))


# Refusals.


def test_models_that_dpt_is_not_defined_for_are_refused_when_it_is_applied():
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingSD3

    dpt = load()
    for node, arguments, message in [
        (ModelSamplingSD3(), {"shift": 3.0}, "flow models"),
        (ModelSamplingDiscrete(), {"sampling": "x0", "zsnr": False}, "epsilon or v prediction"),
        (ModelSamplingDiscrete(), {"sampling": "img_to_img", "zsnr": False}, "epsilon or v prediction"),
    ]:
        [changed] = node.patch(SD1.patcher(), **arguments)
        with pytest.raises(ValueError, match=message):
            apply(changed, dpt)
    for key, value, message in [
        ("adm_in_channels", 2816, "SDXL"),
        ("in_channels", 9, "9 channels"),
        ("use_temporal_attention", True, "video"),
    ]:
        patcher = SD1.patcher()
        patcher.model.model_config.unet_config[key] = value
        with pytest.raises(ValueError, match=message):
            apply(patcher, dpt)
    patcher = SD1.patcher()
    patcher.model.diffusion_model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="no such U-Net"):
        apply(patcher, dpt)


def test_a_model_that_becomes_a_flow_model_after_it_was_applied_is_refused_when_it_is_sampled():
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    patched, _ = apply(SD1.patcher(), load())
    [changed] = ModelSamplingSD3().patch(patched, shift=3.0)
    with pytest.raises(ValueError, match="flow models"):
        recorded_run(changed, sigmas=torch.tensor([0.9, 0.5, 0.0]))


def test_an_adapter_of_another_model_is_refused():
    patcher, dpt = SD1.patcher(), load()
    patcher.model.model_config.unet_config["channel_mult"] = [1, 1, 2]
    patcher.model.model_config.unet_config["num_res_blocks"] = [2, 2, 2]
    with pytest.raises(ValueError, match=r"entries, of which \d+ fit this MODEL"):
        apply(patcher, dpt)


def test_one_dpt_twice_on_one_model_is_refused():
    dpt = load()
    patched, _ = apply(SD1.patcher(), dpt)
    with pytest.raises(ValueError, match="applied to the MODEL already"):
        apply(patched, dpt)


def test_two_dpts_on_one_model_both_correct():
    first, one = apply(SD1.patcher(), load())
    second, two = apply(first, load(tap="up1", lora_strength=0.0))
    recorded_run(second)
    assert (one.corrected, two.corrected) == (STEPS, STEPS)


def test_a_conditioning_whose_end_of_text_is_not_known_is_refused():
    [[context, options]] = SD1.conditioning(PROMPT)
    patched, _ = apply(SD1.patcher(), load())
    for changed, message in [
        ({}, "no pooled output"),
        ({"pooled_output": options["pooled_output"] + 1}, "not a row of its context"),
    ]:
        with pytest.raises(ValueError, match=message):
            recorded_run(patched, positive=[[context, changed]])


@pytest.mark.parametrize("gradient", ["weights", "host"])
def test_inputs_that_the_correction_does_not_see(gradient):
    """Attention patches are seen by ComfyUI's U-Net, not by the plugin's."""
    for ignore in (False, True):
        patcher = SD1.patcher()
        patcher.set_model_attn2_patch(lambda q, k, v, options: (q * 1.5, k, v))
        patched, report = apply(patcher, load(gradient=gradient, ignore_extra_inputs=ignore))
        if gradient == "weights" and not ignore:
            with pytest.raises(NotImplementedError, match="ignore_extra_inputs"):
                recorded_run(patched)
        else:
            recorded_run(patched)
            assert report.corrected == STEPS


def test_a_run_in_which_nothing_was_corrected_says_why(caplog):
    patched, _ = apply(SD1.patcher(), load(), start_percent=0.99, end_percent=0.995)
    with caplog.at_level(logging.WARNING):
        recorded_run(patched)
    assert "corrected no step of 6: outside 0.99 to 0.995 of sampling" in caplog.text


def test_a_guider_whose_positive_conditioning_is_not_seen_is_told_of(caplog, monkeypatch):
    """Condition-only finds the positive list by identity."""
    original = comfy.samplers.sampling_function

    def copied(model, x, sigma, negative, positive, *args, **kwargs):
        return original(model, x, sigma, negative, list(positive), *args, **kwargs)

    monkeypatch.setattr(comfy.samplers, "sampling_function", copied)
    patched, _ = apply(SD1.patcher(), load(), mode="condition-only")
    with caplog.at_level(logging.WARNING):
        recorded_run(patched)
    assert "corrected no step of 6: no positive conditioning was evaluated" in caplog.text


def test_an_interrupt_stops_the_plugin_too():
    patched, _ = apply(SD1.patcher(), load(gradient="weights"))

    def interrupt(i, denoised, x, n):
        comfy.model_management.interrupt_current_processing(True)

    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            recorded_run(patched, callback=interrupt)
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert relative(recorded_run(patched), recorded_run(apply(SD1.patcher(), load())[0])) < 1e-4


def test_a_run_that_fails_leaves_the_dpt_usable():
    dpt = load()
    patched, report = apply(SD1.patcher(), dpt)
    with pytest.raises(ZeroDivisionError):
        recorded_run(patched, callback=lambda *_: 1 / 0)
    recorded_run(patched)
    assert report.corrected == STEPS


class Control:
    """The documented parts of a ControlNet, which adds nothing."""

    previous_controlnet = extra_hooks = None

    def get_models(self):
        return []

    def get_extra_hooks(self):
        return []

    def inference_memory_requirements(self, dtype):
        return 0

    def pre_run(self, model, percent_to_timestep):
        pass

    def get_control(self, *_):
        return {"output": [], "middle": [], "input": []}

    def cleanup(self):
        pass


@pytest.mark.parametrize("mode", ["paper", "condition-only"])
@pytest.mark.parametrize("gradient", ["weights", "host"])
def test_controlnet_is_refused_or_ignored_as_the_loader_says(gradient, mode):
    [[context, options]] = SD1.conditioning(PROMPT)
    positive = [[context, {**options, "control": Control(), "control_apply_to_uncond": True}]]
    refused_run, _ = apply(SD1.patcher(), load(gradient=gradient), mode=mode)
    with pytest.raises((ValueError, NotImplementedError), match="ignore_extra_inputs"):
        recorded_run(refused_run, positive=positive)
    patched, report = apply(SD1.patcher(), load(gradient=gradient, ignore_extra_inputs=True), mode=mode)
    recorded_run(patched, positive=positive)
    assert report.corrected == STEPS
