"""Tensors of any layout and origin, both ways."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from conftest import Case, relative_error

import sampler_hook as sh
from sampler_hook.tensor import Tensor, assign, borrow

Make = Callable[..., sh.Plugin]


@pytest.fixture
def correct(prepared: Make, case: Case) -> Callable[..., sh.Report]:
    """One step of a run of its own."""
    plugin = prepared()

    def step(latents: object, out: object = None) -> sh.Report:
        with plugin.run(batch=2, steps=case.steps, text=case.text()) as run:
            return run.step(case.step(), latents, out)

    return step


def strided(values: np.ndarray) -> list[np.ndarray]:
    """The same numbers in other layouts: channels last, with gaps and an offset, reversed, in Fortran's order."""
    channels_last = np.ascontiguousarray(values.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    large = np.full((3, 5, 20, 40), np.nan, values.dtype)
    gaps = large[1:, 1:, 2:18, 3:35:2]
    gaps[...] = values
    reverse = values[::-1, :, ::-1].copy()[::-1, :, ::-1]
    return [channels_last, gaps, reverse, np.asfortranarray(values)]


def test_any_layout_is_read_and_written_where_it_is(correct: Callable[..., sh.Report], case: Case) -> None:
    expected = case.start.copy()
    correct(expected)
    for latents in strided(case.start):
        assert not latents.flags.c_contiguous
        whole = latents.base if latents.base is not None else latents
        untouched = np.isnan(whole).sum()
        correct(latents)
        np.testing.assert_array_equal(latents, expected)
        assert np.isnan(whole).sum() == untouched, "something beside the view was written"
    for out in strided(np.zeros_like(case.start)):
        source = case.start.copy()
        correct(source, out)
        np.testing.assert_array_equal(out, expected)


def test_half_precision(correct: Callable[..., sh.Report], case: Case) -> None:
    half = case.start.astype(np.float16)
    expected = half.astype(np.float32)
    correct(expected)
    correct(half)
    np.testing.assert_array_equal(half, expected.astype(np.float16))


def test_read_only_arrays_are_read_and_not_written(correct: Callable[..., sh.Report], case: Case) -> None:
    latents, out = case.start.copy(), np.zeros_like(case.start)
    latents.flags.writeable = False
    correct(latents, out)
    assert not np.array_equal(out, case.start)
    with pytest.raises(ValueError, match=r"read-?only|readonly"):
        correct(latents)
    np.testing.assert_array_equal(latents, case.start)


@pytest.mark.parametrize(
    ("latents", "error", "words"),
    [
        (np.zeros((2, 4, 16, 16)), TypeError, "64 bits"),
        (np.zeros((2, 4, 16, 16), np.int32), ValueError, "code 0, 32 bits"),
        (np.zeros((2, 4, 16, 16), ">f4"), ValueError, "byte order"),
        (np.zeros((1, 4, 16, 16), np.float32), ValueError, r"\[1, 4, 16, 16\], expected \[2, 4, h, w\]"),
        (np.zeros((2, 3, 16, 16), np.float32), ValueError, r"\[2, 3, 16, 16\]"),
        (np.zeros((4, 16, 16), np.float32), ValueError, r"\[4, 16, 16\]"),
        ([[1.0]], ValueError, "latents: expected a tensor that speaks DLPack, found list"),
        (None, ValueError, "found NoneType"),
        (np.zeros((2, 4, 16, 16), np.float32)[:, ::-1].view(), None, ""),
        (np.broadcast_to(np.float32(1), (2, 4, 16, 16)), ValueError, "read-?only"),
    ],
)
def test_what_does_not_fit_is_refused(
    correct: Callable[..., sh.Report], latents: object, error: type[Exception] | None, words: str
) -> None:
    if error is None:
        correct(latents)
        return
    with pytest.raises(error, match=words) as raised:
        correct(latents)
    assert isinstance(raised.value, sh.SamplerHookError)


def test_out_has_to_agree(correct: Callable[..., sh.Report], case: Case) -> None:
    latents = case.start.copy()
    for out, error in [
        (np.zeros((2, 4, 16, 8), np.float32), sh.ShapeMismatchError),
        (np.zeros((2, 4, 16, 16), np.float16), sh.DtypeMismatchError),
        (latents[:, :, ::-1], sh.InvalidArgumentError),
    ]:
        with pytest.raises(error, match="out"):
            correct(latents, out)
    np.testing.assert_array_equal(latents, case.start)


class Legacy:
    """A producer from before DLPack 1, as NumPy 1 is."""

    def __init__(self, array: np.ndarray, refuses: bool = False) -> None:
        self.array, self.refuses = array, refuses
        self.__array_interface__ = array.__array_interface__

    def __dlpack__(self, *, stream: object = None) -> object:
        if self.refuses:
            raise BufferError("Cannot export readonly array")
        return self.array.__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class Pinned(Legacy):
    """Main memory that CUDA has pinned, as PyTorch names it."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 3, 0


def test_pinned_memory_is_main_memory(correct: Callable[..., sh.Report], case: Case) -> None:
    expected, latents = case.start.copy(), case.start.copy()
    correct(expected)
    correct(Pinned(latents))
    np.testing.assert_array_equal(latents, expected)


def test_producers_of_before_dlpack_1(correct: Callable[..., sh.Report], case: Case) -> None:
    expected, latents = case.start.copy(), case.start.copy()
    correct(expected)
    correct(Legacy(latents))
    np.testing.assert_array_equal(latents, expected)
    for source in [*strided(case.start), case.start]:
        out = np.zeros_like(case.start)
        correct(Legacy(source, refuses=True), out)
        np.testing.assert_array_equal(out, expected)
    with pytest.raises(ValueError, match="readonly"):
        correct(Legacy(latents, refuses=True))


def lend(values: np.ndarray, is_lent: Callable[[], bool] = lambda: True) -> Tensor:
    """The array as a plugin would lend it."""
    borrowed = borrow(values, "x")
    lent = Tensor(borrowed.view, is_lent)
    lent.keeps = borrowed  # type: ignore[attr-defined]
    return lent


def test_lent_tensors_are_copies_of_any_layout() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for source in [values, values.transpose(2, 0, 1), values[:, ::-1, ::2], values[0, 0, 0], values[:0]]:
        for dtype in (np.float32, np.float16):
            typed = np.asarray(source, dtype)
            lent = lend(typed)
            taken = np.from_dlpack(lent)
            np.testing.assert_array_equal(taken, typed)
            assert taken.dtype == dtype
            assert lent.shape == typed.shape
            assert not np.shares_memory(taken, typed)


def test_lent_tensors_end_with_their_call() -> None:
    alive = True
    values = np.arange(6, dtype=np.float32)
    lent = lend(values, lambda: alive)
    taken = np.from_dlpack(lent)
    alive = False
    with pytest.raises(ValueError, match="a call that has ended"):
        np.from_dlpack(lent)
    assert "no longer lent" in repr(lent)
    np.testing.assert_array_equal(taken, values)
    with pytest.raises(BufferError, match="another device"):
        lend(values).__dlpack__(dl_device=(2, 0))
    with pytest.raises(BufferError, match="copied"):
        lend(values).__dlpack__(copy=False)


def test_capsules_free_what_they_hold() -> None:
    """Taken or not. Raw memory is traced by tracemalloc."""
    values = np.zeros(1 << 16, np.float32)
    lent = lend(values)
    tracemalloc.start()
    try:
        np.from_dlpack(lent)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for version in (None, (1, 0)):
            for _ in range(50):
                lent.__dlpack__(max_version=version)
                np.from_dlpack(lent)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < values.nbytes
    finally:
        tracemalloc.stop()


def test_results_of_callbacks_are_written_as_f32() -> None:
    target = np.zeros((2, 3), np.float32)
    borrowed = borrow(target, "target")
    for source in [np.ones((2, 3), np.float16), np.full((3, 2), 2, np.float32).T, np.full((2, 3), 3, np.float64)]:
        assign(borrowed.view, source, "result")
        np.testing.assert_array_equal(target, source)
    with pytest.raises(sh.ShapeMismatchError, match=r"result has shape \[3, 2\], expected \[2, 3\]"):
        assign(borrowed.view, np.ones((3, 2), np.float32), "result")


def test_relative_error_sees_a_difference() -> None:
    assert relative_error(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0
    assert relative_error(np.array([3.0, 4.0]), np.array([0.0, 4.0])) == 0.75
