"""The tiny models of tests/parity as ComfyUI's own classes, and their prompts as conditionings."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from conftest import PARITY
from safetensors.torch import load_file

LEVELS = 4


class EightGroups(comfy.ops.disable_weight_init):
    """ComfyUI's layers with the tiny models' 8 groups in place of 32, of which their 16 channels do not make."""

    class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
        def __init__(self, num_groups: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(8, *args, **kwargs)


def unet_config(family: str) -> dict[str, Any]:
    """As ComfyUI detects it from a checkpoint."""
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 16,
        "num_res_blocks": [2] * LEVELS,
        "channel_mult": [1, 1, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1] * 9 + [0] * 3,
        "transformer_depth_middle": 1,
        "context_dim": 32,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": family == "sd2",
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
        "num_head_channels": 8,
    }


@dataclass
class Tiny:
    """One of the folders sd1-tiny and sd2-tiny."""

    family: str

    @property
    def folder(self) -> Path:
        return PARITY / f"{self.family}-tiny"

    @property
    def cases(self) -> Path:
        return PARITY / f"{self.family}-cases"

    @cached_property
    def diffusers_weights(self) -> dict[str, torch.Tensor]:
        weights = load_file(self.folder / "unet" / "diffusion_pytorch_model.safetensors")
        return {name: weight.float() for name, weight in weights.items()}

    def patcher(self, dtype: torch.dtype = torch.float32) -> comfy.model_patcher.ModelPatcher:
        """A MODEL with these weights, of its own."""
        base = comfy.supported_models.SD15 if self.family == "sd1" else comfy.supported_models.SD20
        config = base(unet_config(self.family))
        heads = json.loads((self.folder / "unet" / "config.json").read_text())["attention_head_dim"]
        if self.family == "sd1":
            config.unet_config.update(num_heads=heads, num_head_channels=-1)
        else:
            config.unet_config.update(num_heads=-1, num_head_channels=8)
        config.custom_operations = EightGroups
        config.set_inference_dtype(dtype, None)
        model = comfy.model_base.BaseModel(config, device=torch.device("cpu"))
        names = comfy.utils.unet_to_diffusers(config.unet_config)
        weights = {f"diffusion_model.{names[name]}": weight for name, weight in self.diffusers_weights.items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected, unexpected
        assert all(name.startswith("model_sampling.") for name in missing), missing
        if self.family == "sd2":
            _set_heads(model.diffusion_model, heads)
        model.eval()
        return comfy.model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))

    def conditioning(self, number: int, batch: int = 1) -> list:
        """Prompt `number` of text.json as SD 1.x's CLIP Text Encode gives it."""
        text = load_file(self.cases / "text.safetensors")
        row = slice(number, number + 1)
        repeat = (batch, *[1] * 2)
        return [[text["hidden"][row].repeat(repeat), {"pooled_output": text["pooled"][row].repeat(repeat[:2])}]]

    def correction(self, tap: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """A recorded run of PyTorch's, with its settings."""
        recorded = load_file(self.cases / f"correction_{tap}.safetensors")
        return recorded, json.loads((self.cases / f"correction_{tap}.json").read_text())

    def loader(self, tap: str) -> dict[str, Any]:
        """Inputs of DPT Loader but for the file's name."""
        return {
            "lora_strength": 1.0,
            "gradient": "weights",
            "tap": tap,
            "heads": 4,
            "matching_queries": 5,
            "device": "cpu",
            "dtype": "f32",
            "ignore_extra_inputs": False,
        }


def _set_heads(unet: Any, heads: list[int]) -> None:
    """Heads by level, where their width differs from level to level, for which ComfyUI has no setting."""
    blocks = [(1 + index // 3, block) for index, block in enumerate(unet.input_blocks[1:])]
    levels = [(number - 1, block) for number, block in blocks]
    levels += [(LEVELS - 1, unet.middle_block)]
    levels += [(LEVELS - 1 - index // 3, block) for index, block in enumerate(unet.output_blocks)]
    for level, block in levels:
        for layer in block.modules():
            if hasattr(layer, "heads"):
                layer.heads = heads[level]


def ddim_sigmas(steps: int) -> torch.Tensor:
    """The sigmas of diffusers' DDIM with leading timesteps, offset by 1, to that of timestep 0."""
    sampling = comfy.model_base.model_sampling(comfy.supported_models.SD15(unet_config("sd1")), comfy.model_base.ModelType.EPS)
    timesteps = [index * (1000 // steps) + 1 for index in range(steps)][::-1]
    return sampling.sigmas[[*timesteps, 0]].clone()


def run(
    patcher,
    start,
    sigmas,
    positive,
    negative,
    cfg,
    sampler="euler",
    denoise_mask=None,
    latent=None,
    callback=None,
    options=None,
):
    """One run of ComfyUI's guider, from latents in VP space to latents in VP space; from noise over `latent` where that is given."""
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        chosen = comfy.samplers.ksampler(sampler, options or {}) if isinstance(sampler, str) else sampler
        latent = torch.zeros_like(start) if latent is None else latent
        # The sampler starts from sigma * noise + latent.
        first = float(sigmas[0])
        noise = start * (first**2 + 1) ** 0.5 / first if latent.count_nonzero() == 0 else start
        found = guider.sample(noise, latent, chosen, sigmas, denoise_mask=denoise_mask, callback=callback, disable_pbar=True, seed=0)
        # process_latent_out divides by the VAE's factor.
        found = patcher.model.process_latent_in(found)
        return found / (float(sigmas[-1]) ** 2 + 1) ** 0.5


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||a - b|| / ||b||"""
    return float((found - expected).norm() / expected.norm())


def clip(model: Tiny) -> comfy.sd.CLIP:
    """The CLIP of a folder. SD 2.x's encoder in ComfyUI has a layer more than diffusers', which is skipped."""
    folder = model.folder
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight.float() for name, weight in weights.items()}
    weights.pop("text_model.embeddings.position_ids", None)
    # ComfyUI's encoders have CLIP's 49408 tokens.
    embedding = "text_model.embeddings.token_embedding.weight"
    weights[embedding] = torch.nn.functional.pad(weights[embedding], (0, 0, 0, 49408 - len(weights[embedding])))
    start, end = config["bos_token_id"], config["eos_token_id"]
    width = config["hidden_size"]
    if model.family == "sd2":
        config["num_hidden_layers"] += 1
        last = {name: weight for name, weight in weights.items() if ".layers.2." in name}
        weights.update({name.replace(".layers.2.", ".layers.3."): weight.flip(0) for name, weight in last.items()})
    weights["text_projection.weight"] = torch.randn(width, width, generator=torch.Generator().manual_seed(1))
    letter, pad = ("l", end) if model.family == "sd1" else ("h", 0)

    class Tokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            path = str(folder / "tokenizer")
            super().__init__(path, pad_with_end=letter == "l", embedding_size=width, embedding_key=f"clip_{letter}")

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            layer = {"layer": "last", "return_projected_pooled": False} if letter == "l" else {"layer": "hidden", "layer_idx": -2}
            tokens = {"start": start, "end": end, "pad": pad}
            super().__init__(device=device, dtype=dtype, textmodel_json_config=config, special_tokens=tokens, **layer)

    class Tokenizers(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            super().__init__(clip_name=letter, tokenizer=Tokenizer)

    class Model(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_name=letter, clip_model=Encoder)

    target = comfy.supported_models_base.ClipTarget(Tokenizers, Model)
    found = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    missing, unexpected = getattr(found.cond_stage_model, f"clip_{letter}").transformer.load_state_dict(weights, strict=False)
    assert (list(missing), list(unexpected)) == ([], [])
    return found
