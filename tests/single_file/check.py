"""Holds this project's single-file checkpoints against diffusers' own tools, both ways, on the tiny pipelines of ../parity.

    python tests/single_file/check.py [--diffusers DIR] [--python PYTHON] [--bin DIR]

diffusers reads what `weights convert --to single-file` writes, and has to find the tensors of the folder. Where a checkout of
diffusers' repository is given (its package on PyPI lacks the script), `scripts/convert_diffusers_to_original_stable_diffusion.py`
writes, and `host-demo generate` has to draw the same picture from the file as from the folder. torch, diffusers, transformers and
safetensors are installed into a throw-away environment unless a Python that has them is given. --bin is where host-demo and
weights were built [target/release].

    python tests/single_file/check.py --diffusers DIR --names

writes sd1.json and sd2.json: name, shape and CRC-32 of every tensor that diffusers' script makes of the tiny pipelines, and name and
shape for the sizes of Stable Diffusion 1.5 and 2.1 (sd1_full.json, sd2_full.json). The Rust tests read them.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGES = ["torch", "diffusers==0.42.1", "transformers", "safetensors", "accelerate"]
FAMILIES = ["sd1", "sd2"]


def inside():
    """What needs torch; called again in the environment that has it."""
    import importlib.util
    import re
    import zlib

    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    def read(file, folder):
        """diffusers' reader on our file: how many of the folder's tensors it finds, all bit for bit."""
        pipe = StableDiffusionPipeline.from_single_file(file, config=folder, local_files_only=True, torch_dtype=torch.float32)
        parts = dict(unet=pipe.unet, vae=pipe.vae, text_encoder=pipe.text_encoder)
        stems = dict(unet="diffusion_pytorch_model", vae="diffusion_pytorch_model", text_encoder="model")
        short = lambda name: re.sub(r"\.(query|key|value)\.", lambda m: f".to_{m[1][0]}.", name).replace("proj_attn", "to_out.0") \
            .removeprefix("text_model.")
        count = 0
        for part, model in parts.items():
            found = {short(name): tensor for name, tensor in model.state_dict().items()}
            for name, tensor in load_file(f"{folder}/{part}/{stems[part]}.safetensors").items():
                if name.endswith("position_ids"):
                    continue
                assert torch.equal(found[short(name)].float(), tensor.float()), f"{part} {name}"
                count += 1
        return count

    def writer(diffusers):
        path = pathlib.Path(diffusers) / "scripts" / "convert_diffusers_to_original_stable_diffusion.py"
        spec = importlib.util.spec_from_file_location("writer", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def convert(tool, unet, vae, text, open_clip):
        """The script's own functions; it knows OpenCLIP by its depth alone, which the tiny pipelines do not have."""
        out = {"model.diffusion_model." + k: v for k, v in tool.convert_unet_state_dict(unet).items()}
        out |= {"first_stage_model." + k: v for k, v in tool.convert_vae_state_dict(vae).items()}
        text = {k if k.startswith("text_model.") else "text_model." + k: v for k, v in text.items()}
        if open_clip:
            text = tool.convert_text_enc_state_dict_v20({"transformer." + k: v for k, v in text.items()})
            return out | {"cond_stage_model.model." + k: v for k, v in text.items()}
        return out | {"cond_stage_model.transformer." + k: v for k, v in tool.convert_text_enc_state_dict(text).items()}

    def write(diffusers, folder, file, open_clip):
        load = lambda part, stem: load_file(f"{folder}/{part}/{stem}.safetensors")
        made = convert(writer(diffusers), load("unet", "diffusion_pytorch_model"), load("vae", "diffusion_pytorch_model"),
                       load("text_encoder", "model"), open_clip)
        save_file({k: v.contiguous() for k, v in made.items()}, file)

    def names(file):
        value = lambda t: dict(shape=list(t.shape), crc=zlib.crc32(t.contiguous().view(torch.uint8).numpy().tobytes())
                               if t.dim() else zlib.crc32(t.numpy().tobytes()))
        return {name: value(tensor) for name, tensor in sorted(load_file(file).items())}

    def full(diffusers, open_clip):
        """Names and shapes at the sizes of Stable Diffusion 1.5 and 2.1, without memory for the numbers."""
        width, heads = (1024, [5, 10, 20, 20]) if open_clip else (768, 8)
        with torch.device("meta"):
            unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=width, attention_head_dim=heads,
                                        use_linear_projection=open_clip)
            vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                                block_out_channels=(128, 256, 512, 512), layers_per_block=2)
            text = CLIPTextModel(CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, vocab_size=49408,
                                                num_hidden_layers=23 if open_clip else 12, num_attention_heads=width // 64))
        made = convert(writer(diffusers), *(m.state_dict() for m in (unet, vae, text)), open_clip)
        return {name: list(tensor.shape) for name, tensor in sorted(made.items())}

    command, *rest = sys.argv[2:]
    if command == "read":
        print(read(*rest))
    elif command == "write":
        write(*rest[:3], rest[3] == "sd2")
    elif command == "names":
        print(json.dumps(names(*rest)))
    elif command == "full":
        print(json.dumps(full(rest[0], rest[1] == "sd2")))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--diffusers", type=pathlib.Path)
    ap.add_argument("--python")
    ap.add_argument("--bin", type=pathlib.Path, default=ROOT / "target" / "release")
    ap.add_argument("--names", action="store_true")
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        python = a.python
        if python is None:
            python = str(scratch / "venv" / "bin" / "python")
            print("installing", *PACKAGES)
            subprocess.run([sys.executable, "-m", "venv", scratch / "venv"], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        call = lambda *words: subprocess.run([python, __file__, "--inside", *map(str, words)], check=True,
                                             stdout=subprocess.PIPE, text=True).stdout.strip().split("\n")[-1]
        run = lambda program, *words: subprocess.run([str(a.bin / program), *map(str, words)], check=True)
        for family in FAMILIES:
            folder, file = ROOT / "tests" / "parity" / f"{family}-tiny", scratch / f"{family}.safetensors"
            if a.names:
                call("write", a.diffusers, folder, file, family)
                (HERE / f"{family}.json").write_text(call("names", file) + "\n")
                (HERE / f"{family}_full.json").write_text(call("full", a.diffusers, family) + "\n")
                continue
            run("weights", "convert", folder, file, "--to", "single-file")
            print(f"{family}: diffusers reads ours, {call('read', file, folder)} tensors bit for bit")
            if a.diffusers is None:
                print(f"{family}: SKIPPED: diffusers' writer, for want of --diffusers DIR")
                continue
            call("write", a.diffusers, folder, file, family)
            draw = ["generate", "--no-plugin", "--prompt", "a red circle", "--size", "64x64", "--steps", "4", "--scheduler", "ddim"]
            run("host-demo", *draw, "--model", folder, "--out", scratch / "folder.png")
            run("host-demo", *draw, "--model", file, "--configs", folder, "--out", scratch / "file.png")
            # The pictures carry the paths they were made from, so the pixels are compared.
            from_png = "import sys,zlib,struct\nd=open(sys.argv[1],'rb').read()\no,i=b'',8\n" \
                "while i<len(d):\n n,=struct.unpack('>I',d[i:i+4])\n o+=d[i+8:i+8+n] if d[i+4:i+8]==b'IDAT' else b''\n i+=12+n\n" \
                "sys.stdout.buffer.write(zlib.decompress(o))"
            pixels = [subprocess.run([sys.executable, "-c", from_png, str(scratch / f"{name}.png")], check=True,
                                     stdout=subprocess.PIPE).stdout for name in ("folder", "file")]
            assert pixels[0] == pixels[1], f"{family}: other pixels from the file than from the folder"
            print(f"{family}: ours reads diffusers', the same picture as from the folder")


if __name__ == "__main__":
    inside() if sys.argv[1:2] == ["--inside"] else main()
