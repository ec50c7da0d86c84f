"""Weights by diffusers names and their revisions, against ComfyUI's documented interfaces."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dpt.weights import LoadedWeights, effective

NAMES = {
    "conv_in.weight": "input_blocks.0.0.weight",
    "conv_out.weight": "out.2.weight",
    "conv_out.bias": "out.2.bias",
    "absent": "x",
}


@pytest.fixture(autouse=True)
def utils(monkeypatch):
    comfy, module = ModuleType("comfy"), ModuleType("comfy.utils")
    module.unet_to_diffusers, comfy.utils = lambda config: dict(NAMES), module
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.utils", module)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model_config = SimpleNamespace(unet_config={})
        first, last = torch.nn.Conv2d(1, 1, 1, bias=False), torch.nn.Conv2d(1, 1, 1)
        blocks = {
            "input_blocks": torch.nn.Sequential(torch.nn.Sequential(first)),
            "out": torch.nn.Sequential(*[torch.nn.SiLU()] * 2, last),
        }
        self.diffusion_model = torch.nn.ModuleDict(blocks)


def patcher(model, **patches):
    return SimpleNamespace(model=model, patches={f"diffusion_model.{key.replace('_dot_', '.')}": found for key, found in patches.items()})


def patch(strength, data):
    return (strength, data, 1.0, None, None)


def test_names_are_diffusers_of_the_tensors_that_there_are():
    weights, model = LoadedWeights(), Model()
    weights.bind(patcher(model))
    assert sorted(weights.names) == ["conv_in.weight", "conv_out.bias", "conv_out.weight"]
    assert torch.equal(weights.tensor("conv_out.bias"), model.diffusion_model["out"][2].bias)
    assert not weights.tensor("conv_out.bias").requires_grad


def test_a_tensor_without_a_diffusers_name_is_an_error():
    model = Model()
    model.diffusion_model["extra"] = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"2 tensors of the U-Net, such as diffusion_model\.extra\.bias"):
        LoadedWeights().bind(patcher(model))


def test_revisions_follow_models_and_patches():
    weights, model, lora = LoadedWeights(), Model(), object()
    weights.bind(patcher(model))
    first = weights.revision()
    weights.bind(patcher(model))
    assert weights.revision() == first
    weights.bind(patcher(model, out_dot_2_dot_weight=[patch(0.5, lora)]))
    second = weights.revision()
    assert second != first
    assert (weights.tensor_revision("conv_out.weight"), weights.tensor_revision("conv_in.weight")) == (second, first)
    weights.bind(patcher(model, out_dot_2_dot_weight=[patch(0.5, lora)]))
    assert weights.revision() == second
    for changed in (patch(0.6, lora), patch(0.5, object())):
        before = weights.revision()
        weights.bind(patcher(model, out_dot_2_dot_weight=[changed]))
        assert weights.revision() != before
    before = weights.revision()
    weights.bind(patcher(Model()))
    assert all(weights.tensor_revision(name) == weights.revision() > before for name in weights.names)


def test_weights_are_lent_during_runs_alone():
    weights = LoadedWeights()
    weights.bind(patcher(Model()))
    weights.release()
    with pytest.raises(RuntimeError, match="while ComfyUI samples"):
        weights.tensor("conv_in.weight")


def test_patches_of_a_model_that_is_loaded_in_part_are_applied():
    model = Model()
    last = model.diffusion_model["out"][2]
    last.weight_function = [lambda weight: weight.add_(1), lambda weight: weight.mul_(2)]
    before = last.weight.detach().clone()
    assert torch.equal(effective(model, "diffusion_model.out.2.weight"), (before + 1) * 2)
    assert torch.equal(last.weight, before)
    assert torch.equal(effective(model, "diffusion_model.out.2.bias"), last.bias)


def test_dtypes():
    model = Model().half()
    assert effective(model, "diffusion_model.out.2.weight").dtype == torch.float16
    last = model.diffusion_model["out"][2]
    last.weight = torch.nn.Parameter(last.weight.to(torch.float8_e4m3fn), requires_grad=False)
    found = effective(model, "diffusion_model.out.2.weight")
    assert found.dtype == torch.float32
    assert torch.equal(found, last.weight.float())
    last.scale_weight = torch.ones(1)
    with pytest.raises(ValueError, match="scaled fp8"):
        effective(model, "diffusion_model.out.2.weight")


def test_quantized_weights_are_refused():
    class Quantized(torch.Tensor):
        pass

    model = Model()
    last = model.diffusion_model["out"][2]
    del last.weight
    last.weight = torch.ones(1, 1, 1, 1).as_subclass(Quantized)
    with pytest.raises(ValueError, match="is a Quantized"):
        effective(model, "diffusion_model.out.2.weight")
