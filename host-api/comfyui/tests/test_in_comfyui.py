"""Sampling in ComfyUI itself, on the tiny models, against what PyTorch recorded (tests/parity) and against ComfyUI's own runs."""

import logging
import os

import pytest
import torch

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("COMFYUI_PATH names no checkout of ComfyUI", allow_module_level=True)

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.utils
import nodes as comfy_nodes
import sampler_hook
import tiny
from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG
from tiny import Tiny, relative

from dpt import nodes
from dpt.evaluations import OWN_SCHEDULE, PREDICTOR_CORRECTOR
from dpt.model import describe
from dpt.weights import diffusers_names

STEPS = 6
SD1 = Tiny("sd1")
PROMPT, OTHER, EMPTY = 0, 1, 6
"""Numbers of prompts in text.json."""


@pytest.fixture(autouse=True)
def adapters(library, monkeypatch):
    """Adapters are found by path here."""
    monkeypatch.setattr(nodes, "_path", lambda name: name)


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


# Against PyTorch.


@pytest.mark.parametrize("model", [SD1, Tiny("sd2")], ids=["sd1", "sd2"])
@pytest.mark.parametrize("tap", ["mid", "up1"])
def test_without_correction_comfyui_samples_as_recorded(model, tap):
    recorded, _ = model.correction(tap)
    assert relative(recorded_run(model.patcher(), model, tap), recorded["latents.plain"][-1]) < 1e-4
    tuned, report = apply(model.patcher(), load(model, tap), eta=0.0)
    assert relative(recorded_run(tuned, model, tap), recorded["latents.lora"][-1]) < 1e-4
    assert {record.outcome for record in report.records} == {"eta is 0"}


@pytest.mark.parametrize("model", [SD1, Tiny("sd2")], ids=["sd1", "sd2"])
@pytest.mark.parametrize("tap", ["mid", "up1"])
@pytest.mark.parametrize("gradient", ["weights", "host"])
@pytest.mark.parametrize(("mode", "name"), [("paper", "paper"), ("condition-only", "condition")])
def test_a_corrected_run_is_the_recorded_one(model, tap, gradient, mode, name):
    recorded, settings = model.correction(tap)
    patched, report = apply(model.patcher(), load(model, tap, gradient=gradient), eta=settings["eta"], mode=mode)
    found = recorded_run(patched, model, tap)
    assert relative(found, recorded[f"latents.{name}"][-1]) < 1e-3
    tuned = recorded["latents.lora"][-1]
    assert relative(found - tuned, recorded[f"latents.{name}"][-1] - tuned) < 1e-2
    scores = torch.tensor([[item.score for item in record.items] for record in report.records])
    assert relative(scores, recorded[f"scores.{name}"]) < 1e-3


# What ComfyUI has is left as it was.


def test_nothing_is_changed_without_lora_and_eta():
    patcher = SD1.patcher()
    before = recorded_run(patcher)
    patched, _ = apply(patcher, load(lora_strength=0.0), eta=0.0)
    assert torch.equal(recorded_run(patched), before)


def test_the_original_model_is_as_it_was_after_a_corrected_run():
    patcher = SD1.patcher()
    weights, before = weights_of(patcher), recorded_run(patcher)
    patched, _ = apply(patcher, load())
    corrected = recorded_run(patched)
    assert relative(corrected, before) > 0.01
    assert torch.equal(recorded_run(patcher), before)
    comfy.model_management.unload_all_models()
    assert all(torch.equal(weight, weights[name]) for name, weight in weights_of(patcher).items())
    assert torch.equal(recorded_run(patched), corrected)


