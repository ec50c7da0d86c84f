"""The C interface, as `sampler_hook.h` says it: structs under their C names, functions, constants.

`tests/test_layout.py` holds all of it against the header by a C compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any

SH_ABI_MAJOR = 0
SH_ABI_MINOR = 3
SH_ENTRY_SYMBOL = "sampler_hook_entry"

SH_OK = 0
SH_INVALID_ARGUMENT = 1
SH_INVALID_STATE = 2
SH_BUSY = 3
SH_INVALID_CONFIG = 4
SH_UNSUPPORTED = 5
SH_NOT_FOUND = 6
SH_INVALID_DATA = 7
SH_SHAPE_MISMATCH = 8
SH_DTYPE_MISMATCH = 9
SH_NON_FINITE = 10
SH_CANCELLED = 11
SH_HOST_FAILED = 12
SH_OUT_OF_MEMORY = 13
SH_INTERNAL = 14
SH_PANIC = 15
SH_POISONED = 16
SH_ERROR_MESSAGE_SIZE = 512

SH_DEVICE_CPU = 1
SH_DEVICE_CUDA = 2
SH_VIEW_READ_ONLY = 1

SH_LOG_ERROR = 1
SH_LOG_WARN = 2
SH_LOG_INFO = 3
SH_LOG_DEBUG = 4
SH_LOG_TRACE = 5

SH_PREDICTION_EPSILON = 1
SH_PREDICTION_V = 2
SH_PREDICTION_FLOW = 3
SH_SPACE_VP = 1
SH_SPACE_VE = 2
SH_STEP_EXTRA_INPUTS = 1

SH_CORRECTED = 1
SH_SKIPPED_STRENGTH = 2
SH_SKIPPED_RANGE = 3
SH_SKIPPED_INTERVAL = 4
SH_SKIPPED_SUB_EVALUATION = 5
SH_SKIPPED_EMPTY = 6

SH_NEEDS_GRADIENT = 1
SH_NEEDS_CONTEXT = 2
SH_NEEDS_POOLED = 4
SH_NEEDS_WEIGHTS = 8

SH_PLUGIN_LORA = "sampler-hook.lora/1"
SH_LORA_PEFT = 1
SH_LORA_KOHYA = 2
SH_PLUGIN_PARAMS = "sampler-hook.params/1"
SH_PARAM_FLOAT = 1
SH_PARAM_INTEGER = 2
SH_PARAM_BOOLEAN = 3
SH_PARAM_CHOICE = 4
SH_PARAM_LIVE = 1
SH_PLUGIN_SPLIT = "sampler-hook.split/1"
SH_HOST_GRADIENT = "sampler-hook.gradient/1"
SH_HOST_WEIGHTS = "sampler-hook.weights/1"
SH_HOST_PROGRESS = "sampler-hook.progress/1"


class sh_error(Structure):
    _fields_ = [("struct_size", c_uint32), ("code", c_int32), ("message", c_char * SH_ERROR_MESSAGE_SIZE)]


class sh_string(Structure):
    _fields_ = [("data", c_void_p), ("size", c_uint64)]


class DLDevice(Structure):
    _fields_ = [("device_type", c_int32), ("device_id", c_int32)]


class DLDataType(Structure):
    _fields_ = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class DLTensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device", DLDevice),
        ("ndim", c_int32),
        ("dtype", DLDataType),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class sh_view(Structure):
    _fields_ = [("struct_size", c_uint32), ("flags", c_uint32), ("tensor", DLTensor), ("stream", c_void_p)]


# Hosts, plugins and tables are passed as plain addresses: what they point to has its type below.
host_log_fn = CFUNCTYPE(None, c_void_p, c_int32, sh_string)
host_cancelled_fn = CFUNCTYPE(c_int32, c_void_p)
extension_fn = CFUNCTYPE(c_void_p, c_void_p, sh_string)


class sh_host(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("reserved", c_uint32),
        ("instance", c_void_p),
        ("name", sh_string),
        ("version", sh_string),
        ("log", host_log_fn),
        ("cancelled", host_cancelled_fn),
        ("extension", extension_fn),
    ]


class sh_model(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("prediction", c_int32),
        ("family", sh_string),
        ("unet_in_channels", c_uint32),
        ("latent_channels", c_uint32),
        ("alphas_cumprod", POINTER(c_double)),
        ("alphas_cumprod_count", c_uint64),
        ("unet_config", sh_string),
    ]


class sh_text(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("reserved", c_uint32),
        ("context", POINTER(sh_view)),
        ("pooled", POINTER(sh_view)),
        ("end_of_text", POINTER(c_int64)),
        ("prompts", POINTER(sh_string)),
    ]


class sh_run(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("batch", c_uint32),
        ("steps", c_uint32),
        ("reserved", c_uint32),
        ("guidance_scale", c_double),
        ("text", POINTER(sh_text)),
    ]


class sh_step(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("index", c_uint32),
        ("count", c_uint32),
        ("sub_evaluation", c_uint32),
        ("timestep", c_double),
        ("alpha_bar", c_double),
        ("space", c_int32),
        ("flags", c_uint32),
        ("text", POINTER(sh_text)),
    ]


class sh_item_report(Structure):
    _fields_ = [("status", c_int32), ("score", c_float), ("gradient_norm", c_float), ("correction_norm", c_float)]


class sh_report(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("item_size", c_uint32),
        ("items", POINTER(sh_item_report)),
        ("item_count", c_uint64),
        ("seconds", c_double),
        ("outcome", c_int32),
        ("reserved", c_uint32),
    ]


class sh_needs(Structure):
    _fields_ = [("struct_size", c_uint32), ("flags", c_uint32), ("tap", sh_string)]


_error = POINTER(sh_error)
_view = POINTER(sh_view)


class sh_plugin(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("reserved", c_uint32),
        ("instance", c_void_p),
        ("destroy", CFUNCTYPE(None, c_void_p)),
        ("prepare", CFUNCTYPE(c_int32, c_void_p, POINTER(sh_model), DLDevice, _error)),
        ("needs", CFUNCTYPE(c_int32, c_void_p, POINTER(sh_needs), _error)),
        ("begin", CFUNCTYPE(c_int32, c_void_p, POINTER(sh_run), _error)),
        ("step", CFUNCTYPE(c_int32, c_void_p, POINTER(sh_step), _view, _view, POINTER(sh_report), _error)),
        ("end", CFUNCTYPE(c_int32, c_void_p, _error)),
        ("memory", CFUNCTYPE(c_uint64, c_void_p)),
        ("extension", extension_fn),
    ]


class sh_descriptor(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("reserved", c_uint32),
        ("id", sh_string),
        ("name", sh_string),
        ("version", sh_string),
        ("vendor", sh_string),
        ("description", sh_string),
    ]


class sh_entry(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("abi_major", c_uint32),
        ("abi_minor", c_uint32),
        ("plugin_count", c_uint32),
        ("descriptor", CFUNCTYPE(POINTER(sh_descriptor), c_uint32)),
        ("create", CFUNCTYPE(c_int32, sh_string, POINTER(sh_host), sh_string, POINTER(c_void_p), _error)),
    ]


entry_fn = CFUNCTYPE(POINTER(sh_entry), c_uint32)


class sh_lora_entry(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("rank", c_uint32),
        ("module", sh_string),
        ("down", _view),
        ("up", _view),
        ("scale", c_double),
    ]


class sh_plugin_lora(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("reserved", c_uint32),
        ("count", CFUNCTYPE(c_uint64, c_void_p)),
        ("entry", CFUNCTYPE(c_int32, c_void_p, c_uint64, POINTER(sh_lora_entry), _error)),
        ("merge", CFUNCTYPE(c_int32, c_void_p, c_uint64, c_double, _view, _error)),
        ("write", CFUNCTYPE(c_int32, c_void_p, sh_string, c_int32, _error)),
    ]


class sh_param(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("kind", c_int32),
        ("name", sh_string),
        ("description", sh_string),
        ("unit", sh_string),
        ("minimum", c_double),
        ("maximum", c_double),
        ("default_value", c_double),
        ("flags", c_uint32),
        ("choice_count", c_uint32),
        ("choices", POINTER(sh_string)),
    ]


class sh_plugin_params(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("reserved", c_uint32),
        ("count", CFUNCTYPE(c_uint32, c_void_p)),
        ("info", CFUNCTYPE(c_int32, c_void_p, c_uint32, POINTER(sh_param), _error)),
        ("get", CFUNCTYPE(c_int32, c_void_p, c_uint32, POINTER(c_double), _error)),
        ("set", CFUNCTYPE(c_int32, c_void_p, c_uint32, c_double, _error)),
        ("schema", CFUNCTYPE(sh_string, c_void_p)),
    ]


class sh_plugin_split(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("reserved", c_uint32),
        ("score", CFUNCTYPE(c_int32, c_void_p, POINTER(sh_step), _view, _view, POINTER(sh_report), _error)),
        ("apply", CFUNCTYPE(c_int32, c_void_p, POINTER(sh_step), _view, _view, _view, POINTER(sh_report), _error)),
    ]


class sh_host_gradient(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("reserved", c_uint32),
        ("features", CFUNCTYPE(c_int32, c_void_p, POINTER(sh_step), _view, sh_string, _view, _error)),
        ("vjp", CFUNCTYPE(c_int32, c_void_p, _view, _view, _error)),
        ("release", CFUNCTYPE(None, c_void_p)),
    ]


class sh_host_weights(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("reserved", c_uint32),
        ("revision", CFUNCTYPE(c_uint64, c_void_p)),
        ("count", CFUNCTYPE(c_uint64, c_void_p)),
        ("name", CFUNCTYPE(c_int32, c_void_p, c_uint64, POINTER(sh_string), _error)),
        ("tensor", CFUNCTYPE(c_int32, c_void_p, c_uint64, _view, POINTER(c_uint64), _error)),
    ]


class sh_host_progress(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("reserved", c_uint32),
        ("progress", CFUNCTYPE(None, c_void_p, sh_string, c_uint64, c_uint64)),
    ]


def functions(table: type[Structure]) -> dict[str, Callable[..., Any]]:
    """The function types of a table, to make callbacks of."""
    return {field[0]: field[1] for field in table._fields_}
