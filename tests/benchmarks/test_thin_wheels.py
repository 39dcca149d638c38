"""Wheels and libraries that are made thin, on small ones that the tests write."""

from __future__ import annotations

import base64
import hashlib
import struct
from importlib.metadata import Distribution
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from zipfile import ZipFile

import pytest

PTX, CUBIN = 1, 2


class Code(NamedTuple):
    """An entry of a fatbin."""

    kind: int
    architecture: int
    content: bytes


def fatbin(*entries: Code) -> bytes:
    body = b"".join(
        struct.pack("<HHIQ12xI32x", each.kind, 257, 64, len(each.content), each.architecture) + each.content
        for each in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(*fatbins: bytes, text: bytes = b"code of the host") -> bytes:
    """A 64-bit ELF file with sections for the host's code, for fatbins and for names."""
    padded = b"".join(each + bytes(-len(each) % 8) for each in fatbins)
    contents = {".text": text + bytes(-len(text) % 8), ".nv_fatbin": padded}
    names = b"\0" + b"".join(name.encode() + b"\0" for name in (*contents, ".shstrtab"))
    contents[".shstrtab"] = names + bytes(-len(names) % 8)
    headers, body = [bytes(64)], b""
    for name, content in contents.items():
        at = (names.index(name.encode() + b"\0"), 1, 0, 0, 64 + len(body), len(content))
        headers.append(struct.pack("<IIQQQQ24x", *at))
        body += content
    table = struct.pack("<QI6H", 64 + len(body), 0, 64, 0, 0, 64, len(headers), len(headers) - 1)
    return b"\x7fELF\x02\x01" + bytes(34) + table + body + b"".join(headers)


def test_only_the_code_of_the_architecture_stays_and_nothing_moves(thin_wheels: ModuleType) -> None:
    wanted, accelerated = Code(CUBIN, 90, b"wanted" * 20), Code(CUBIN, 90, b"accelerated" * 3)
    other = Code(CUBIN, 100, b"other" * 99)
    whole = library(fatbin(other, wanted, Code(PTX, 90, b"text" * 50)), fatbin(accelerated, other))
    thin = thin_wheels.thin_library(whole, 90)
    assert thin_wheels.architectures(whole) == {90, 100}
    assert thin_wheels.architectures(thin) == {90}
    assert len(thin) == len(whole)
    assert b"wanted" * 20 in thin
    assert b"accelerated" * 3 in thin
    assert b"other" not in thin
    assert b"text" * 2 not in thin
    at = whole.index(b"code of the host")
    assert thin[:at] == whole[:at]
    assert thin.endswith(whole[whole.index(b"\0.text") :])
    assert thin_wheels.thin_library(thin, 90) == thin


@pytest.mark.parametrize("ptx", [True, False])
def test_ptx_stays_where_nothing_is_compiled_unless_it_is_not_wanted(thin_wheels: ModuleType, ptx: bool) -> None:
    compiled = fatbin(Code(CUBIN, 90, b"compiled" * 9))
    sources = fatbin(Code(PTX, 75, b"older" * 9), Code(PTX, 80, b"source" * 9), Code(PTX, 100, b"newer" * 9))
    filler = fatbin(Code(CUBIN, 75, b"small"), Code(CUBIN, 90, b"more" * 9))
    thin = thin_wheels.thin_library(library(compiled, sources, filler), 90, ptx)
    assert (b"source" in thin) == ptx
    assert b"older" not in thin
    assert b"newer" not in thin


def test_a_fatbin_without_code_gets_the_smallest_of_another_architecture(thin_wheels: ModuleType) -> None:
    theirs = fatbin(Code(CUBIN, 100, b"large" * 99), Code(CUBIN, 120, b"larger" * 99))
    ours = fatbin(Code(CUBIN, 90, b"ours"), Code(CUBIN, 80, b"small" * 2))
    thin = thin_wheels.thin_library(library(theirs, ours), 90)
    assert thin_wheels.architectures(thin) == {80, 90}
    assert thin.count(b"small" * 2) == 1
    assert b"large" not in thin


def test_a_library_without_device_code_stays_as_it_is(thin_wheels: ModuleType) -> None:
    assert thin_wheels.thin_library(library(), 90) == library()


def test_what_is_not_understood_is_an_error(thin_wheels: ModuleType) -> None:
    whole = library(fatbin(Code(CUBIN, 80, b"code"), Code(CUBIN, 100, b"code")))
    with pytest.raises(thin_wheels.ThinError, match=r"expected code for sm_90, got that for \[80, 100\]"):
        thin_wheels.thin_library(whole, 90)
    for wrong in (b"\x7fELF\x01\x01" + whole[6:], b"#!/bin/sh\n"):
        with pytest.raises(thin_wheels.ThinError, match="expected a 64-bit little-endian ELF library"):
            thin_wheels.thin_library(wrong, 90)
    with pytest.raises(thin_wheels.ThinError, match="expected a fatbin or zeros at byte"):
        thin_wheels.thin_library(library(b"no fatbin at all"), 90)
    long = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 64) + fatbin(Code(CUBIN, 90, b"code" * 9))[16:]
    with pytest.raises(thin_wheels.ThinError, match="expected entries of 64 bytes, got 100"):
        thin_wheels.thin_library(library(long), 90)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    file = tmp_path / "some_kernels-1.2-cp312-cp312-manylinux_2_28_x86_64.whl"
    with ZipFile(file, "w") as members:
        members.writestr("some/__init__.py", "VERSION = '1.2'\n")
        members.writestr("some/large.h", "// nobody asks for it\n" * 999)
        members.writestr("some/kept.h", "// somebody does\n")
        code = library(fatbin(Code(CUBIN, 90, b"mine" * 9), Code(CUBIN, 100, b"other" * 9)))
        members.writestr("some/_C.so", code)
        members.writestr(
            "some_kernels-1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-kernels\nVersion: 1.2\n"
        )
        members.writestr("some_kernels-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: false\n")
        members.writestr("some_kernels-1.2.dist-info/entry_points.txt", "[some]\n")
        members.writestr("some_kernels-1.2.dist-info/RECORD", "stale,,\n")
    return file


