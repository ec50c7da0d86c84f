"""What the plugin asks of the host, and what becomes of exceptions there."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from conftest import PROMPT, Case, load_safetensors, relative_error
from hosts import Numbers, Recorder, pooled_text

import sampler_hook as sh

Make = Callable[..., sh.Plugin]


def test_the_hosts_gradient_is_used_as_it_is(prepared: Make, case: Case) -> None:
    numbers = Numbers()
    plugin = prepared(Recorder(numbers), gradient="host")
    assert plugin.needs == sh.Needs(gradient=True, context=False, pooled=True, weights=False, tap="mid")
    with plugin.run(batch=2, steps=case.steps, text=pooled_text()) as run:
        latents = case.start.copy()
        report = run.step(case.step(), latents)
    np.testing.assert_array_equal(latents, case.start + np.float32(20) * numbers.gradient)
    (step, seen, tap) = numbers.seen[0]
    assert (step.index, step.count, step.timestep, step.space, tap) == (0, 6, case.timesteps[0], "vp", "mid")
    np.testing.assert_array_equal(seen, case.start)
    assert numbers.cotangent is not None
    assert numbers.cotangent.shape == numbers.activation.shape
    assert np.abs(numbers.cotangent).max() > 0
    assert all(-1 <= item.score <= 1 for item in report.items)
    for tensor in numbers.lent:
        with pytest.raises(ValueError, match="has ended"):
            np.from_dlpack(tensor)


def test_a_steps_own_text_reaches_the_host(prepared: Make, case: Case) -> None:
    numbers = Numbers()
    plugin = prepared(Recorder(numbers), gradient="host")
    own = sh.Text(pooled=np.ones((2, 32), np.float32), prompts=["naïve café", PROMPT])
    seen: list[sh.Text | None] = []
    numbers.on_features = lambda: seen.append(numbers.seen[-1][0].text)
    with plugin.run(batch=2, steps=case.steps, text=pooled_text()) as run:
        run.step(case.step(space="ve"), case.start.copy())
        run.step(case.step(text=own), case.start.copy())
    assert seen[0] is None
    assert seen[1] is not None
    assert seen[1].prompts == own.prompts
    # In VP space, whatever the step's space is.
    assert relative_error(numbers.seen[0][1], case.start * np.sqrt(case.step().alpha_bar)) < 1e-6


def test_halves_give_the_bits_of_a_step(prepared: Make, case: Case) -> None:
    numbers = Numbers()
    whole = prepared(Recorder(numbers), gradient="host")
    split = prepared(gradient="split")
    with whole.run(batch=2, steps=case.steps, text=pooled_text()) as run:
        expected = case.start.copy()
        stepped = run.step(case.step(), expected)
    with split.run(batch=2, steps=case.steps, text=pooled_text()) as run:
        assert run.score(case.step()).outcome == sh.Outcome.CORRECTED
        cotangent = np.full_like(numbers.activation, np.nan)
        scored = run.score(case.step(), numbers.activation, cotangent)
        latents, out = case.start.copy(), np.zeros_like(case.start)
        applied = run.apply(case.step(), latents, numbers.gradient, out)
        with pytest.raises(NotImplementedError, match="split/1"):
            run.step(case.step(), latents)
        np.testing.assert_array_equal(latents, case.start)
        run.apply(case.step(), latents, numbers.gradient)
    np.testing.assert_array_equal(cotangent, numbers.cotangent)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(latents, expected)
    assert [item.score for item in scored.items] == [item.score for item in stepped.items]
    for found, whole_item in zip(applied.items, stepped.items, strict=True):
        assert found.correction_norm == whole_item.correction_norm


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["on_features", "on_vjp"])
def test_exceptions_reach_the_caller_as_the_cause(prepared: Make, case: Case, where: str) -> None:
    numbers = Numbers()
    plugin = prepared(Recorder(numbers), gradient="host")

    def fail() -> None:
        raise Broken("the wire is cut")

    with plugin.run(batch=2, steps=case.steps, text=pooled_text()) as run:
        setattr(numbers, where, fail)
        latents = case.start.copy()
        with pytest.raises(sh.HostFailedError, match="Broken: the wire is cut") as raised:
            run.step(case.step(), latents)
        assert isinstance(raised.value.__cause__, Broken)
        assert raised.value.code == sh.Status.HOST_FAILED
        np.testing.assert_array_equal(latents, case.start)
        # The next step is not concerned.
        setattr(numbers, where, lambda: None)
        assert run.step(case.step(), latents).outcome == sh.Outcome.CORRECTED


def test_an_interrupt_comes_through_as_itself(prepared: Make, case: Case) -> None:
    numbers = Numbers()
    plugin = prepared(Recorder(numbers), gradient="host")

    def interrupt() -> None:
        raise KeyboardInterrupt

    numbers.on_vjp = interrupt
    with plugin.run(batch=2, steps=case.steps, text=pooled_text()) as run:
        latents = case.start.copy()
        with pytest.raises(KeyboardInterrupt):
            run.step(case.step(), latents)
        np.testing.assert_array_equal(latents, case.start)


@pytest.fixture
def default_interrupts() -> Iterator[None]:
    """Python's own handler, which a shell takes from what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_interrupts")
