"""The nodes: what they take, what they give, what they do."""

import os
from typing import Any

from .curves import CURVES, Range
from .fields import Field, Node, choices
from .report import Report

FROM_FILE = "from the file"
FOLDER = "dpt"
"""ComfyUI's folder of adapters, `models/dpt` unless extra_model_paths.yaml says otherwise."""
EXTENSIONS = {".safetensors", ".bin"}
_TAPS = ("down0", "down1", "down2", "down3", "mid", "up0", "up1", "up2", "up3")


def register_folder() -> None:
    """Tells ComfyUI of the folder of adapters; one that the user has configured stays."""
    import folder_paths

    paths, extensions = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    default = os.path.join(folder_paths.models_dir, FOLDER)
    paths = [*paths, *([] if default in paths else [default])]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | EXTENSIONS)


def _adapters() -> list[str]:
    import folder_paths

    return folder_paths.get_filename_list(FOLDER)


def _path(name: str) -> str:
    import folder_paths

    return folder_paths.get_full_path_or_raise(FOLDER, name)


def load(
    adapter: str,
    lora_strength: float,
    gradient: str,
    tap: str,
    heads: int,
    matching_queries: int,
    device: str,
    dtype: str,
    ignore_extra_inputs: bool,
) -> tuple:
    """DPT Loader."""
    from .adapter import Dpt

    config: dict[str, Any] = {
        "adapter": _path(adapter),
        "lora_strength": lora_strength,
        "gradient": gradient,
        "device": device,
        "dtype": dtype,
        "ignore_extra_inputs": ignore_extra_inputs,
    }
    if tap != FROM_FILE:
        config["tap"] = tap
    for name, value in (("heads", heads), ("matching_queries", matching_queries)):
        if value:
            config[name] = value
    return (Dpt(config),)


def _file_state(adapter: str, **_others: Any) -> tuple[float, int]:
    status = os.stat(_path(adapter))
    return status.st_mtime, status.st_size


def apply(
    model: Any,
    dpt: Any,
    eta: float,
    start_percent: float,
    end_percent: float,
    every: int,
    curve: str,
    max_correction: float,
    mode: str,
    monitor: bool,
) -> tuple:
    """DPT Apply: a clone with the LoRA's patches and the wrappers that correct."""
    from . import lora
    from .model import describe
    from .run import Settings
    from .sampling import Correction

    describe(model)
    chosen = Range(eta=eta, start=start_percent, end=end_percent, every=every, curve=curve)
    settings = Settings(chosen, max_correction=max_correction, condition_only=mode == "condition-only", monitor=monitor)
    correction = Correction(dpt, settings)
    patched = model.clone()
    before = patched.attachments.get(KEY, ())
    if any(other.dpt is dpt for other in before):
        raise ValueError("this DPT is applied to the MODEL already: load it twice to correct twice")
    # Clones with other attachments are other models to ComfyUI, with weights of their own.
    patched.set_attachments(KEY, (*before, correction))
    entries = [entry for entry in dpt.lora if entry.scale != 0]
    if entries:
        patches = lora.patches(entries, model.model)
        missed = set(patches) - set(patched.add_patches(patches))
        if missed:
            raise ValueError(f"ComfyUI took no patch for {len(missed)} weights, such as {min(missed)}")
    correction.attach(patched)
    return patched, correction.report


KEY = "dpt"
"""Of the corrections in a patcher's attachments."""


def encode(clip: Any, text: str) -> tuple:
    """DPT Text Encode."""
    from .text import encode as encode_text

    return (encode_text(clip, text),)


def plot(report: Report, samples: Any, width: int, height: int) -> tuple:
    """DPT Score Plot. The latents are only waited for: the report is complete when they are there."""
    from .plot import draw

    return draw(report, width, height), report.to_json()


