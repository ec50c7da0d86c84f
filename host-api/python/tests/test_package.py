"""The wheel and the README: what they say is what one gets."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from conftest import LIBRARY, ROOT

PACKAGE = ROOT / "host-api" / "python"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", (PACKAGE / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)


def run(program: str, folder: Path) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(PACKAGE),
        "SAMPLER_HOOK_LIBRARY": str(LIBRARY),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_the_readmes_examples_run_as_they_are(index: int, tmp_path: Path) -> None:
    example = EXAMPLES[index]
    for module in ("diffusers", "torch", "transformers"):
        if "diffusers" in example:
            pytest.importorskip(module)
    # Files that it reads are the checkout's, files that it writes are not.
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    assert run(example, tmp_path)
    if "corrected.png" in example:
        assert (tmp_path / "corrected.png").read_bytes().startswith(b"\x89PNG")


def workspace_version() -> str:
    section = (ROOT / "Cargo.toml").read_text().partition("[workspace.package]")[2]
    found = re.search(r'^version = "(.+)"$', section, flags=re.MULTILINE)
    assert found
    return found[1]


def test_the_version_is_the_workspaces() -> None:
    assert f'\nversion = "{workspace_version()}"\n' in (PACKAGE / "pyproject.toml").read_text()


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q", "-w", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(PACKAGE)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_the_wheel_carries_the_library(tmp_path: Path) -> None:
    cuda = shutil.copy(LIBRARY, tmp_path / "cuda.so")
    found = build(tmp_path, SAMPLER_HOOK_LIBRARY=str(LIBRARY), SAMPLER_HOOK_CUDA_LIBRARY=str(cuda))
    assert found.returncode == 0, found.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"sampler_hook-{re.escape(workspace_version())}-py3-none-(?!any)\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for name in ("libdpt", "libdpt_cuda"):
            assert archive.read(f"sampler_hook/lib/{name}{LIBRARY.suffix}") == LIBRARY.read_bytes()
        information = next(name for name in names if name.endswith("/METADATA"))
        metadata = message_from_string(archive.read(information).decode())
        tag = message_from_string(archive.read(information.replace("METADATA", "WHEEL")).decode())
        archive.extractall(tmp_path / "installed")
    assert "sampler_hook/py.typed" in names
    assert "sampler_hook/diffusers/__init__.py" in names
    assert not [name for name in names if "test" in name or "__pycache__" in name]
    assert (metadata["Name"], metadata["Version"]) == ("sampler-hook", workspace_version())
    assert metadata["License-Expression"] == "MIT OR Apache-2.0"
    assert sorted(metadata.get_all("License-File") or []) == ["LICENSE-APACHE", "LICENSE-MIT"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert tag["Root-Is-Purelib"] == "false"
    # And it finds what it carries.
    program = "import sampler_hook as sh; print(sh.Library.open().path); print(sh.Library.open(device='cuda').path)"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SAMPLER_HOOK")}
    environment["PYTHONPATH"] = str(tmp_path / "installed")
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    carried = tmp_path / "installed" / "sampler_hook" / "lib"
    assert printed.stdout.split() == [str(carried / f"{name}{LIBRARY.suffix}") for name in ("libdpt", "libdpt_cuda")]


def test_a_wheel_without_a_library_is_an_error(tmp_path: Path) -> None:
    found = build(tmp_path, SAMPLER_HOOK_LIBRARY=str(tmp_path / "none.so"))
    assert found.returncode != 0
    said = found.stdout + found.stderr
    assert "cargo build --release" in said
    assert "SAMPLER_HOOK_LIBRARY" in said
