"""Wheels rewritten to weigh less: without members that nobody asks for, and with the code of one GPU architecture.

A thin wheel is installed as any other. Libraries keep their size and every offset on disk: device code of other
architectures becomes zeros, of which a compressed wheel has nothing to carry.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple
from zipfile import ZIP_LZMA, ZipFile, ZipInfo

BUILD = "1thin"
"""The build tag of a thin wheel, which tells its file from the published one."""
EPOCH = (1980, 1, 1, 0, 0, 0)
ELF = b"\x7fELF"
FATBIN_SECTIONS = (".nv_fatbin", "__nv_relfatbin")
FATBIN_MAGIC = 0xBA55ED50
FATBIN_HEADER = struct.Struct("<IHHQ")
"""Magic, version, bytes of the header, bytes of the entries behind it."""
ENTRY_HEADER = struct.Struct("<HHIQ12xI")
"""Kind, version, bytes of the header, bytes of the code behind it, architecture."""
PTX, CUBIN = 1, 2
ALIGNMENT = 8


class ThinError(ValueError):
    """A wheel or a library is not what a rule takes it for."""


@dataclass(frozen=True)
class Rule:
    """What a thin wheel has of the published one; in patterns of :mod:`fnmatch` ``*`` takes a slash too."""

    drop: tuple[str, ...] = ()
    """Members that are left out."""
    keep: tuple[str, ...] = ()
    """Members that stay, though a pattern of ``drop`` matches them."""
    distribution: str | None = None
    """Another name for a wheel that has a part of a distribution: pip installs two of one name only in turns."""
    ptx: bool = True
    """Whether PTX stays where nothing is compiled for the architecture, for a driver to compile."""
    stand_ins: Mapping[str, Path] = field(default_factory=dict)
    """Files that take the place of members."""


class Entry(NamedTuple):
    """Code for one architecture in a fatbin."""

    kind: int
    architecture: int
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def thin_library(library: bytes, architecture: int, ptx: bool = True) -> bytes:
    """An ELF library with the device code of one architecture (90: sm_90 and sm_90a) alone, of the same length.

    A fatbin that has nothing compiled for it keeps its latest PTX, with ``ptx``. Where that is missing, too, it gets
    the smallest entry for another architecture, for none may be empty: a driver finds nothing for its GPU there. Raises
    ThinError where a fatbin is not understood, or none has code for the architecture.
    """
    thin = bytearray(library)
    fatbins = [each for span in _sections(library, FATBIN_SECTIONS) for each in _fatbins(library, *span)]
    wanted = [_code_for(architecture, entries, ptx) for _, entries in fatbins]
    if fatbins and not any(wanted):
        raise ThinError(f"expected code for sm_{architecture}, got that for {sorted(architectures(library))}")
    others = [each for _, entries in fatbins for each in entries if each.kind == CUBIN]
    others = [each for each in others if each.architecture != architecture]
    for (fatbin, entries), kept in zip(fatbins, wanted, strict=True):
        kept = kept or [min((*others, *entries), key=lambda each: each.size)]
        code = b"".join(library[each.start : each.end] for each in kept)
        magic, version, header, size = FATBIN_HEADER.unpack_from(library, fatbin)
        FATBIN_HEADER.pack_into(thin, fatbin, magic, version, header, len(code))
        first = fatbin + header
        thin[first : first + size] = code + bytes(size - len(code))
    return bytes(thin)


def _code_for(architecture: int, entries: list[Entry], ptx: bool) -> list[Entry]:
    """What a GPU of the architecture can run of a fatbin's entries: what is compiled for it, or the latest PTX."""
    if compiled := [each for each in entries if each.kind == CUBIN and each.architecture == architecture]:
        return compiled
    sources = [each for each in entries if each.kind == PTX and each.architecture <= architecture and ptx]
    return [max(sources, key=lambda each: each.architecture)] if sources else []


def architectures(library: bytes) -> set[int]:
    """Those that an ELF library has compiled device code for."""
    return {
        each.architecture
        for start, end in _sections(library, FATBIN_SECTIONS)
        for _, entries in _fatbins(library, start, end)
        for each in entries
        if each.kind == CUBIN
    }


