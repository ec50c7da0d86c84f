"""Makes a base model for the shapes world from nothing: a tiny Stable Diffusion in the diffusers layout, half precision.

    pip install torch diffusers transformers pillow tqdm
    cargo build --release
    python pretrain.py OUT [--device cuda] [--steps-scale 4]

Three stages train one part each: the VAE, the text encoder and the U-Net. A stage reads the parts before it as OUT has
them, so a run that was interrupted goes on with the stage it was in, and ends as it would have without the interruption.
OUT/pretrain.json says which stages are done and how they went; OUT/samples.png shows what the model draws, each row a
prompt of SAMPLE_PROMPTS.

The scenes are drawn by the Rust program, whose world is the only definition: where the folder of --scenes has none, by

    target/release/weights shapes SCENES --examples 20000 --seed SEED
"""
import argparse, json, math, pathlib, re, shutil, subprocess, time
from dataclasses import dataclass

import diffusers, numpy, torch, transformers
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import make_image_grid
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = pathlib.Path(__file__).resolve().parent
TOKENIZER = HERE / "tokenizer"      # its merges spell every word of the world's captions and expressions
WIDTH = 128                         # of the text encoder's states, and of the space that it shares with pictures
SAMPLES_PER_PROMPT = 4
SAMPLE_PROMPTS = ["a red circle", "an orange cross", "a green square and a purple triangle", "two yellow squares",
                  "three blue circles", "a red triangle to the left of a blue square"]


@dataclass
class Scenes:
    """Pictures (N, 3, 64, 64) of bytes and their captions; of each, the hard negative: nearly right."""
    images: torch.Tensor
    hard_images: torch.Tensor
    captions: list[str]
    hard_captions: list[str]


def draw_scenes(folder, program, examples, seed):
    """Has the Rust program draw scenes, of both splits: the base model is to know every combination. It writes the manifest
    last, so a folder that has one is complete."""
    if not (folder / "manifest.jsonl").exists():
        subprocess.run([program, "shapes", folder, "--examples", str(examples), "--seed", str(seed)], check=True)


def load_scenes(folder, device):
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]

    def pictures(names):
        pixels = numpy.stack([numpy.asarray(Image.open(folder / name)) for name in tqdm(names, desc="scenes")])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)

    return Scenes(pictures([row["image"] for row in rows]), pictures([row["hard_images"][0] for row in rows]),
                  [row["caption"] for row in rows], [row["hard_captions"][0] for row in rows])


def normalised(pixels):
    """Bytes as the values from -1 to 1 that a VAE takes."""
    return pixels.float() / 127.5 - 1


def tokenise(texts, device):
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device)


def optimise(name, parameters, step, run, *, steps, rate, after_step=lambda: None):
    """AdamW with a short warm-up and cosine decay. `step` gives the loss's terms by name; returns what to record."""
    steps = max(1, round(steps * run.steps_scale))
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 40, steps)
    history, start = [], time.monotonic()
    progress = tqdm(range(steps), desc=name)
    for index in progress:
        terms = step()
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        after_step()
        history.append({term: value.detach() for term, value in terms.items()})
        if index % 20 == 0:         # not at every step: on a GPU, reading a value waits for it
            progress.set_postfix({term: f"{value:.4f}" for term, value in history[-1].items()})
    last = history[-max(1, steps // 10):]
    losses = {term: torch.stack([terms[term] for terms in last]).mean().item() for term in last[0]}
    return dict(steps=steps, seconds=round(time.monotonic() - start, 1), losses=losses)


def train_vae(scenes, run):
    vae = AutoencoderKL(
        sample_size=64, block_out_channels=(32, 64, 64), norm_num_groups=8, mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3).to(run.device)

    def step():
        pixels = scenes.images[torch.randint(len(scenes.images), (16,), device=run.device)]
        # Objects cover an eighth of a picture, and are all that matters in it. Only they have colour: the ground is grey.
        objects = pixels.amax(1, keepdim=True) > pixels.amin(1, keepdim=True)
        weight = 1 + 6 * objects.float()
        images = normalised(pixels)
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample - images
        reconstruction = (weight * (error.abs() + 4 * error.square())).mean() / weight.mean()
        return dict(reconstruction=reconstruction, kl=1e-5 * posterior.kl().mean())

    record = optimise("vae", vae.parameters(), step, run, steps=1300, rate=1e-3)
    vae.register_to_config(scaling_factor=1 / encode_images(vae, scenes.images).std().item())
    vae.half().save_pretrained(run.out / "vae")
    return record


@torch.no_grad()
def encode_images(vae, images):
    """The means of the pictures' latents, not scaled."""
    return torch.cat([vae.encode(normalised(batch)).latent_dist.mean for batch in images.split(256)])


class ImageEncoder(nn.Module):
    """The other half of the contrast, needed only to train the text encoder."""

    def __init__(self):
        super().__init__()
        channels = (3, 32, 64, 128, 128)
        layers = [nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU())
                  for a, b in zip(channels, channels[1:])]
        # Flattened and not pooled: what is left of what is in the places of the last feature map.
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, WIDTH))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, pixels):
        return self.layers(normalised(pixels))


