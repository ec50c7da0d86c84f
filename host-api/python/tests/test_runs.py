"""Whole calls: what a step gives is what PyTorch gives, and the interface says what it does."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import LIBRARY, PROMPT, Case, alphas_cumprod, load_safetensors, relative_error

import sampler_hook as sh

Make = Callable[..., sh.Plugin]


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("tap", ["mid", "up1"])
def test_the_first_step_is_pytorchs(library: sh.Library, family: str, tap: str) -> None:
    case = Case(family, tap)
    with library.create("dpt", case.config()) as plugin:
        plugin.prepare(case.model())
        assert plugin.needs == sh.Needs(gradient=False, context=False, pooled=False, weights=False, tap=tap)
        with plugin.run(batch=2, steps=case.steps, guidance_scale=5.0, text=case.text()) as run:
            latents = case.start.copy()
            report = run.step(case.step(), latents)
    gradient = (latents - case.start) / case.settings["eta"]
    assert relative_error(gradient, case.first_gradient) < 1e-3
    assert report.outcome == sh.Outcome.CORRECTED
    assert 0 < report.seconds < 60
    for item, (found, score) in enumerate(zip(report.items, case.tensors["scores.paper"][0], strict=True)):
        assert found.status == sh.Status.OK
        assert found.score == pytest.approx(float(score), abs=1e-5)
        assert found.gradient_norm == pytest.approx(float(np.linalg.norm(case.first_gradient[item])), rel=1e-3)
        assert found.correction_norm == pytest.approx(case.settings["eta"] * found.gradient_norm, rel=1e-5)


def test_later_steps_are_pytorchs(prepared: Make, case: Case) -> None:
    """The scheduler's share of a run is known where it starts from PyTorch's latents: only the scores are compared."""
    plugin = prepared()
    with plugin.run(batch=2, steps=case.steps, text=case.text()) as run:
        for index in range(1, case.steps):
            latents = case.tensors["latents.paper"][index - 1].copy()
            report = run.step(case.step(index), latents)
            scores = [item.score for item in report.items]
            assert scores == pytest.approx(case.tensors["scores.paper"][index].tolist(), abs=1e-4)


def test_out_of_place_and_sigma_space(prepared: Make, case: Case) -> None:
    plugin = prepared()
    with plugin.run(batch=2, steps=case.steps, text=case.text()) as run:
        latents, out = case.start.copy(), np.zeros_like(case.start)
        run.step(case.step(), latents, out)
        np.testing.assert_array_equal(latents, case.start)
        # x = z / c, and so is what is written.
        c = math.sqrt(case.step().alpha_bar)
        sigma_space = (case.start / c).astype(np.float32)
        run.step(case.step(space="ve"), sigma_space)
        assert relative_error(sigma_space * c, out) < 1e-5


def test_skipped_steps_leave_the_bits(prepared: Make, case: Case) -> None:
    plugin = prepared(start=0.5, every=2)
    with plugin.run(batch=2, steps=case.steps, text=case.text()) as run:
        latents, out = case.start.copy(), np.zeros_like(case.start)
        assert run.step(case.step(0), latents, out).outcome == sh.Outcome.SKIPPED_RANGE
        np.testing.assert_array_equal(out, case.start)
        assert run.step(case.step(4), latents).outcome == sh.Outcome.SKIPPED_INTERVAL
        assert run.step(case.step(3, sub_evaluation=1), latents).outcome == sh.Outcome.SKIPPED_SUB_EVALUATION
        plugin.params["eta"] = 0
        report = run.step(case.step(3), latents)
        assert report.outcome == sh.Outcome.SKIPPED_STRENGTH
        assert math.isnan(report.items[0].score)
        assert report.items[0].correction_norm == 0
        np.testing.assert_array_equal(latents, case.start)
    with plugin.run(batch=0, steps=2) as run:
        empty = np.zeros((0, 4, 16, 16), np.float32)
        report = run.step(sh.Step(index=0, count=2, timestep=1, alpha_bar=0.9), empty)
        assert report == sh.Report(sh.Outcome.SKIPPED_EMPTY, report.seconds, ())


def test_one_bad_item_fails_alone(prepared: Make, case: Case) -> None:
    plugin = prepared()
    with plugin.run(batch=2, steps=case.steps, text=case.text()) as run:
        latents = case.start.copy()
        latents[0, 1, 2, 3] = np.nan
        before = latents.copy()
        report = run.step(case.step(), latents)
        assert [item.status for item in report.items] == [sh.Status.NON_FINITE, sh.Status.OK]
        np.testing.assert_array_equal(latents[0], before[0])
        assert not np.array_equal(latents[1], before[1])
        with pytest.raises(sh.NonFiniteError, match="every item"):
            run.step(case.step(), np.full_like(latents, np.inf))


def test_text_by_context_and_position_by_pooled_and_by_step(prepared: Make, case: Case) -> None:
    """Prompts are encoded by the plugin; the same text as embeddings gives the same numbers."""
    stored = load_safetensors(case.model_path.parent / "sd1-cases" / "text.safetensors")
    prompts = json.loads((case.model_path.parent / "sd1-cases" / "text.json").read_text())
    texts = prompts if isinstance(prompts, list) else prompts["prompts"]
    row = [entry["prompt"] if isinstance(entry, dict) else entry for entry in texts].index(PROMPT)
    hidden = next(value for value in stored.values() if value.ndim == 3)[[row, row]]
    pooled = next(value for value in stored.values() if value.ndim == 2 and value.shape[1] == hidden.shape[2])[
        [row] * 2
    ]
    position = int(np.flatnonzero((hidden[0] == pooled[0]).all(axis=1))[0])
    plugin = prepared()
    given = [
        sh.Text(prompts=[PROMPT] * 2),
        sh.Text(context=hidden, pooled=pooled),
        sh.Text(context=hidden, end_of_text=[position] * 2),
    ]
    results = []
    for text in given:
        with plugin.run(batch=2, steps=case.steps, text=text) as run:
            results.append(case.start.copy())
            run.step(case.step(), results[-1])
    with plugin.run(batch=2, steps=case.steps, text=sh.Text(prompts=["naïve café"] * 2)) as run:
        other, replaced = case.start.copy(), case.start.copy()
        run.step(case.step(), other)
        run.step(case.step(text=given[1]), replaced)
    for result in [*results[1:], replaced]:
        assert relative_error(result, results[0]) < 1e-6
    assert relative_error(other, results[0]) > 1e-3


def test_parameters(create: Make) -> None:
    plugin = create()
    params = plugin.params
    assert list(params) == ["eta", "start", "end", "every", "max_correction", "monitor"]
    assert dict(params) == {"eta": 20.0, "start": 0, "end": 1, "every": 1, "max_correction": 0, "monitor": False}
    info = params.info("every")
    assert (info.kind, info.default, info.minimum, info.maximum) == (sh.ParamKind.INTEGER, 1, 1, 1000)
    assert info.live
    assert info.unit == "steps"
    params["monitor"] = True
    params["every"] = 3
    assert params["monitor"] is True
    assert isinstance(params["every"], int)
    for name, value, words in [("eta", -1, "eta"), ("every", 1.5, "whole number"), ("eta", "much", "a number")]:
        with pytest.raises(ValueError, match=words):
            params[name] = value
    with pytest.raises(KeyError):
        params["no such parameter"]
    schema = plugin.config_schema
    assert schema is not None
    assert schema["required"] == ["adapter"]
    assert set(params) <= set(schema["properties"])


def test_lora(create: Make, case: Case, tmp_path: Path) -> None:
    plugin = create()
    released = load_safetensors(case.adapter)
    assert len(plugin.lora) == len(plugin.lora.entries) == sum(name.endswith("_lora.down.weight") for name in released)
    index, entry = next((i, entry) for i, entry in enumerate(plugin.lora) if entry.module.endswith("attn2.to_q"))
    name = f"unet.{entry.module.removesuffix('.to_q')}.processor.to_q_lora"
    down, up = np.from_dlpack(entry.down), np.from_dlpack(entry.up)
    np.testing.assert_array_equal(down, released[f"{name}.down.weight"])
    np.testing.assert_array_equal(up, released[f"{name}.up.weight"])
    assert (entry.rank, entry.scale) == (down.shape[0], 1.0)

    weight = np.random.default_rng(0).normal(size=(up.shape[0], down.shape[1])).astype(np.float32)
    expected = weight + 0.5 * up @ down
    plugin.lora.merge(index, 0.5, weight)
    assert relative_error(weight, expected) < 1e-6
    with pytest.raises(sh.ShapeMismatchError, match="weight"):
        plugin.lora.merge(0, 1.0, np.zeros((3, 3), np.float32))
    with pytest.raises(IndexError):
        plugin.lora[len(plugin.lora)]

    plugin.lora.write(tmp_path / "peft.safetensors")
    written = load_safetensors(tmp_path / "peft.safetensors")
    np.testing.assert_array_equal(written[f"unet.{entry.module}.lora_A.weight"], down)
    plugin.lora.write(tmp_path / "kohya.safetensors", layout="kohya")
    kohya = "lora_unet_" + entry.module.replace(".", "_")
    np.testing.assert_array_equal(load_safetensors(tmp_path / "kohya.safetensors")[f"{kohya}.lora_up.weight"], up)
    with pytest.raises(ValueError, match="layout 'other', expected one of peft, kohya"):
        plugin.lora.write(tmp_path / "x", layout="other")
    with pytest.raises(sh.SamplerHookError, match="no such folder"):
        plugin.lora.write(tmp_path / "no such folder" / "x.safetensors")
    plugin.destroy()
    with pytest.raises(ValueError, match="has ended"):
        np.from_dlpack(entry.down)


def test_memory_and_preparing_again(create: Make, case: Case) -> None:
    plugin = create()
    before = plugin.memory
    plugin.prepare(case.model())
    with_unet = plugin.memory
    assert with_unet > before > 0
    plugin.prepare(case.model(alphas_cumprod=alphas_cumprod().tolist()), device="cpu")
    assert plugin.memory == with_unet


def test_libraries(monkeypatch: pytest.MonkeyPatch, library: sh.Library, caplog: pytest.LogCaptureFixture) -> None:
    (descriptor,) = library.descriptors
    assert descriptor.id == "dpt"
    assert descriptor.name
    monkeypatch.setenv("SAMPLER_HOOK_LIBRARY", str(LIBRARY))
    assert sh.Library.open().path == LIBRARY
    monkeypatch.delenv("SAMPLER_HOOK_CUDA_LIBRARY", raising=False)
    assert sh.Library.open(device="cuda:0").path == LIBRARY
    assert "compute on the CPU, though cuda:0" in caplog.text
    assert "SAMPLER_HOOK_CUDA_LIBRARY" in caplog.text
    monkeypatch.setenv("SAMPLER_HOOK_CUDA_LIBRARY", str(LIBRARY))
    caplog.clear()
    assert sh.Library.open(device="cuda").path == LIBRARY
    assert caplog.text == ""
    monkeypatch.delenv("SAMPLER_HOOK_LIBRARY")
    bundled = Path(sh.__file__).parent / "lib"
    if not bundled.exists():
        with pytest.raises(FileNotFoundError, match="SAMPLER_HOOK_LIBRARY"):
            sh.Library.open()


def test_a_forgotten_plugin_is_destroyed(library: sh.Library, case: Case) -> None:
    class Loop(sh.Host):
        plugin: sh.Plugin | None = None

    host = Loop()
    host.plugin = library.create("dpt", case.config(), host)
    destroyed = []
    table, destroy = host.plugin._table, host.plugin._table.destroy
    host.plugin._table = type("Table", (), {"destroy": lambda self, address: destroyed.append(destroy(address))})()
    del host, table
    gc.collect()
    assert destroyed == [None]