NODES = [
    Node(
        id="DptLoader",
        name="DPT Loader",
        description="Loads a DPT adapter, with its LoRA if its file has one.",
        inputs=(
            Field("adapter", "COMBO", "adapter weights in models/dpt, in the released names", choices=_adapters),
            Field(
                "lora_strength",
                "FLOAT",
                "multiplies the LoRA that the adapter was trained with; 0: without",
                {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01},
            ),
            Field(
                "gradient",
                "COMBO",
                "weights: the plugin's own U-Net up to the tap, on the MODEL's weights; host: ComfyUI's U-Net and PyTorch's autograd",
                {"default": "weights"},
                choices=choices("weights", "host"),
            ),
            Field(
                "tap",
                "COMBO",
                "the U-Net block that the adapter reads; released checkpoints do not name theirs",
                {"default": FROM_FILE},
                choices=choices(FROM_FILE, *_TAPS),
            ),
            Field("heads", "INT", "the adapter's attention heads; 0: from the file", {"default": 0, "min": 0, "max": 64}),
            Field(
                "matching_queries",
                "INT",
                "how many of the adapter's queries are for matching; 0: from the file",
                {"default": 0, "min": 0, "max": 1000},
            ),
            Field(
                "device",
                "COMBO",
                "where the adapter and the plugin's own U-Net compute",
                {"default": "cpu"},
                choices=choices("cpu", "cuda"),
            ),
            Field(
                "dtype",
                "COMBO",
                "what the plugin's own U-Net computes in",
                {"default": "f32"},
                choices=choices("f32", "f16", "bf16"),
            ),
            Field(
                "ignore_extra_inputs",
                "BOOLEAN",
                "correct also where ControlNet, attention patches and the like take part that the correction does not see",
                {"default": False},
            ),
        ),
        outputs=(("DPT", "dpt"),),
        run=load,
        fingerprint=_file_state,
    ),
    Node(
        id="DptApply",
        name="DPT Apply",
        description="Corrects the latents at every step by the gradient of the DPT score of the positive prompt.",
        inputs=(
            Field("model", "MODEL", "Stable Diffusion 1.x or 2.x, the one that the adapter was trained on"),
            Field("dpt", "DPT", "from DPT Loader"),
            Field(
                "eta",
                "FLOAT",
                "step size of the correction; 0: the LoRA alone",
                {"default": 0.5, "min": 0.0, "max": 100.0, "step": 0.05},
            ),
            Field(
                "start_percent",
                "FLOAT",
                "where correction starts, 0 being the noisiest latents",
                {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01},
            ),
            Field("end_percent", "FLOAT", "where it ends", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
            Field("every", "INT", "correct every k-th step of that range", {"default": 1, "min": 1, "max": 1000}),
            Field("curve", "COMBO", "eta over that range", {"default": "constant"}, choices=choices(*CURVES)),
            Field(
                "max_correction",
                "FLOAT",
                "bound on the correction's norm relative to the latents'; 0: none",
                {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.01},
            ),
            Field(
                "mode",
                "COMBO",
                "paper: the sampler goes on from the corrected latents; condition-only: the positive half of the guidance alone sees them",
                {"default": "paper"},
                choices=choices("paper", "condition-only"),
            ),
            Field("monitor", "BOOLEAN", "compute scores also in steps that are not corrected", {"default": False}),
        ),
        outputs=(("MODEL", "model"), ("DPT_REPORT", "report")),
        run=apply,
    ),
    Node(
        id="DptTextEncode",
        name="DPT Text Encode",
        description="CLIP Text Encode that also keeps what DPT compares with. Needed for SD 2.x, and for SD 1.x with clip skip.",
        inputs=(
            Field("clip", "CLIP", "text encoder of SD 1.x or 2.x"),
            Field("text", "STRING", "the prompt", {"default": "", "multiline": True, "dynamic_prompts": True}),
        ),
        outputs=(("CONDITIONING", "conditioning"),),
        run=encode,
    ),
    Node(
        id="DptScorePlot",
        name="DPT Score Plot",
        description="Draws the scores over the steps of the last run, and gives all that was recorded as JSON.",
        inputs=(
            Field("report", "DPT_REPORT", "from DPT Apply"),
            Field("samples", "LATENT", "from the sampler, which is to have run before"),
            Field("width", "INT", "of the picture", {"default": 640, "min": 200, "max": 4096}),
            Field("height", "INT", "of the picture", {"default": 360, "min": 120, "max": 4096}),
        ),
        outputs=(("IMAGE", "plot"), ("STRING", "json")),
        run=plot,
    ),
]