@pytest.mark.parametrize("where", ["features", "cancelled"])
def test_ctrl_c_stops_the_step(prepared: Make, case: Case, where: str) -> None:
    numbers, host = Numbers(), Recorder()
    host.gradient = numbers

    def press() -> bool:
        signal.raise_signal(signal.SIGINT)
        return False

    plugin = prepared(host, gradient="host")
    with plugin.run(batch=2, steps=case.steps, text=pooled_text()) as run:
        if where == "features":
            numbers.on_features = press  # type: ignore[assignment]
        else:
            host.cancelled = press  # type: ignore[method-assign]
        latents = case.start.copy()
        with pytest.raises(KeyboardInterrupt):
            run.step(case.step(), latents)
        np.testing.assert_array_equal(latents, case.start)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_callbacks_give_is_checked(prepared: Make, case: Case) -> None:
    numbers = Numbers()
    plugin = prepared(Recorder(numbers), gradient="host")
    good = numbers.activation
    with plugin.run(batch=2, steps=case.steps, text=pooled_text()) as run:
        for wrong, words in [(good[:1], "batch"), (good.astype(np.float64), "64 bits"), ("features", "found str")]:
            numbers.activation = wrong
            with pytest.raises(sh.HostFailedError, match=words):
                run.step(case.step(), case.start.copy())
        numbers.activation = good
        numbers.gradient = numbers.gradient[:, :2]
        with pytest.raises(sh.HostFailedError, match=r"vjp has shape \[2, 2, 16, 16\], expected \[2, 4, 16, 16\]"):
            run.step(case.step(), case.start.copy())
    numbers.activation = good[:, :16]
    with plugin.run(batch=2, steps=case.steps, text=pooled_text()) as run:
        with pytest.raises(sh.ShapeMismatchError, match="expected"):
            run.step(case.step(), case.start.copy())
        assert numbers.released > 0


def test_log_progress_and_cancel(prepared: Make, case: Case) -> None:
    host = Recorder()
    plugin = prepared(host)
    assert ("load the base model", 1, 1) in host.tasks
    assert (logging.INFO, '`gradient` is not configured: "plugin"') in host.messages
    with plugin.run(batch=2, steps=case.steps, text=case.text()) as run:
        host.stop = True
        latents = case.start.copy()
        with pytest.raises(sh.CancelledError) as raised:
            run.step(case.step(), latents)
        assert raised.value.__cause__ is None
        np.testing.assert_array_equal(latents, case.start)


@pytest.mark.parametrize("method", ["log", "cancelled", "progress"])
def test_exceptions_of_hosts_without_a_status(create: Make, case: Case, method: str) -> None:
    def fail(*arguments: object) -> None:
        raise Broken(method)

    host = Recorder()
    if method == "log":
        host.log = fail  # type: ignore[method-assign]
        with pytest.raises(Broken):
            create(host)
        return
    plugin = create(host)
    if method == "progress":
        host.progress = fail  # type: ignore[method-assign]
        with pytest.raises(Broken):
            plugin.prepare(case.model())
        return
    plugin.prepare(case.model())
    with plugin.run(batch=2, steps=case.steps, text=case.text()) as run:
        host.cancelled = fail  # type: ignore[method-assign,assignment]
        with pytest.raises(sh.CancelledError) as raised:
            run.step(case.step(), case.start.copy())
    assert isinstance(raised.value.__cause__, Broken)


def test_the_default_host_logs(create: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sampler_hook"):
        create()
    assert '"plugin"' in caplog.text


class Lender(sh.Weights):
    """The tiny U-Net's weights, with the plugin's LoRA merged."""

    def __init__(self, case: Case, lora: sh.Lora) -> None:
        self.tensors = load_safetensors(case.model_path / "unet" / "diffusion_pytorch_model.safetensors")
        for index, entry in enumerate(lora):
            weight = self.tensors[f"{entry.module}.weight"]
            lora.merge(index, 1.0, weight.reshape(weight.shape[:2]))
        self.read: list[str] = []
        self.count = 1

    @property
    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def revision(self) -> int:
        return self.count

    def tensor(self, name: str) -> sh.SupportsDLPack:
        self.read.append(name)
        return self.tensors[name]


def test_lent_weights_give_the_own_unets_numbers(library: sh.Library, case: Case) -> None:
    if library.abi < (0, 3):
        pytest.skip("the library's weights/1 cannot be offered from Python")
    lender = Lender(case, library.create("dpt", case.config(gradient="split")).lora)
    host = Recorder(weights=lender)
    with library.create("dpt", case.config(gradient="weights"), host) as plugin:
        plugin.prepare(case.model())
        assert plugin.needs.weights
        assert 0 < len(lender.read) < len(lender.tensors), "up to the tap"
        context = np.random.default_rng(2).normal(size=(2, 77, 32)).astype(np.float32)
        given = sh.Text(context=context, pooled=context[:, 5])
        lender.read.clear()
        with plugin.run(batch=2, steps=case.steps, text=given) as run:
            found = case.start.copy()
            run.step(case.step(), found)
        assert lender.read == [], "nothing has changed"
        lender.count += 1
        with plugin.run(batch=2, steps=case.steps, text=given):
            assert lender.read
        lender.tensors["conv_in.bias"] = lender.tensors["conv_in.bias"][:3]
        lender.count += 1
        with pytest.raises(sh.InvalidDataError, match=r"conv_in\.bias"):
            plugin.run(batch=2, steps=case.steps, text=given)
        del lender.tensors["conv_in.bias"]
        lender.count += 1
        with pytest.raises(sh.HostFailedError, match="KeyError") as raised:
            plugin.run(batch=2, steps=case.steps, text=given)
        assert isinstance(raised.value.__cause__, KeyError)
    with library.create("dpt", case.config()) as plugin:
        plugin.prepare(case.model())
        with plugin.run(batch=2, steps=case.steps, text=given) as run:
            expected = case.start.copy()
            run.step(case.step(), expected)
    assert relative_error(found, expected) < 1e-5
