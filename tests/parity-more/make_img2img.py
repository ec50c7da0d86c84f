"""Makes img2img.safetensors: runs from a picture on the tiny SD 1 pipeline of ../parity, with diffusers' parts.

    pip install torch diffusers transformers safetensors
    python make_img2img.py

The loop is that of diffusers' image-to-image pipeline, but with the mean of the VAE's distribution and one fixed noise. PNDM is
left out: diffusers evaluates timesteps there that its latents are not at.
"""
import pathlib

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

HERE = pathlib.Path(__file__).parent
MODEL = HERE.parent / "parity" / "sd1-tiny"
STEPS, STRENGTH, GUIDANCE, PROMPT = 6, 0.5, 5.0, "a red circle left of a blue square"
SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmpp-2m": DPMSolverMultistepScheduler}


@torch.no_grad()
def main():
    torch.manual_seed(0)
    vae, unet = AutoencoderKL.from_pretrained(MODEL / "vae").eval(), UNet2DConditionModel.from_pretrained(MODEL / "unet").eval()
    text = CLIPTextModel.from_pretrained(MODEL / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    # Without a mask: Stable Diffusion attends to padding.
    encode = lambda prompt: text(tokenizer([prompt], padding="max_length", max_length=77, return_tensors="pt",
                                           truncation=True).input_ids).last_hidden_state
    context = torch.cat((encode(""), encode(PROMPT)))
    pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
    image = 2.0 * (pixels.permute(2, 0, 1)[None].float() / 255.0) - 1.0
    latents = vae.encode(image).latent_dist.mode() * vae.config.scaling_factor
    noise = torch.randn_like(latents)
    out = dict(pixels=pixels, latents=latents, noise=noise)
    first = STEPS - min(int(STEPS * STRENGTH), STEPS)
    for name, cls in SCHEDULERS.items():
        scheduler = cls.from_pretrained(MODEL / "scheduler")
        scheduler.set_timesteps(STEPS)
        timesteps = scheduler.timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        z = scheduler.add_noise(latents, noise, timesteps[:1])
        out[f"{name}.noised"] = z
        for t in timesteps:
            both = scheduler.scale_model_input(torch.cat((z, z)), t)
            without, with_text = unet(both, t, encoder_hidden_states=context).sample.chunk(2)
            z = scheduler.step(without + GUIDANCE * (with_text - without), t, z).prev_sample
        out[f"{name}.final"] = z
    save_file({k: v.contiguous() for k, v in out.items()}, str(HERE / "img2img.safetensors"))


if __name__ == "__main__":
    main()
