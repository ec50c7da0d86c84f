"""Errors through every call: natural exceptions, and the process lives."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LIBRARY, Case

import sampler_hook as sh
from sampler_hook.errors import error_of

Make = Callable[..., sh.Plugin]


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"adapter": "no/such/adapter.safetensors"}, FileNotFoundError, "no/such/adapter.safetensors"),
        ({"adapter": Path(__file__)}, ValueError, "test_errors.py"),
        ({"no_such_key": 1}, ValueError, "no_such_key"),
        ({"eta": -1}, ValueError, "eta"),
        ({"eta": "much"}, ValueError, "eta|string"),
        ({"device": "tpu"}, ValueError, "tpu"),
        ({"eta": object()}, TypeError, "JSON cannot say"),
        ({"eta": float("nan")}, ValueError, "expected value"),
    ],
)
def test_configurations(create: Make, config: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        create(**config)


def test_creating_and_preparing(library: sh.Library, create: Make, case: Case) -> None:
    with pytest.raises(LookupError, match="no such plugin"):
        library.create("no such plugin")
    with pytest.raises(ValueError, match="adapter"):
        library.create("dpt")
    with pytest.raises(LookupError, match="mid"):
        create(tap="mid9").prepare(case.model())
    plugin = create()
    for model, error, words in [
        (case.model(prediction="flow"), NotImplementedError, "flow"),
        (case.model(unet_in_channels=9), NotImplementedError, "9 channels"),
        (case.model(prediction="noise"), ValueError, "'noise', expected one of epsilon, v, flow"),
        (case.model(unet_in_channels=-1), ValueError, "unet_in_channels is -1"),
    ]:
        with pytest.raises(error, match=words):
            plugin.prepare(model)
    for device, error in [("tpu", ValueError), ("cuda:x", ValueError), ("cpu:3", ValueError)]:
        with pytest.raises(error, match="device"):
            plugin.prepare(case.model(), device)
    with pytest.raises(FileNotFoundError, match="no/such/model"):
        create(base_model="no/such/model").prepare(case.model())
    plugin.prepare(case.model())


def test_states(create: Make, case: Case) -> None:
    plugin = create()
    with pytest.raises(sh.InvalidStateError):
        _ = plugin.needs
    with pytest.raises(RuntimeError, match="begin"):
        plugin.run(batch=2, steps=6, text=case.text())
    plugin.prepare(case.model())
    run = plugin.run(batch=2, steps=case.steps, text=case.text())
    with pytest.raises(sh.InvalidStateError):
        plugin.run(batch=2, steps=case.steps, text=case.text())
    with pytest.raises(sh.InvalidStateError):
        plugin.prepare(case.model())
    with pytest.raises(ValueError, match="count"):
        run.step(case.step(count=7), case.start.copy())
    with pytest.raises(ValueError, match="alpha_bar"):
        run.step(case.step(alpha_bar=2.0), case.start.copy())
    with pytest.raises(ValueError, match="space is 'vq'"):
        run.step(case.step(space="vq"), case.start.copy())
    run.end()
    run.end()
    with pytest.raises(sh.InvalidStateError):
        run.step(case.step(), case.start.copy())
    plugin.destroy()
    plugin.destroy()
    for call in (
        lambda: plugin.prepare(case.model()),
        lambda: plugin.run(batch=1, steps=1),
        lambda: run.step(case.step(), case.start.copy()),
        lambda: plugin.memory,
        lambda: plugin.params["eta"],
        lambda: plugin.lora.entries,
        lambda: plugin.config_schema,
    ):
        with pytest.raises(sh.InvalidStateError, match="destroyed"):
            call()
    assert "destroyed" in repr(plugin)


def test_texts(create: Make, case: Case) -> None:
    plugin = create()
    plugin.prepare(case.model())
    rows = np.zeros((2, 77, 32), np.float32)
    for text, words in [
        (sh.Text(prompts=["one"]), "prompts has 1 entries for a batch of 2"),
        (sh.Text(prompts="two"), "one string"),
        (sh.Text(context=rows, end_of_text=[1]), "end_of_text has 1"),
        (sh.Text(context=rows, end_of_text=[1, 77]), "77"),
        (sh.Text(context=rows[:1], pooled=rows[:, 0]), r"\[1, 77, 32\]"),
        (sh.Text(prompts=["\ud800", ""]), "surrogates"),
        (None, "prompts"),
    ]:
        with pytest.raises(ValueError, match=words):
            plugin.run(batch=2, steps=1, text=text)
    with pytest.raises(ValueError, match="batch is -1"):
        plugin.run(batch=-1, steps=1)
    with pytest.raises(ValueError, match="at least one step"):
        plugin.run(batch=2, steps=0, text=case.text())


def test_an_error_in_a_run_is_what_the_caller_sees(create: Make, case: Case) -> None:
    plugin = create()
    plugin.prepare(case.model())
    with pytest.raises(KeyError), plugin.run(batch=2, steps=case.steps, text=case.text()):
        raise KeyError("mine")
    # The run has ended.
    with plugin.run(batch=2, steps=case.steps, text=case.text()):
        pass


def test_every_status_has_an_exception() -> None:
    for status in sh.Status:
        if status != sh.Status.OK:
            error = error_of(status, "words")
            assert (error.code, error.message, str(error)) == (status, "words", "words")
    assert error_of(99, "of a later version").code == sh.Status.INTERNAL
    assert sh.Outcome(99) == sh.Outcome.SKIPPED_OTHER
    for status, builtin in {
        sh.Status.INVALID_ARGUMENT: ValueError,
        sh.Status.INVALID_CONFIG: ValueError,
        sh.Status.SHAPE_MISMATCH: ValueError,
        sh.Status.DTYPE_MISMATCH: ValueError,
        sh.Status.NOT_FOUND: FileNotFoundError,
        sh.Status.UNSUPPORTED: NotImplementedError,
        sh.Status.OUT_OF_MEMORY: MemoryError,
        sh.Status.INVALID_STATE: RuntimeError,
        sh.Status.PANIC: RuntimeError,
    }.items():
        assert isinstance(error_of(status, ""), builtin)


def test_files_that_are_no_library(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing here"):
        sh.Library.open(tmp_path / "nothing here.so")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(ValueError, match=r"text\.so is no plugin library"):
        sh.Library.open(tmp_path / "text.so")
    import _ctypes

    if Path(getattr(_ctypes, "__file__", "")).is_file():  # a library with another purpose
        with pytest.raises(ValueError, match="no plugin library"):
            sh.Library.open(_ctypes.__file__)


def test_leaving_without_destroying_is_quiet(case: Case) -> None:
    """A plugin in a run, a tensor made of lent memory, and a callback, left behind when the interpreter ends."""
    program = """
import sys, numpy as np, sampler_hook as sh
plugin = sh.Library.open(sys.argv[1]).create("dpt", {"adapter": sys.argv[2], "tap": "mid", "heads": 4,
                                                     "matching_queries": 5, "gradient": "split"})
plugin.prepare(sh.Model(prediction="epsilon", family="sd1", alphas_cumprod=[0.9, 0.5]))
run = plugin.run(batch=1, steps=1, text=sh.Text(pooled=np.ones((1, 32), np.float32)))
kept = np.from_dlpack(plugin.lora[0].down)
capsule = plugin.lora[0].up.__dlpack__()
print("alive")
"""
    command = [sys.executable, "-X", "dev", "-c", program, LIBRARY, case.adapter]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(sh.__file__).parents[1])
    assert (found.returncode, found.stdout, found.stderr) == (0, "alive\n", "")


def test_the_package_imports_nothing_but_the_standard_library() -> None:
    for path in Path(sh.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module or "")
            assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names), path
