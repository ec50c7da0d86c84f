"""What the tests share: the library under test, the parity cases, and a small model to run on."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sampler_hook as sh

ROOT = Path(__file__).resolve().parents[3]
PARITY = ROOT / "tests" / "parity"
LIBRARY = Path(os.environ.get("SAMPLER_HOOK_LIBRARY") or ROOT / "target" / "release" / "libdpt.so")
os.environ["SAMPLER_HOOK_LIBRARY"] = str(LIBRARY)
PROMPT = "a red circle left of a blue square"


def load_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a file, f32 and f16."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    types = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        values = np.frombuffer(data[8 + size + first : 8 + size + last], types[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"]).copy()
    return tensors


def alphas_cumprod() -> np.ndarray:
    """Stable Diffusion's schedule."""
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


class Case:
    """One of the parity cases: a tiny pipeline, an adapter at a tap, and what PyTorch computes with them."""

    def __init__(self, family: str, tap: str) -> None:
        self.family, self.tap = family, tap
        self.model_path = PARITY / f"{family}-tiny"
        cases = PARITY / f"{family}-cases"
        self.adapter = cases / f"release_{tap}.safetensors"
        self.tensors = load_safetensors(cases / f"correction_{tap}.safetensors")
        self.settings = json.loads((cases / f"correction_{tap}.json").read_text())
        self.start: np.ndarray = self.tensors["start"]
        self.steps: int = self.settings["steps"]
        self.timesteps = [1000 // self.steps * (self.steps - 1 - i) + 1 for i in range(self.steps)]

    def config(self, **more: Any) -> dict[str, Any]:
        """The plugin's configuration; its own U-Net unless told otherwise."""
        sizes = {"tap": self.tap, "heads": 4, "matching_queries": 5}
        source = {} if more.get("gradient", "plugin") != "plugin" else {"base_model": self.model_path}
        return {"adapter": self.adapter, **sizes, "eta": self.settings["eta"], **source, **more}

    def model(self, **more: Any) -> sh.Model:
        config = json.loads((self.model_path / "unet" / "config.json").read_text())
        known = {"prediction": "epsilon", "family": self.family, "unet_config": config}
        return sh.Model(**{**known, "alphas_cumprod": alphas_cumprod(), **more})

    def step(self, index: int = 0, **more: Any) -> sh.Step:
        timestep = self.timesteps[index]
        known = {"index": index, "count": self.steps, "timestep": timestep, "alpha_bar": alphas_cumprod()[timestep]}
        return sh.Step(**{**known, **more})

    def text(self, batch: int = 2) -> sh.Text:
        return sh.Text(prompts=[PROMPT] * batch)

    @property
    def first_gradient(self) -> np.ndarray:
        return self.tensors["first_grad.paper"]


@pytest.fixture(scope="session")
def library() -> sh.Library:
    assert LIBRARY.is_file(), f"no {LIBRARY}: `cargo build --release`, or let SAMPLER_HOOK_LIBRARY name one"
    return sh.Library.open(LIBRARY)


@pytest.fixture(scope="session")
def case() -> Case:
    return Case("sd1", "mid")


@pytest.fixture
def create(library: sh.Library, case: Case) -> Iterator[Callable[..., sh.Plugin]]:
    """Makes plugins of the case, on the plugin's own U-Net unless told otherwise, and destroys them."""
    made: list[sh.Plugin] = []

    def make(host: sh.Host | None = None, **config: Any) -> sh.Plugin:
        made.append(library.create("dpt", case.config(**config), host))
        return made[-1]

    yield make
    for plugin in made:
        plugin.destroy()


@pytest.fixture
def prepared(create: Callable[..., sh.Plugin], case: Case) -> Callable[..., sh.Plugin]:
    """As `create`, and prepares."""

    def make(host: sh.Host | None = None, **config: Any) -> sh.Plugin:
        plugin = create(host, **config)
        plugin.prepare(case.model())
        return plugin

    return make
