"""The ctypes mirror against the header, by a C compiler and by name."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from sampler_hook import _abi

HEADER = ROOT / "host-api" / "include" / "sampler_hook.h"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def structs() -> dict[str, type[ctypes.Structure]]:
    found = {name: value for name, value in vars(_abi).items() if re.match("sh_|DL", name) and isinstance(value, type)}
    return {name: value for name, value in found.items() if issubclass(value, ctypes.Structure)}


def constants() -> dict[str, int | str]:
    return {name: value for name, value in vars(_abi).items() if name.startswith("SH_")}


def program() -> str:
    """Does not compile, or returns nonzero, unless the header agrees with the mirror."""
    lines = ["#include <string.h>", '#include "sampler_hook.h"']
    for name, struct in structs().items():
        lines.append(f'_Static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "size of {name}");')
        lines.append(f'_Static_assert(_Alignof({name}) == {ctypes.alignment(struct)}, "alignment of {name}");')
        for field, *_ in struct._fields_:
            place = getattr(struct, field)
            lines.append(f'_Static_assert(offsetof({name}, {field}) == {place.offset}, "offset of {name}.{field}");')
            size = f"sizeof((({name} *)0)->{field})"
            lines.append(f'_Static_assert({size} == {place.size}, "size of {name}.{field}");')
    strings = []
    for name, value in constants().items():
        if isinstance(value, str):
            strings.append(f'  wrong += strcmp({name}, "{value}") != 0;')
        else:
            lines.append(f'_Static_assert({name} == {value}, "value of {name}");')
    return "\n".join([*lines, "int main(void) {", "  int wrong = 0;", *strings, "  return wrong;", "}"])


def check(source: str, folder: Path) -> str:
    """What the compiler, or the program, says is wrong."""
    (folder / "layout.c").write_text(source)
    command = [COMPILER, "-std=c11", f"-I{HEADER.parent}", "layout.c", "-o", "layout"]
    compiled = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if compiled.returncode:
        return compiled.stderr
    return "" if subprocess.run([folder / "layout"]).returncode == 0 else "a string differs"


needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@needs_compiler
def test_the_mirror_has_the_layout_of_the_header(tmp_path: Path) -> None:
    assert check(program(), tmp_path) == ""


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("offsetof(sh_step, timestep) == 16", "offsetof(sh_step, timestep) == 20", "offset of sh_step.timestep"),
        ("SH_POISONED == 16", "SH_POISONED == 17", "value of SH_POISONED"),
        ("sampler-hook.lora/1", "sampler-hook.lora/2", "a string differs"),
    ],
)
def test_a_difference_is_noticed(right: str, wrong: str, words: str, tmp_path: Path) -> None:
    assert program().count(right) == 1
    assert words in check(program().replace(right, wrong), tmp_path)


def header() -> str:
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)


def members(body: str) -> list[str]:
    """Names of a struct's members in order."""
    found = []
    for declaration in filter(str.strip, body.split(";")):
        function = re.search(r"\(\*(\w+)\)", declaration)
        found.append(function[1] if function else re.findall(r"\w+", declaration.split("[")[0])[-1])
    return found


def test_the_mirror_misses_nothing() -> None:
    defined = re.findall(r"^#define (SH_\w+)", header(), flags=re.MULTILINE)
    assert set(defined) == set(constants())
    bodies = dict(re.findall(r"struct (\w+) \{(.*?)\}", header(), flags=re.DOTALL))
    assert set(bodies) == set(structs())
    for name, body in bodies.items():
        assert members(body) == [field for field, *_ in structs()[name]._fields_], name


def test_functions_take_as_many_arguments_as_in_the_header() -> None:
    for name, body in re.findall(r"struct (\w+) \{(.*?)\}", header(), flags=re.DOTALL):
        mirror = {field: kind for field, kind, *_ in structs()[name]._fields_}
        for function, arguments in re.findall(r"\(\*(\w+)\)\((.*?)\);", body, flags=re.DOTALL):
            assert len(mirror[function]._argtypes_) == len(arguments.split(",")), f"{name}.{function}"
