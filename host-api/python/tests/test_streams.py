"""CUDA tensors without a GPU: main memory that says it is a device's, to see what becomes of devices and streams."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Case

import sampler_hook as sh
from sampler_hook import _dlpack
from sampler_hook.tensor import Tensor, borrow

Make = Callable[..., sh.Plugin]
CUDA = 2


class OnDevice:
    """A producer that is not PyTorch, as CuPy is."""

    def __init__(self, array: np.ndarray, device: int = 1) -> None:
        self.array, self.device = array, device
        self.streams: list[Any] = []

    def __dlpack__(self, *, stream: Any = None, max_version: tuple[int, int] | None = None) -> object:
        self.streams.append(stream)
        capsule = self.array.__dlpack__(max_version=max_version)
        tensor, _ = _dlpack.tensor_of(capsule)
        tensor.device.device_type, tensor.device.device_id = CUDA, self.device
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.device


def test_the_stream_is_the_one_that_is_asked_for() -> None:
    values = OnDevice(np.zeros((2, 3), np.float32))
    view = borrow(values, "x").view
    # DLPack's 1 is the legacy default stream, whose pointer is NULL.
    assert (values.streams, view.stream) == ([1], None)
    assert (view.tensor.device.device_type, view.tensor.device.device_id) == (CUDA, 1)
    assert borrow(values, "x", stream=0x7000).view.stream == 0x7000
    assert values.streams[-1] == 0x7000
    assert borrow(values, "x", stream=0).view.stream in (0, None)
    assert values.streams[-1] == 1


def test_a_library_without_cuda_refuses_by_name(prepared: Make, case: Case) -> None:
    plugin = prepared()
    with plugin.run(batch=2, steps=case.steps, text=case.text()) as run:
        latents = OnDevice(case.start.copy())
        with pytest.raises(NotImplementedError, match="CUDA"):
            run.step(case.step(), latents)
        np.testing.assert_array_equal(latents.array, case.start)


def test_lent_cuda_tensors_are_the_memory_itself() -> None:
    values = np.arange(6, dtype=np.float32)
    borrowed = borrow(OnDevice(values), "x", stream=0x7000)
    lent = Tensor(borrowed.view, lambda: True)
    assert (lent.device, lent.__dlpack_device__()) == ("cuda:1", (CUDA, 1))
    for stream in (0x7000, -1):
        tensor, read_only = _dlpack.tensor_of(lent.__dlpack__(stream=stream, max_version=(1, 0)))
        assert tensor.data == values.ctypes.data
        assert not read_only
    with pytest.raises(BufferError, match="copied on the CPU, and only there"):
        lent.__dlpack__(copy=True)


def test_streams_are_ordered_by_pytorch_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    borrowed = borrow(OnDevice(np.zeros(2, np.float32)), "x", stream=0x7000)
    lent = Tensor(borrowed.view, lambda: True)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BufferError, match="another CUDA stream"):
        lent.__dlpack__(stream=0x8000)
    waits: list[tuple[Any, Any]] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            waits.append((self.name, other.name))

    class Cuda:
        @staticmethod
        def default_stream(device: int) -> Stream:
            return Stream(("default", device))

        ExternalStream = staticmethod(lambda pointer, device: Stream((pointer, device)))

    fake = type("torch", (), {"cuda": Cuda})
    monkeypatch.setitem(sys.modules, "torch", fake)
    lent.__dlpack__(stream=0x8000)
    lent.__dlpack__()
    assert waits == [((0x8000, 1), (0x7000, 1)), (("default", 1), (0x7000, 1))]