def test_eta_0_is_comfyuis_own_lora_loader_bit_for_bit(tmp_path):
    dpt = load(lora_strength=0.7)
    dpt.plugin.lora.write(tmp_path / "lora.safetensors", "kohya")
    lora, _ = comfy.sd.load_lora_for_models(SD1.patcher(), None, comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors")), 1.0, 0)
    patched, _ = apply(SD1.patcher(), dpt, eta=0.0)
    assert torch.equal(recorded_run(patched), recorded_run(lora))


def test_weights_are_lent_with_every_patch(tmp_path):
    """A user's LoRA beside DPT's: the plugin's own U-Net sees both, as ComfyUI's U-Net does."""
    file = comfy.utils.load_torch_file(str(SD1.cases / "lora_kohya.safetensors"))
    found = {}
    for gradient in ("weights", "host"):
        patcher, _ = comfy.sd.load_lora_for_models(SD1.patcher(), None, file, 0.8, 0)
        found[gradient] = recorded_run(apply(patcher, load(gradient=gradient))[0])
    assert relative(found["weights"], found["host"]) < 1e-4
    assert relative(found["host"], recorded_run(apply(SD1.patcher(), load())[0])) > 0.01


def test_one_dpt_follows_the_model_that_is_sampled():
    """The same DPT on one model, on the same with a LoRA, and on the first again."""
    file = comfy.utils.load_torch_file(str(SD1.cases / "lora_kohya.safetensors"))
    dpt, patcher = load(gradient="weights"), SD1.patcher()
    tuned, _ = comfy.sd.load_lora_for_models(patcher, None, file, 0.8, 0)
    first = recorded_run(apply(patcher, dpt)[0])
    second = recorded_run(apply(tuned, dpt)[0])
    assert relative(second, first) > 0.01
    assert torch.equal(recorded_run(apply(patcher, dpt)[0]), first)


# Samplers.


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


# Weights as they are loaded.


@pytest.mark.parametrize("gradient", ["weights", "host"])
def test_a_model_that_is_loaded_in_part(gradient, monkeypatch):
    """Low memory: ComfyUI keeps weights elsewhere and applies patches as it goes."""
    loaded, original = [], comfy.model_patcher.ModelPatcher.load

    def load_in_part(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        original(self, device_to, lowvram_model_memory=100_000, force_patch_weights=False, full_load=False)
        loaded.append(self.model.lowvram_patch_counter)

    whole = recorded_run(apply(SD1.patcher(), load(gradient=gradient))[0])
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", load_in_part)
    part = recorded_run(apply(SD1.patcher(), load(gradient=gradient))[0])
    assert loaded[0] > 0
    assert relative(part, whole) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gradient", ["weights", "host"])
def test_models_in_half_precision(dtype, gradient):
    """The score's gradient of the first step is that of f32 to the precision of the dtype."""
    recorded, _ = SD1.correction("mid")
    norms = recorded["first_grad.paper"].flatten(1).norm(dim=1)
    patched, report = apply(SD1.patcher(dtype), load(gradient=gradient), every=1000)
    recorded_run(patched)
    found = torch.tensor([item.gradient_norm for item in report.records[0].items])
    assert relative(found, norms) < (0.01 if dtype == torch.float16 else 0.08)


def test_the_loaded_model_is_of_inference_tensors_as_in_production():
    with torch.inference_mode():
        patched, report = apply(SD1.patcher(), load())
        assert next(patched.model.diffusion_model.parameters()).is_inference()
    recorded, _ = SD1.correction("mid")
    assert relative(recorded_run(patched), recorded["latents.paper"][-1]) < 1e-3
    assert report.corrected == STEPS


# At Stable Diffusion's sizes.


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_names_shapes_and_configuration_are_diffusers_at_full_size(family):
    """The U-Net that diffusers builds from the lent configuration has the lent tensors, no other and of the same shapes."""
    diffusers = pytest.importorskip("diffusers")
    settings = {**tiny.unet_config(family), "model_channels": 320, "channel_mult": [1, 2, 4, 4], "context_dim": 768}
    if family == "sd2":
        settings["context_dim"] = 1024
    config = {"sd1": comfy.supported_models.SD15, "sd2": comfy.supported_models.SD20}[family](settings)
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(config, device=torch.device("meta"))
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
    described = describe(patcher)
    assert described.family == family
    heads = described.unet_config["attention_head_dim"]
    assert heads == ([8] * 4 if family == "sd1" else [5, 10, 20, 20])
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(described.unet_config)
    expected = {name: tuple(weight.shape) for name, weight in unet.state_dict().items()}
    lent = {name: tuple(model.get_parameter(key).shape) for name, key in diffusers_names(model).items()}
    assert lent == expected


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
