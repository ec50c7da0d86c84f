"""Several threads: one call at a time, and the interpreter runs on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from conftest import Case
from hosts import Numbers, Recorder, pooled_text

import sampler_hook as sh

Make = Callable[..., sh.Plugin]


def test_a_second_thread_finds_the_plugin_busy(prepared: Make, case: Case) -> None:
    numbers = Numbers()
    plugin = prepared(Recorder(numbers), gradient="host")
    entered, leave = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert leave.wait(30)

    numbers.on_features = wait
    with plugin.run(batch=2, steps=case.steps, text=pooled_text()) as run:
        reports = []
        latents = case.start.copy()
        thread = threading.Thread(target=lambda: reports.append(run.step(case.step(), latents)))
        thread.start()
        try:
            assert entered.wait(30)
            with pytest.raises(sh.BusyError):
                run.step(case.step(), case.start.copy())
            with pytest.raises(sh.BusyError):
                plugin.destroy()
            plugin.params["eta"] = 1.0  # at any time, from any thread
        finally:
            leave.set()
            thread.join()
        assert reports[0].outcome == sh.Outcome.CORRECTED


def test_the_interpreter_runs_on_during_a_step(prepared: Make, case: Case) -> None:
    plugin = prepared()
    latents = np.random.default_rng(0).normal(size=(2, 4, 64, 64)).astype(np.float32)
    stamps: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            stamps.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    with plugin.run(batch=2, steps=case.steps, text=case.text()) as run:
        thread.start()
        started = time.perf_counter()
        report = run.step(case.step(), latents)
        ended = time.perf_counter()
        done.set()
        thread.join()
    margin = (ended - started) / 4
    within = [stamp for stamp in stamps if started + margin < stamp < ended - margin]
    assert report.seconds > 0.01
    assert len(within) >= 3, f"{len(within)} ticks in the middle of a step of {report.seconds} s"
