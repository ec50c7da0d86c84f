"""Tensors across the interface: those of Python, borrowed for a call, and those of the plugin, lent to Python."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import nullcontext
from ctypes import POINTER, c_int64, sizeof
from typing import Any, Protocol, runtime_checkable

from . import _abi, _dlpack
from ._abi import DLTensor, sh_view
from .errors import DtypeMismatchError, InvalidArgumentError, ShapeMismatchError, UnsupportedError

_DTYPES = {(2, 32): "f32", (2, 16): "f16", (4, 16): "bf16"}
_PINNED = 3
"""`kDLCUDAHost`: main memory that CUDA has pinned."""
_LEGACY_STREAM = 1
"""DLPack's number for CUDA's legacy default stream, whose pointer is NULL."""


@runtime_checkable
class SupportsDLPack(Protocol):
    """What tensors are to this package: PyTorch's, NumPy's and any other that speak DLPack."""

    def __dlpack__(self, *, stream: Any = ...) -> object: ...

    def __dlpack_device__(self) -> tuple[Any, int]: ...


class Tensor:
    """A tensor that the other side lends: `torch.from_dlpack` and `numpy.from_dlpack` take it.

    On the CPU they get a copy, so that nothing they make can outlive the memory. On CUDA they get the memory itself,
    which is to be read before the callback returns. The tensor itself is of no use afterwards: it raises
    `InvalidArgumentError`.
    """

    def __init__(self, view: sh_view, is_lent: Callable[[], bool]) -> None:
        raw = DLTensor()
        ctypes.pointer(raw)[0] = view.tensor  # what the view points to is the other side's, and so is the view
        self._is_lent = is_lent
        self._stream: int | None = view.stream
        self.shape: tuple[int, ...] = tuple(raw.shape[axis] for axis in range(raw.ndim))
        """Extents."""
        self.strides: tuple[int, ...] = _strides(raw, self.shape)
        """Strides in elements."""
        code, bits = raw.dtype.code, raw.dtype.bits
        self.dtype: str = _DTYPES.get((code, bits), f"code {code}, {bits} bits")
        """`"f32"`, `"f16"` or `"bf16"`."""
        self._raw = raw
        self._itemsize = bits // 8

    @property
    def device(self) -> str:
        """`"cpu"` or `"cuda:N"`."""
        device = self._raw.device
        return "cpu" if device.device_type == _abi.SH_DEVICE_CPU else f"cuda:{device.device_id}"

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}, {list(self.shape)}, {self.device}{'' if self._is_lent() else ', no longer lent'})"

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack's device type and number."""
        return self._raw.device.device_type, self._raw.device.device_id

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[Any, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A DLPack capsule: of a copy on the CPU, of the memory itself on CUDA, ready on `stream`."""
        if not self._is_lent():
            raise InvalidArgumentError("this tensor was lent for a call that has ended: take it within the call")
        on_cpu = self._raw.device.device_type == _abi.SH_DEVICE_CPU
        if dl_device is not None and (int(dl_device[0]), dl_device[1]) != self.__dlpack_device__():
            raise BufferError(f"the tensor is on {self.device}, and this package moves nothing to another device")
        if copy is not None and copy != on_cpu:
            raise BufferError("lent tensors are copied on the CPU, and only there")
        versioned = max_version is not None and max_version[0] >= 1
        tensor = self._described()
        if on_cpu:
            first, size = self._reach()
            return _dlpack.export(tensor, versioned, copy_from=first, size=size, flags=_dlpack.COPIED)
        _order_stream(self._stream, stream, self._raw.device.device_id)
        return _dlpack.export(tensor, versioned)

    def _described(self) -> DLTensor:
        """The same tensor with strides and no offset. Its arrays live as long as it."""
        described = DLTensor()
        ctypes.pointer(described)[0] = self._raw
        extents = c_int64 * len(self.shape)
        described.shape = ctypes.cast(extents(*self.shape), POINTER(c_int64))
        described.strides = ctypes.cast(extents(*self.strides), POINTER(c_int64))
        described.data = (self._raw.data or 0) + self._raw.byte_offset
        described.byte_offset = 0
        return described

    def _reach(self) -> tuple[int, int]:
        """Address and size in bytes of the memory from the lowest to the highest element."""
        start = (self._raw.data or 0) + self._raw.byte_offset
        if 0 in self.shape:
            return start, 0
        steps = [stride * (extent - 1) for stride, extent in zip(self.strides, self.shape, strict=True)]
        low, high = sum(step for step in steps if step < 0), sum(step for step in steps if step > 0)
        return start + low * self._itemsize, (high - low + 1) * self._itemsize


def _strides(raw: DLTensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    if raw.strides:
        return tuple(raw.strides[axis] for axis in range(raw.ndim))
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def _order_stream(ready: int | None, wanted: int | None, device: int) -> None:
    """Lets the stream `wanted` wait for what was put on the stream `ready`. DLPack: None is the default stream, -1 none
    at all.
    """
    wanted = _LEGACY_STREAM if wanted is None else wanted
    if wanted == -1 or wanted == (ready or _LEGACY_STREAM):
        return
    torch = sys.modules.get("torch")
    if torch is None:
        raise BufferError("the tensor is ready on another CUDA stream, and only PyTorch's streams can be ordered here")

    def stream(pointer: int) -> Any:
        default = pointer == _LEGACY_STREAM
        return torch.cuda.default_stream(device) if default else torch.cuda.ExternalStream(pointer, device=device)

    stream(wanted).wait_stream(stream(ready or _LEGACY_STREAM))


class Borrowed:
    """A view of a Python tensor and what keeps the memory behind it alive."""

    def __init__(self, view: sh_view, owner: object) -> None:
        self.view = view
        self.pointer = ctypes.pointer(view)
        self._owner = owner

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents."""
        return tuple(self.view.tensor.shape[axis] for axis in range(self.view.tensor.ndim))


def borrow(value: Any, what: str, *, write: bool = False, stream: int | None = None) -> Borrowed:
    """A view of the memory of `value`, without a copy. `what` names it in errors.

    `stream` is the CUDA stream to order on; None: PyTorch's current one for its tensors, else the legacy default
    stream. Gradients are cut off; a tensor that requires one is not written.
    """
    owner = value
    torch = _dlpack.torch_tensor(value)
    if torch is not None and value.requires_grad:
        if write:
            raise InvalidArgumentError(f"{what} would be written but requires grad: give an `out`, or {what}.detach()")
        value = value.detach()
    if not isinstance(value, SupportsDLPack):
        raise InvalidArgumentError(f"{what}: expected a tensor that speaks DLPack, found {type(value).__qualname__}")
    try:
        device_type, device_id = (int(part) for part in value.__dlpack_device__())
    except (BufferError, TypeError, RuntimeError, ValueError) as error:  # PyTorch's device "meta", for one
        raise InvalidArgumentError(f"{what} cannot be shared by DLPack: {error}") from error
    on_cpu = device_type in (_abi.SH_DEVICE_CPU, _PINNED)
    if not on_cpu and device_type != _abi.SH_DEVICE_CUDA:
        raise UnsupportedError(f"{what} is on a device of DLPack's type {device_type}, neither CPU nor CUDA")
    asked, guard = _stream(torch, device_id, stream) if not on_cpu else (None, nullcontext())
    try:
        with guard:
            # PyTorch's current stream needs no ordering; others order theirs before the one that is asked for.
            order = None if on_cpu else (-1 if torch is not None and stream is None else asked or _LEGACY_STREAM)
            capsule = _dlpack.capsule_of(value, order)
        tensor, read_only = _dlpack.tensor_of(capsule)
    except (BufferError, TypeError, RuntimeError, ValueError) as error:
        if not write and on_cpu and hasattr(value, "__array_interface__"):
            return _borrow_array(value, what)
        raise InvalidArgumentError(f"{what} cannot be shared by DLPack: {error}") from error
    view = empty_view()
    ctypes.pointer(view.tensor)[0] = tensor
    if on_cpu:
        view.tensor.device.device_type = _abi.SH_DEVICE_CPU
    view.flags = _abi.SH_VIEW_READ_ONLY if read_only else 0
    view.stream = asked
    return Borrowed(view, (owner, value, capsule))


def _stream(torch: Any, device: int, stream: int | None) -> tuple[int | None, Any]:
    """The pointer of the stream to order on, and the context in which PyTorch exports tensors of that device."""
    if torch is None:
        return stream, nullcontext()
    current = torch.cuda.current_stream(device).cuda_stream if stream is None else stream
    return current, torch.cuda.device(device)


def _borrow_array(value: Any, what: str) -> Borrowed:
    """A read-only view of a NumPy array that its DLPack does not export: NumPy 1 refuses read-only ones."""
    interface = value.__array_interface__
    types = {"f4": (2, 32), "f2": (2, 16)}
    order, kind = interface["typestr"][0], interface["typestr"][1:]
    native = "<" if sys.byteorder == "little" else ">"
    if kind not in types or order != native:
        found = interface["typestr"]
        raise DtypeMismatchError(f"{what} is of type {found}, expected f32, f16 or bf16 in native byte order")
    itemsize = types[kind][1] // 8
    strides = interface.get("strides")
    if strides is not None and any(stride % itemsize for stride in strides):
        raise InvalidArgumentError(f"{what} has strides {strides} in bytes, not multiples of {itemsize}")
    view = empty_view()
    extents = c_int64 * len(interface["shape"])
    shape = extents(*interface["shape"])
    elements = None if strides is None else extents(*(stride // itemsize for stride in strides))
    view.tensor.data = interface["data"][0]
    view.tensor.ndim = len(shape)
    view.tensor.dtype.code, view.tensor.dtype.bits = types[kind]
    view.tensor.shape = ctypes.cast(shape, POINTER(c_int64))
    view.tensor.strides = ctypes.cast(elements, POINTER(c_int64)) if elements is not None else None
    view.flags = _abi.SH_VIEW_READ_ONLY
    return Borrowed(view, (value, interface, shape, elements))


def empty_view() -> sh_view:
    """A view of nothing, f32 on the CPU."""
    view = sh_view(struct_size=sizeof(sh_view))
    view.tensor.device.device_type = _abi.SH_DEVICE_CPU
    view.tensor.dtype.code, view.tensor.dtype.bits, view.tensor.dtype.lanes = 2, 32, 1
    return view


def assign(target: sh_view, value: Any, what: str) -> None:
    """Writes a Python tensor of the same shape into the memory of `target`, f32, as the plugin asks for it."""
    lent = Tensor(target, lambda: True)
    shape = tuple(value.shape)
    if shape != lent.shape:
        raise ShapeMismatchError(f"{what} has shape {list(shape)}, expected {list(lent.shape)}")
    torch = _dlpack.torch_tensor(value)
    if lent.device != "cpu":
        if torch is None:
            raise UnsupportedError(f"{what} goes to {lent.device}: expected a tensor of PyTorch")
        torch.from_dlpack(lent).copy_(value.detach())
        return
    if lent.dtype != "f32" or lent.strides != _strides(DLTensor(), lent.shape):
        raise UnsupportedError(f"{what} goes to {lent}, strides {lent.strides}; expected contiguous f32")
    if torch is not None:
        value = value.detach().to(device="cpu", dtype=torch.float32).contiguous()
    elif hasattr(value, "astype"):
        value = value.astype("float32", order="C")
    source = borrow(value, what)
    given = Tensor(source.view, lambda: True)
    if (given.device, given.dtype, given.strides) != ("cpu", "f32", lent.strides):
        raise DtypeMismatchError(f"{what}: {given}, strides {given.strides}; expected contiguous f32 on the CPU")
    first, size = given._reach()
    ctypes.memmove(lent._reach()[0], first, size)


def increment_version(value: Any) -> None:
    """Tells PyTorch that a tensor was written, so that a backward pass which needs its old values fails rather than
    uses new ones.
    """
    torch = _dlpack.torch_tensor(value)
    if torch is not None and not value.is_inference():
        torch.autograd.graph.increment_version(value)
