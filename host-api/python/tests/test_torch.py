"""PyTorch's tensors: their dtypes and layouts, autograd, inference mode, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from conftest import Case

import sampler_hook as sh
from sampler_hook.tensor import Tensor, assign, borrow

torch = pytest.importorskip("torch")
Make = Callable[..., sh.Plugin]


@pytest.fixture
def correct(prepared: Make, case: Case) -> Callable[..., sh.Report]:
    plugin = prepared()

    def step(latents: object, out: object = None) -> sh.Report:
        with plugin.run(batch=2, steps=case.steps, text=case.text()) as run:
            return run.step(case.step(), latents, out)

    return step


@pytest.fixture
def expected(correct: Callable[..., sh.Report], case: Case) -> np.ndarray:
    numbers = case.start.copy()
    correct(numbers)
    return numbers


def test_layouts(correct: Callable[..., sh.Report], case: Case, expected: np.ndarray) -> None:
    start = torch.from_numpy(case.start)
    columns = start.clone().mT.contiguous().mT
    large = torch.full((3, 5, 20, 40), torch.nan)
    gaps = large[1:, 1:, 2:18, 3:35:2]
    gaps.copy_(start)
    for latents in [start.clone(), start.clone(memory_format=torch.channels_last), gaps, columns]:
        correct(latents)
        np.testing.assert_array_equal(latents.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(correct: Callable[..., sh.Report], case: Case, dtype: torch.dtype) -> None:
    half = torch.from_numpy(case.start).to(dtype)
    numbers = half.float()
    correct(numbers)
    correct(half)
    assert torch.equal(half, numbers.to(dtype))


def test_autograd(correct: Callable[..., sh.Report], case: Case, expected: np.ndarray) -> None:
    latents = torch.from_numpy(case.start.copy()).requires_grad_()
    out = torch.zeros(latents.shape)
    correct(latents, out)
    np.testing.assert_array_equal(out.numpy(), expected)
    with pytest.raises(ValueError, match="requires grad"):
        correct(latents)
    np.testing.assert_array_equal(latents.detach().numpy(), case.start)
    # A backward pass that needs the old values does not get the new ones.
    weight = torch.ones(latents.shape, requires_grad=True)
    saved = torch.from_numpy(case.start.copy())
    product = (weight * saved).sum()
    correct(saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_mode(correct: Callable[..., sh.Report], case: Case, expected: np.ndarray) -> None:
    with torch.inference_mode():
        latents = torch.from_numpy(case.start).clone()
        correct(latents)
    assert latents.is_inference()
    np.testing.assert_array_equal(latents.numpy(), expected)
    latents = torch.from_numpy(case.start.copy())
    with torch.no_grad():
        correct(latents)
    np.testing.assert_array_equal(latents.numpy(), expected)


@pytest.mark.parametrize(
    ("latents", "error", "words"),
    [
        (torch.zeros(2, 4, 16, 16, dtype=torch.float64), TypeError, "64 bits"),
        (torch.zeros(2, 4, 16, 16).to_sparse(), ValueError, "torch.strided"),
        (torch.zeros(2, 4, 16, 16, device="meta"), ValueError, "latents cannot be shared"),
        (torch.zeros(1).expand(2, 4, 16, 16), ValueError, "overlap"),
        (torch.zeros(2, 4, 16, 16, dtype=torch.complex64).conj(), ValueError, "conjugate"),
    ],
)
def test_refusals(correct: Callable[..., sh.Report], latents: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        correct(latents)


def test_lent_tensors() -> None:
    values = torch.arange(24.0).reshape(2, 3, 4)
    for source in [
        values,
        values.to(torch.bfloat16),
        values.permute(2, 0, 1),
        values.flip(0),
        values[0, 0, 0],
        values[:0],
    ]:
        borrowed = borrow(source, "x")
        lent = Tensor(borrowed.view, lambda: True)
        taken = torch.from_dlpack(lent)
        assert torch.equal(taken, source)
        assert taken.dtype == source.dtype
        assert taken.numel() == 0 or taken.data_ptr() != source.data_ptr()
    assert torch.utils.dlpack.from_dlpack(lent.__dlpack__()).shape == source.shape


def test_lent_tensors_are_let_go_on_any_thread() -> None:
    borrowed = borrow(torch.ones(1 << 10), "x")
    taken = [torch.from_dlpack(Tensor(borrowed.view, lambda: True)) for _ in range(100)]
    threads = [threading.Thread(target=taken[first::4].clear) for first in range(4)]
    for thread in threads:
        thread.start()
    taken.clear()
    for thread in threads:
        thread.join()


def test_results_of_callbacks() -> None:
    target = np.zeros((2, 3), np.float32)
    borrowed = borrow(target, "target")
    for source in [
        torch.ones(2, 3, dtype=torch.float16),
        torch.full((3, 2), 2.0).T,
        torch.full((2, 3), 3.0, requires_grad=True),
        torch.full((2, 3), 4.0, dtype=torch.bfloat16),
    ]:
        assign(borrowed.view, source, "result")
        np.testing.assert_array_equal(target, source.detach().float().numpy())


def test_a_run_moves_between_threads(prepared: Make, case: Case, expected: np.ndarray) -> None:
    plugin = prepared()
    results = []
    with plugin.run(batch=2, steps=case.steps, text=case.text()) as run:

        def step() -> None:
            latents = torch.from_numpy(case.start.copy())
            run.step(case.step(), latents)
            results.append(latents)

        for _ in range(2):
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()
    for latents in results:
        np.testing.assert_array_equal(latents.numpy(), expected)