def installed(wheel: Path, folder: Path) -> Distribution:
    """The wheel's members in a folder, each as RECORD says."""
    with ZipFile(wheel) as members:
        members.extractall(folder)
        names = {each.filename for each in members.infolist()}
    (info,) = folder.glob("*.dist-info")
    distribution = Distribution.at(info)
    assert distribution.files is not None
    assert {str(each) for each in distribution.files} == names
    for each in distribution.files:
        if each.name != "RECORD":
            content = (folder / each).read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert each.size == len(content)
            assert each.hash is not None
            assert (each.hash.mode, each.hash.value) == ("sha256", digest)
    return distribution


def test_a_thin_wheel_has_what_the_rule_leaves_and_a_record_of_it(
    thin_wheels: ModuleType, wheel: Path, tmp_path: Path
) -> None:
    out, rule = tmp_path / "out", thin_wheels.Rule(drop=("*.h",), keep=("some/kept.h",))
    out.mkdir()
    thin = thin_wheels.thin_wheel(wheel, out, rule, 90)
    assert thin.name == "some_kernels-1.2-1thin-cp312-cp312-manylinux_2_28_x86_64.whl"
    distribution = installed(thin, tmp_path / "site")
    assert distribution.metadata["Name"] == "some-kernels"
    names = {str(each) for each in distribution.files or ()}
    assert "some/large.h" not in names
    assert {"some/__init__.py", "some/kept.h", "some/_C.so", "some_kernels-1.2.dist-info/entry_points.txt"} < names
    assert b"other" not in (tmp_path / "site" / "some" / "_C.so").read_bytes()
    assert "Build: 1thin" in (tmp_path / "site" / "some_kernels-1.2.dist-info" / "WHEEL").read_text()
    first = thin.read_bytes()
    assert thin_wheels.thin_wheel(wheel, out, rule, 90).read_bytes() == first


def test_a_part_of_a_wheel_is_a_distribution_of_its_own(thin_wheels: ModuleType, wheel: Path, tmp_path: Path) -> None:
    rule = thin_wheels.Rule(drop=("*",), keep=("*.so",), distribution="libraries-of-some-kernels")
    thin = thin_wheels.thin_wheel(wheel, tmp_path, rule, 90)
    assert thin.name == "libraries_of_some_kernels-1.2-1thin-cp312-cp312-manylinux_2_28_x86_64.whl"
    distribution = installed(thin, tmp_path / "site")
    assert (distribution.metadata["Name"], distribution.version) == ("libraries-of-some-kernels", "1.2")
    info = "libraries_of_some_kernels-1.2.dist-info"
    assert {str(each) for each in distribution.files or ()} == {
        "some/_C.so",
        f"{info}/METADATA",
        f"{info}/RECORD",
        f"{info}/WHEEL",
    }


def test_a_file_stands_in_for_a_member(thin_wheels: ModuleType, wheel: Path, tmp_path: Path) -> None:
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text("VERSION = 'stand-in'\n")
    rule = thin_wheels.Rule(stand_ins={"some/__init__.py": stand_in})
    installed(thin_wheels.thin_wheel(wheel, tmp_path, rule, 90), tmp_path / "site")
    assert (tmp_path / "site" / "some" / "__init__.py").read_text() == stand_in.read_text()
    with pytest.raises(thin_wheels.ThinError, match=r"expected members that match some/gone\.py, got none"):
        thin_wheels.thin_wheel(wheel, tmp_path, thin_wheels.Rule(stand_ins={"some/gone.py": stand_in}), 90)


@pytest.mark.parametrize("rule", [{"drop": ("*.cuh",)}, {"drop": ("*.h",), "keep": ("some/gone.h",)}])
def test_a_pattern_that_matches_nothing_is_an_error(
    thin_wheels: ModuleType, wheel: Path, tmp_path: Path, rule: dict[str, tuple[str, ...]]
) -> None:
    pattern = rule.get("keep", rule["drop"])[0].replace("*", r"\*")
    with pytest.raises(thin_wheels.ThinError, match=f"some_kernels.*: expected members that match {pattern}, got none"):
        thin_wheels.thin_wheel(wheel, tmp_path, thin_wheels.Rule(**rule), 90)
    assert list(tmp_path.glob("*thin*")) == []
