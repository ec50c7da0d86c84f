"""Makes lora_peft_header.safetensors and lora_peft_header_merged.safetensors: a LoRA as current diffusers and PEFT save it, with
rank and alpha in the file's header, on the tiny SD 1 U-Net of ../parity, and the weights that PEFT makes of it.

    pip install torch diffusers transformers peft safetensors
    python make_lora.py

Checks a file too: python make_lora.py FILE loads it with diffusers and prints the merged weights' norms as JSON.
"""
import json
import pathlib
import sys
import tempfile

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
MODEL = HERE.parent / "parity" / "sd1-tiny"
BLOCK = "mid_block.attentions.0.transformer_blocks.0."
TARGETS = [BLOCK + name for name in ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ff.net.2")]


def make():
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(MODEL / "unet")
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False,
                                rank_pattern={"attn1.to_q": 2}, alpha_pattern={"attn2.to_k": 1}))
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet),
                                                  **_collate_lora_metadata({"unet": unet}))
        saved, = pathlib.Path(folder).iterdir()
        (HERE / "lora_peft_header.safetensors").write_bytes(saved.read_bytes())
    unet.fuse_lora()
    merged = {f"{t}.weight": unet.get_submodule(t).base_layer.weight.detach().contiguous() for t in TARGETS if "ff" not in t}
    save_file(merged, str(HERE / "lora_peft_header_merged.safetensors"))


def check(path):
    unet = UNet2DConditionModel.from_pretrained(MODEL / "unet")
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    state, alphas, *_ = StableDiffusionPipeline.lora_state_dict(path, return_lora_metadata=True)
    StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet, metadata=_[0] if _ else None)
    unet.fuse_lora()
    norms = {name: (module.base_layer.weight - before[name + ".weight"]).norm().item()
             for name, module in unet.named_modules() if hasattr(module, "base_layer")}
    print(json.dumps(norms))


if __name__ == "__main__":
    check(sys.argv[1]) if len(sys.argv) > 1 else make()