def _sections(library: bytes, names: Collection[str]) -> Iterator[tuple[int, int]]:
    """Where the sections of these names begin and end in a 64-bit little-endian ELF file."""
    if library[:6] != ELF + b"\x02\x01":
        raise ThinError("expected a 64-bit little-endian ELF library")
    (table,) = struct.unpack_from("<Q", library, 0x28)
    size, count, index_of_names = struct.unpack_from("<HHH", library, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", library, table + size * index) for index in range(count)]
    if not headers:
        return
    strings = headers[index_of_names][4]
    for name, _, _, _, start, length in headers:
        first = strings + name
        if library[first : library.index(b"\0", first)].decode() in names:
            yield start, start + length


def _fatbins(library: bytes, start: int, end: int) -> Iterator[tuple[int, list[Entry]]]:
    """The fatbins of a section, where each begins, with their entries."""
    at = start
    while at < end:
        magic, _, header, size = FATBIN_HEADER.unpack_from(library, at)
        if magic != FATBIN_MAGIC:
            # Each begins at a multiple of eight bytes, behind zeros.
            if any(library[at : at + ALIGNMENT]):
                raise ThinError(f"expected a fatbin or zeros at byte {at}, got {library[at : at + ALIGNMENT].hex()}")
            at += ALIGNMENT
            continue
        entries, entry, behind = [], at + header, at + header + size
        while entry < behind:
            kind, _, entry_header, code, architecture = ENTRY_HEADER.unpack_from(library, entry)
            entries.append(Entry(kind, architecture, entry, entry + entry_header + code))
            entry = entries[-1].end
        if entry != behind:
            raise ThinError(f"the fatbin at byte {at}: expected entries of {size} bytes, got {entry - at - header}")
        yield at, entries
        at = behind + -behind % ALIGNMENT


def thin_wheel(wheel: Path, folder: Path, rule: Rule, architecture: int) -> Path:
    """Write what ``rule`` leaves of a wheel into ``folder``, with the libraries thinned; gives the file.

    Raises ThinError where a pattern or a member of the rule is not in the wheel: the rule is of another version then.
    """
    name, version, *tags = wheel.stem.split("-")
    distribution = (rule.distribution or name).replace("-", "_")
    info = f"{distribution}-{version}.dist-info"
    with ZipFile(wheel) as published:
        members = _members(published, rule, f"{name}-{version}.dist-info", info)
        target = folder / f"{distribution}-{version}-{BUILD}-{'-'.join(tags[-3:])}.whl"
        lines = io.StringIO()
        record = csv.writer(lines, lineterminator="\n")
        with ZipFile(target, "w") as thin:
            for member, data, mode in members:
                if member == f"{info}/WHEEL":
                    data = data.rstrip() + f"\nBuild: {BUILD}\n".encode()
                elif member == f"{info}/METADATA" and rule.distribution is not None:
                    data = f"Metadata-Version: 2.1\nName: {rule.distribution}\nVersion: {version}\n".encode()
                elif data.startswith(ELF):
                    data = thin_library(data, architecture, rule.ptx)
                _write(thin, member, data, mode)
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                record.writerow((member, f"sha256={digest}", len(data)))
            record.writerow((f"{info}/RECORD", "", ""))
            _write(thin, f"{info}/RECORD", lines.getvalue().encode(), 0o644)
    return target


def _members(wheel: ZipFile, rule: Rule, info: str, new_info: str) -> Iterator[tuple[str, bytes, int]]:
    """Name, content and mode of what the rule leaves; the folder ``info`` with METADATA becomes ``new_info``."""
    published = [each for each in wheel.infolist() if not each.is_dir()]
    for pattern in (*rule.drop, *rule.keep, *rule.stand_ins):
        if not any(fnmatchcase(each.filename, pattern) for each in published):
            raise ThinError(f"{wheel.filename}: expected members that match {pattern}, got none")

    def left(each: ZipInfo) -> bool:
        folder, _, rest = each.filename.partition("/")
        if folder == info:
            return not rest.startswith("RECORD") and (rule.distribution is None or rest in ("METADATA", "WHEEL"))
        dropped, kept = (any(fnmatchcase(each.filename, one) for one in of) for of in (rule.drop, rule.keep))
        return kept or not dropped

    def content(each: ZipInfo) -> bytes:
        stand_in = rule.stand_ins.get(each.filename)
        return wheel.read(each) if stand_in is None else stand_in.read_bytes()

    return (
        (each.filename.replace(info, new_info, 1), content(each), each.external_attr >> 16)
        for each in filter(left, published)
    )


def _write(wheel: ZipFile, member: str, data: bytes, mode: int) -> None:
    # The same wheel gives the same file, whenever it is written.
    info = ZipInfo(member, EPOCH)
    info.compress_type, info.external_attr = ZIP_LZMA, mode << 16
    wheel.writestr(info, data)