def contrast(anchors, others, hard_others, scale, same):
    """InfoNCE: each anchor is to find its own among all the others and its hard negative. Others that fit the anchor as
    well, by `same`, are no negatives."""
    own = torch.arange(len(anchors), device=anchors.device)
    false_negative = same & (own[:, None] != own)
    # Masked after scaling: an infinity times its gradient of zero would make the scale's gradient NaN.
    logits = (scale * anchors @ others.T).masked_fill(false_negative, -math.inf)
    hard = scale * (anchors * hard_others).sum(-1, keepdim=True)
    return F.cross_entropy(torch.cat((logits, hard), 1), own)


def train_text_encoder(scenes, run):
    """As CLIP is: the pooled state, the last layer's at the end-of-text token, is to tell its picture from others."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).to(run.device)
    image_encoder = ImageEncoder().to(run.device)

    captions, hard_captions = (tokenise(texts, run.device) for texts in (scenes.captions, scenes.hard_captions))
    the_captions, the_hard_captions = (tokenise([re.sub(r"\ban?\b", "the", text) for text in texts], run.device)
                                       for texts in (scenes.captions, scenes.hard_captions))
    meanings = torch.unique(captions, dim=0, return_inverse=True)[1]

    def step():
        pick = torch.randint(len(captions), (128,), device=run.device)
        # Captions have "a", referring expressions "the": some of the texts do, so that its embedding is trained too.
        the = torch.rand(len(pick), 1, device=run.device) < 0.15
        tokens = torch.cat((torch.where(the, the_captions[pick], captions[pick]),
                            torch.where(the, the_hard_captions[pick], hard_captions[pick])))
        pixels = torch.cat((scenes.images[pick], scenes.hard_images[pick]))
        texts, hard_texts = F.normalize(text_encoder(tokens).pooler_output, dim=-1).chunk(2)
        images, hard_images = F.normalize(image_encoder(pixels), dim=-1).chunk(2)
        scale = image_encoder.log_scale.exp().clamp(max=100)
        same = meanings[pick, None] == meanings[pick]
        return dict(image_to_text=contrast(images, texts, hard_texts, scale, same) / 2,
                    text_to_image=contrast(texts, images, hard_images, scale, same) / 2)

    parameters = [*text_encoder.parameters(), *image_encoder.parameters()]
    record = optimise("text_encoder", parameters, step, run, steps=2500, rate=1e-3)
    text_encoder.half().save_pretrained(run.out / "text_encoder")
    return record


@torch.no_grad()
def encode_captions(captions, run):
    """The states of every different text, the empty one first, and the place of each caption's among them."""
    text_encoder = CLIPTextModel.from_pretrained(run.out / "text_encoder", dtype=torch.float32).to(run.device)
    texts = ["", *sorted(set(captions))]
    place = {text: index for index, text in enumerate(texts)}
    states = [text_encoder(tokens).last_hidden_state for tokens in tokenise(texts, run.device).split(256)]
    return torch.cat(states), torch.tensor([place[caption] for caption in captions], device=run.device)


def noise_scheduler():
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
                         clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon")


