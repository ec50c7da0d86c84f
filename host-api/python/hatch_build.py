"""Puts the built plugin library into the wheel, and holds the package's version against the workspace's."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

WORKSPACE = Path(__file__).resolve().parents[2]


def library(variable: str, stem: str) -> Path:
    """The library that the environment names, else the workspace's release build."""
    prefix, suffix = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(sys.platform, ("lib", ".so"))
    built = WORKSPACE / "target" / "release" / f"{prefix}{stem}{suffix}"
    path = Path(os.environ.get(variable) or built)
    if not path.is_file():
        raise FileNotFoundError(
            f"no plugin library at {path}: build it with `cargo build --release` in {WORKSPACE}, "
            f"or let {variable} name one"
        )
    return path


def check_version(version: str) -> None:
    """Fails where the workspace, if this is part of one, has another version."""
    manifest = WORKSPACE / "Cargo.toml"
    if manifest.is_file():
        section = manifest.read_text(encoding="utf-8").partition("[workspace.package]")[2]
        found = re.search(r'^version = "(.+)"$', section, re.MULTILINE)
        if found is None or found[1] != version:
            raise ValueError(f"pyproject.toml has version {version}, {manifest} has {found and found[1]}")


class CustomBuildHook(BuildHookInterface[Any]):
    """Makes a wheel `py3-none-PLATFORM`: no extension module, but a library of this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        check_version(self.metadata.version)
        if version == "editable":  # the package finds its library by SAMPLER_HOOK_LIBRARY
            return
        libraries = [(library("SAMPLER_HOOK_LIBRARY", "dpt"), "dpt")]
        if os.environ.get("SAMPLER_HOOK_CUDA_LIBRARY"):
            libraries.append((library("SAMPLER_HOOK_CUDA_LIBRARY", "dpt_cuda"), "dpt_cuda"))
        for path, stem in libraries:
            prefix = "" if path.suffix == ".dll" else "lib"
            build_data["force_include"][str(path)] = f"sampler_hook/lib/{prefix}{stem}{path.suffix}"
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
