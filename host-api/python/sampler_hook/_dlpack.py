"""DLPack capsules: reading what others export, and exporting memory of our own."""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

from ._abi import DLTensor

READ_ONLY = 1
"""`DLPACK_FLAG_BITMASK_READ_ONLY`."""
COPIED = 2
"""`DLPACK_FLAG_BITMASK_IS_COPIED`."""
_MAX_VERSION = (1, 0)


class DLManagedTensor(Structure):
    """Up to DLPack 0.8."""

    _fields_ = [("dl_tensor", DLTensor), ("manager_ctx", c_void_p), ("deleter", c_void_p)]


class DLManagedTensorVersioned(Structure):
    """From DLPack 1.0 on."""

    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("manager_ctx", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("dl_tensor", DLTensor),
    ]


# Prototypes of our own: attributes of `ctypes.pythonapi` are shared by everyone in the process.
_is_valid = ctypes.PYFUNCTYPE(c_int, c_void_p, c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_get_pointer = ctypes.PYFUNCTYPE(c_void_p, ctypes.py_object, c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_get_pointer_raw = ctypes.PYFUNCTYPE(c_void_p, c_void_p, c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, c_void_p, c_char_p, c_void_p)(("PyCapsule_New", ctypes.pythonapi))
_malloc = ctypes.PYFUNCTYPE(c_void_p, c_size_t)(("PyMem_RawMalloc", ctypes.pythonapi))
_free = ctypes.PYFUNCTYPE(None, c_void_p)(("PyMem_RawFree", ctypes.pythonapi))
_free_address = ctypes.cast(ctypes.pythonapi.PyMem_RawFree, c_void_p).value

# Capsules point to their names for as long as they live.
_LEGACY = c_char_p(b"dltensor")
_VERSIONED = c_char_p(b"dltensor_versioned")


def capsule_of(tensor: Any, stream: int | None) -> object:
    """A capsule of `tensor`, of DLPack 1 where it can. `stream`: the consumer's, None on the CPU."""
    arguments = {} if stream is None else {"stream": stream}
    try:
        return tensor.__dlpack__(max_version=_MAX_VERSION, **arguments)
    except TypeError:  # from before DLPack 1, as numpy 1 is
        return tensor.__dlpack__(**arguments)


def tensor_of(capsule: object) -> tuple[DLTensor, bool]:
    """What a capsule holds, valid while the capsule lives, and whether it is read-only."""
    address = id(capsule)
    if _is_valid(address, _VERSIONED):
        versioned = ctypes.cast(_get_pointer(capsule, _VERSIONED), POINTER(DLManagedTensorVersioned)).contents
        if versioned.major > _MAX_VERSION[0]:
            raise BufferError(f"a capsule of DLPack {versioned.major}.{versioned.minor}, asked for {_MAX_VERSION}")
        return versioned.dl_tensor, bool(versioned.flags & READ_ONLY)
    if _is_valid(address, _LEGACY):
        return ctypes.cast(_get_pointer(capsule, _LEGACY), POINTER(DLManagedTensor)).contents.dl_tensor, False
    raise BufferError("__dlpack__ gave no DLPack capsule, or one that was used before")


def _drop_capsule(capsule: int) -> None:
    """Frees what a capsule holds when nobody took it. (The capsule is dying: no reference to it may be made.)"""
    for name in (_VERSIONED, _LEGACY):
        if _is_valid(capsule, name):
            _free(_get_pointer_raw(capsule, name))


_destructor = ctypes.PYFUNCTYPE(None, c_void_p)(_drop_capsule)
_destructor_address = ctypes.cast(_destructor, c_void_p).value


def export(tensor: DLTensor, versioned: bool, *, copy_from: int | None = None, size: int = 0, flags: int = 0) -> object:
    """A capsule of `tensor`. With `copy_from`, `size` bytes from that address on are copied, and the tensor's address
    moves along with them; without, the capsule only points to the memory.

    Everything lies in one block that `PyMem_RawFree` frees: whoever takes the capsule may let go of it on any thread,
    without the interpreter's lock, and after the interpreter is gone.
    """
    managed_type = DLManagedTensorVersioned if versioned else DLManagedTensor
    header = ctypes.sizeof(managed_type)
    extents = tensor.ndim * ctypes.sizeof(c_int64)
    alignment = 64
    block = _malloc(header + 2 * extents + (size + alignment if copy_from is not None else 0))
    if not block:
        raise MemoryError(f"no memory for a tensor of {size} bytes")
    ctypes.memset(block, 0, header)
    managed = managed_type.from_address(block)
    shape, strides = block + header, block + header + extents
    ctypes.memmove(shape, tensor.shape, extents)
    ctypes.memmove(strides, tensor.strides, extents)
    ctypes.memmove(byref(managed.dl_tensor), byref(tensor), ctypes.sizeof(DLTensor))
    managed.dl_tensor.shape = ctypes.cast(shape, POINTER(c_int64))
    managed.dl_tensor.strides = ctypes.cast(strides, POINTER(c_int64))
    managed.deleter = _free_address
    if copy_from is not None:
        start = -(-(strides + extents) // alignment) * alignment
        ctypes.memmove(start, copy_from, size)
        managed.dl_tensor.data = start + ((tensor.data or 0) - copy_from)
    if versioned:
        managed.major, managed.minor = _MAX_VERSION
        managed.flags = flags
    return _new_capsule(block, _VERSIONED if versioned else _LEGACY, _destructor_address)


def torch_tensor(value: object) -> Any:
    """The module `torch`, when `value` is a tensor of it; else None. Never imports it."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(value, torch.Tensor) else None
