"""The pack's modules without ComfyUI, and ComfyUI's checkout where COMFYUI_PATH names one."""

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
PACK = HERE.parent
REPOSITORY = PACK.parent.parent
PARITY = REPOSITORY / "tests" / "parity"

# The tiny models are slower on more threads.
os.environ.setdefault("RAYON_NUM_THREADS", "1")
torch.set_num_threads(1)

sys.path[:0] = [str(PACK), str(HERE)]
if os.environ.get("COMFYUI_PATH"):
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    # As `--cpu` does; ComfyUI reads it when it is imported.
    import comfy.cli_args

    comfy.cli_args.args.cpu = True


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The checkout of ComfyUI."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH names no checkout of ComfyUI")
    return Path(path)


@pytest.fixture(scope="session")
def library() -> Path:
    """The plugin's library."""
    path = os.environ.get("SAMPLER_HOOK_LIBRARY")
    if not path:
        pytest.skip("SAMPLER_HOOK_LIBRARY names no library of the plugin")
    return Path(path)


@pytest.fixture
def adapters(library, monkeypatch):
    """DPT Loader takes paths in place of names in models/dpt."""
    from dpt import nodes

    monkeypatch.setattr(nodes, "_path", lambda name: name)
