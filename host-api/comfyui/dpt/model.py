"""What a MODEL of ComfyUI is, in the interface's terms; models that DPT is not defined for are refused by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import sampler_hook
import torch


class UnsupportedModel(ValueError):
    """A model that DPT cannot correct."""


def describe(patcher: Any) -> sampler_hook.Model:
    """The model with the patches of its patcher, such as another sampling type. Raises `UnsupportedModel`."""
    import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel

    unet = patcher.model.diffusion_model
    config = patcher.model.model_config
    name = type(config).__name__
    if not isinstance(unet, openaimodel.UNetModel):
        raise UnsupportedModel(f"DPT corrects Stable Diffusion 1.x and 2.x; this MODEL ({name}) has no such U-Net")
    family = _family(config.unet_config, name)
    return sampler_hook.Model(
        prediction=_prediction(patcher.get_model_object("model_sampling")),
        family=family,
        alphas_cumprod=alphas_cumprod(patcher.get_model_object("model_sampling")),
        unet_in_channels=int(config.unet_config["in_channels"]),
        latent_channels=int(patcher.get_model_object("latent_format").latent_channels),
        unet_config=diffusers_config(config.unet_config, heads_by_level(unet), unet.out[0].num_groups),
    )


def _family(unet_config: Mapping[str, Any], name: str) -> str:
    if unet_config.get("adm_in_channels") is not None or unet_config.get("num_classes") is not None:
        raise UnsupportedModel(f"this MODEL ({name}) takes vectors beside the text, as SDXL and unCLIP do: not supported by DPT")
    if unet_config.get("use_temporal_attention") or unet_config.get("use_temporal_resblock"):
        raise UnsupportedModel(f"this MODEL ({name}) is a video model: not supported by DPT")
    if unet_config["in_channels"] != 4:
        raise UnsupportedModel(
            f"this MODEL ({name}) takes {unet_config['in_channels']} channels: inpainting and image-conditioned models are not "
            "supported by DPT; a noise mask with an ordinary model is"
        )
    return "sd2" if unet_config.get("use_linear_in_transformer") else "sd1"


def _prediction(sampling: Any) -> sampler_hook.types.Prediction:
    import comfy.model_sampling as kinds

    name = next((kind.__name__ for kind in type(sampling).__mro__ if kind.__name__ != "ModelSampling"), "?")
    if isinstance(sampling, kinds.CONST) or not hasattr(sampling, "sigma_data"):
        raise UnsupportedModel(f"flow models ({name}) have no alpha_bar, and the correction (Eq. 9) is not defined for them")
    refused = (kinds.X0, kinds.IMG_TO_IMG, kinds.EDM)
    discrete = isinstance(sampling, kinds.ModelSamplingDiscrete) and not isinstance(sampling, kinds.ModelSamplingDiscreteEDM)
    if not discrete or isinstance(sampling, refused):
        raise UnsupportedModel(f"the MODEL samples as {name}; DPT needs epsilon or v prediction over discrete training timesteps")
    return "v" if isinstance(sampling, kinds.V_PREDICTION) else "epsilon"


def alpha_bar(sigma: float) -> float:
    """Cumulative alpha of a sigma: latents are x = z / sqrt(alpha_bar)."""
    return 1.0 / (sigma * sigma + 1.0)


def alphas_cumprod(sampling: Any) -> list[float]:
    """Cumulative alphas of a discrete model sampling."""
    return [alpha_bar(sigma) for sigma in sampling.sigmas.double().tolist()]


def timestep(sampling: Any, sigma: float) -> float:
    """The training timestep that the U-Net is given for a sigma: the nearest in ln sigma."""
    device = sampling.sigmas.device
    return float(sampling.timestep(torch.tensor([sigma], dtype=torch.float32, device=device)))


def heads_by_level(unet: Any) -> list[int]:
    """Attention heads of each level of a U-Net of ComfyUI's, finest first."""
    heads, block = [], 1
    for count in unet.num_res_blocks:
        layers = [layer for entry in unet.input_blocks[block : block + count] for layer in entry]
        # A level without attention has the middle's, as it would if it had any.
        layers = [layer for layer in [*layers, *unet.middle_block] if hasattr(layer, "transformer_blocks")]
        heads.append(layers[0].transformer_blocks[0].attn1.heads)
        block += count + 1
    return heads


def diffusers_config(unet_config: Mapping[str, Any], heads: Sequence[int], norm_num_groups: int) -> dict[str, Any]:
    """The U-Net's config.json in diffusers' terms."""
    multipliers = list(unet_config["channel_mult"])
    channels = [unet_config["model_channels"] * multiplier for multiplier in multipliers]
    blocks = unet_config["num_res_blocks"]
    blocks = [blocks] * len(channels) if isinstance(blocks, int) else list(blocks)
    if len(set(blocks)) != 1:
        raise UnsupportedModel(f"the U-Net has {blocks} ResNet blocks by level, expected the same number in each")
    down = _by_level(list(unet_config["transformer_depth"]), [blocks[0]] * len(channels))
    # Levels of the output blocks, coarsest first, are listed from the end.
    up = _by_level(list(unet_config["transformer_depth_output"]), [blocks[0] + 1] * len(channels))[::-1]
    depths = {depth for depth in [*down, *up] if depth > 0}
    if len(depths) != 1:
        raise UnsupportedModel(f"the U-Net has transformers of depths {sorted(depths)}, expected one depth")
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": unet_config["in_channels"],
        "out_channels": unet_config["out_channels"],
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in down],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in up],
        "layers_per_block": blocks[0],
        "transformer_layers_per_block": depths.pop(),
        # Named for the width, but diffusers takes it as the number of heads.
        "attention_head_dim": list(heads),
        "cross_attention_dim": unet_config["context_dim"],
        "norm_num_groups": norm_num_groups,
        "norm_eps": 1e-5,
        "use_linear_projection": bool(unet_config.get("use_linear_in_transformer", False)),
        "upcast_attention": unet_config.get("attn_precision") == torch.float32,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }


def _by_level(depths: list[int], blocks: list[int]) -> list[int]:
    """The depth of each level's transformers, which must agree within it."""
    levels = []
    for count in blocks:
        level, depths = depths[:count], depths[count:]
        if len(set(level)) != 1:
            raise UnsupportedModel(f"a level of the U-Net has transformers of depths {level}, expected one depth")
        levels.append(level[0])
    return levels
