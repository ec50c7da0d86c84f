import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import PARITY

from dpt.model import UnsupportedModel, alpha_bar, alphas_cumprod, diffusers_config, heads_by_level, timestep

LDM = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": 768,
    "use_linear_in_transformer": False,
}
"""As ComfyUI detects SD 1.5."""


def test_the_configuration_is_that_of_diffusers():
    for family, heads in (("sd1", [8] * 4), ("sd2", [2, 4, 4, 4])):
        expected = json.loads((PARITY / f"{family}-tiny" / "unet" / "config.json").read_text())
        tiny = {**LDM, "model_channels": 16, "channel_mult": [1, 1, 2, 2], "context_dim": 32}
        found = diffusers_config({**tiny, "use_linear_in_transformer": family == "sd2"}, heads, 8)
        if family == "sd1":
            expected["attention_head_dim"] = heads
        assert {key: expected[key] for key in found} == found


def test_sd21_in_half_precision_has_attention_in_f32():
    found = diffusers_config({**LDM, "attn_precision": torch.float32}, [5, 10, 20, 20], 32)
    assert found["upcast_attention"] is True
    assert diffusers_config(LDM, [8] * 4, 32)["upcast_attention"] is False


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_res_blocks": [2, 2, 1, 2]}, r"\[2, 2, 1, 2\] ResNet blocks"),
        ({"transformer_depth": [1, 0, 1, 1, 1, 1, 0, 0]}, r"a level of the U-Net has transformers of depths \[1, 0\]"),
        ({"transformer_depth": [2, 2, 1, 1, 1, 1, 0, 0]}, r"transformers of depths \[1, 2\]"),
    ],
)
def test_uneven_u_nets_are_refused(changed, message):
    with pytest.raises(UnsupportedModel, match=message):
        diffusers_config({**LDM, **changed}, [8] * 4, 32)


def test_heads_are_those_of_the_layers():
    def attention(heads):
        return SimpleNamespace(transformer_blocks=[SimpleNamespace(attn1=SimpleNamespace(heads=heads))])

    res, down = SimpleNamespace(), SimpleNamespace()
    unet = SimpleNamespace(
        num_res_blocks=[2, 1],
        input_blocks=[[down], [res, attention(5)], [res, attention(5)], [down], [res]],
        middle_block=[res, attention(20), res],
    )
    assert heads_by_level(unet) == [5, 20]


class Sampling:
    """ModelSamplingDiscrete's documented parts."""

    sigmas = torch.tensor([0.1, 1.0, 10.0])

    def timestep(self, sigma):
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(dim=0).view(sigma.shape)


def test_sigma_space():
    """x = z / sqrt(alpha_bar), with alpha_bar = 1 / (sigma^2 + 1): noise of variance 1 - alpha_bar in z has sigma in x."""
    for sigma in (0.03, 1.0, 14.6):
        variance = 1 - alpha_bar(sigma)
        assert math.sqrt(variance / alpha_bar(sigma)) == pytest.approx(sigma)
    assert alphas_cumprod(Sampling()) == pytest.approx([1 / 1.01, 0.5, 1 / 101])


def test_the_timestep_is_the_nearest_in_ln_sigma():
    assert [timestep(Sampling(), sigma) for sigma in (0.1, 0.31, 0.32, 3.1, 3.2, 99.0)] == [0, 0, 1, 1, 2, 2]
