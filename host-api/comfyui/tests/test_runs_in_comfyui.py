"""Whole runs against what PyTorch recorded (tests/parity), and ComfyUI's model before and after."""

import os

import pytest
import torch

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("COMFYUI_PATH names no checkout of ComfyUI", allow_module_level=True)

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import tiny
from corrected import SD1, STEPS, apply, load, recorded_run, weights_of
from tiny import Tiny, relative

from dpt.model import describe
from dpt.weights import diffusers_names

pytestmark = pytest.mark.usefixtures("adapters")


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