def train_unet(scenes, run):
    vae = AutoencoderKL.from_pretrained(run.out / "vae", dtype=torch.float32).to(run.device)
    latents = vae.config.scaling_factor * encode_images(vae, scenes.images)
    states, places = encode_captions(scenes.captions, run)
    scheduler = noise_scheduler()
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 128), layers_per_block=1, norm_num_groups=16, cross_attention_dim=WIDTH,
        attention_head_dim=4,       # the number of heads: diffusers keeps this wrong name for the sake of released models
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2).to(run.device)
    average = EMAModel(unet.parameters(), decay=0.999)

    def step():
        pick = torch.randint(len(latents), (32,), device=run.device)
        dropped = torch.rand(len(pick), device=run.device) < 0.1
        text = states[torch.where(dropped, 0, places[pick])]
        noise = torch.randn_like(latents[pick])
        t = torch.randint(scheduler.config.num_train_timesteps, (len(pick),), device=run.device)
        predicted = unet(scheduler.add_noise(latents[pick], noise, t), t, encoder_hidden_states=text).sample
        error = (predicted - noise).square().mean((1, 2, 3))
        snr = compute_snr(scheduler, t)         # min-SNR-5: the many steps with little noise do not drown the others
        return dict(noise=(error * snr.clamp(max=5) / snr).mean())

    record = optimise("unet", unet.parameters(), step, run, steps=4400, rate=7e-4,
                      after_step=lambda: average.step(unet.parameters()))
    average.copy_to(unet.parameters())
    unet.half().save_pretrained(run.out / "unet")
    return record


def write_pipeline(out):
    """What makes the trained parts a pipeline: tokenizer, scheduler and index."""
    # Copied, since saving it would write a single tokenizer.json and not the vocab.json and merges.txt of released models.
    shutil.copytree(TOKENIZER, out / "tokenizer", dirs_exist_ok=True)
    noise_scheduler().save_pretrained(out / "scheduler")
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(out / "vae"), text_encoder=CLIPTextModel.from_pretrained(out / "text_encoder"),
        unet=UNet2DConditionModel.from_pretrained(out / "unet"), tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        scheduler=noise_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_config(out)


def write_samples(run):
    pipeline = StableDiffusionPipeline.from_pretrained(run.out, dtype=torch.float32).to(run.device)
    prompts = [prompt for prompt in SAMPLE_PROMPTS for _ in range(SAMPLES_PER_PROMPT)]
    images = pipeline(prompts, num_inference_steps=25, guidance_scale=4, generator=torch.manual_seed(run.seed)).images
    make_image_grid(images, rows=len(SAMPLE_PROMPTS), cols=SAMPLES_PER_PROMPT).save(run.out / "samples.png")


STAGES = dict(vae=train_vae, text_encoder=train_text_encoder, unet=train_unet)


def open_record(path, settings):
    """The record of the run that OUT holds, or a new one."""
    if not path.exists():
        versions = {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}
        return dict(settings=settings, versions=versions, stages={})
    record = json.loads(path.read_text())
    if record["settings"] != settings:
        raise SystemExit(f"{path} is of a run with other settings, {record['settings']}; choose another folder")
    return record


def write_record(path, record):
    """Whole or not at all, as it decides what is done again."""
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out", type=pathlib.Path)
    ap.add_argument("--scenes", type=pathlib.Path, help="their folder, drawn if it has none [default: OUT-scenes]")
    ap.add_argument("--weights-program", type=pathlib.Path, default=HERE.parents[1] / "target/release/weights")
    ap.add_argument("--examples", type=int, default=20000, help="scenes to draw")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--steps-scale", type=float, default=1.0, help="multiplies the steps of every stage")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run = ap.parse_args()
    run.out.mkdir(parents=True, exist_ok=True)
    folder = run.scenes or run.out.with_name(run.out.name + "-scenes")
    draw_scenes(folder, run.weights_program, run.examples, run.seed)
    scenes = load_scenes(folder, run.device)

    path = run.out / "pretrain.json"
    settings = dict(seed=run.seed, scenes=len(scenes.captions), steps_scale=run.steps_scale, device=run.device)
    record = open_record(path, settings)
    for index, (name, train) in enumerate(STAGES.items()):
        if name not in record["stages"]:
            torch.manual_seed(run.seed + index)
            record["stages"][name] = train(scenes, run)
            write_record(path, record)
    write_pipeline(run.out)
    write_samples(run)


if __name__ == "__main__":
    main()
