"""What is packed for a GPU machine without a network; the tests write the wheels in place of pip's download."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from types import ModuleType
from zipfile import ZIP_STORED, ZipFile

import pytest
from packaging.requirements import Requirement

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RUN_BARE = BENCHMARKS / "run_bare.sh"
MEBIBYTE = 1 << 20
Downloads = list[tuple[tuple[str, ...], bool]]


def write_wheel(folder: Path, name: str, mebibytes: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-1.0"
    with ZipFile(folder / f"{stem}-py3-none-any.whl", "w", ZIP_STORED) as wheel:
        wheel.writestr(f"{name}/data.bin", os.urandom(mebibytes * MEBIBYTE))
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\n")


@pytest.fixture
def downloads(pack_bare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Downloads:
    """The requirements of each download, and whether with what they require."""
    seen: Downloads = []

    def download(requirements: Iterable[str], folder: Path, python: str, resolve: bool) -> None:
        assert python == "3.12"
        seen.append((tuple(requirements), resolve))
        for each in seen[-1][0]:
            write_wheel(folder, pack_bare.name_of(each), mebibytes=1)
        if resolve:
            write_wheel(folder, "required-by-base")

    monkeypatch.setattr(pack_bare, "download", download)
    rule = pack_bare.Rule(("some/*",), ("some/data.bin",))
    part = pack_bare.Part("a test's", ("some==1.0", "other>=1"), {"some": rule}, {"SOME_SWITCH": "0"})
    monkeypatch.setattr(pack_bare, "PARTS", {"base": pack_bare.Part("base"), "some": part})
    return seen


def packed(folder: Path) -> set[str]:
    return {file.name.partition("-")[0].replace("_", "-") for file in folder.glob("*.whl")}


def test_a_folder_has_the_wheels_and_says_how_they_are_installed(
    pack_bare: ModuleType,
    downloads: Downloads,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "earlier.whl").touch()
    assert pack_bare.main([str(tmp_path), "some"]) == 0
    assert downloads == [(("some==1.0", "other>=1"), False), (("pip",), False)]
    assert packed(tmp_path) == {"some", "other", "pip"}
    assert (tmp_path / "requirements.txt").read_text() == "some==1.0\nother>=1\npip\n"
    assert (tmp_path / "environment.txt").read_text() == "SOME_SWITCH=0\n"
    said = capsys.readouterr().out
    assert re.fullmatch(rf"3 wheels for Python 3\.12 in {re.escape(str(tmp_path))}, 3\.\d MiB: some\n", said)
    # pip runs from its file, which Python reads only as it was.
    assert (tmp_path / "pip-1.0-py3-none-any.whl").exists()


def test_the_base_comes_with_what_it_requires(pack_bare: ModuleType, downloads: Downloads, tmp_path: Path) -> None:
    assert pack_bare.main([str(tmp_path)]) == 0
    assert pack_bare.parse([]).limit == 64
    assert downloads[0] == (pack_bare.BASE, True)
    assert packed(tmp_path) > {"required-by-base", "pydantic", "transformers", "pip"}
    lines = (tmp_path / "requirements.txt").read_text().splitlines()
    assert lines == [*pack_bare.BASE, "pip", "required-by-base"]


def test_what_the_machine_has_is_left_out(pack_bare: ModuleType, downloads: Downloads, tmp_path: Path) -> None:
    has = tmp_path / "has.txt"
    has.write_text("# frozen\n-e git+somewhere#egg=x\nOther==2.0\nrequired_by.base==1\nnumpy @ file:///numpy.whl\n\n")
    assert pack_bare.main(["--has", str(has), str(tmp_path / "out"), "base", "some"]) == 0
    assert (("some==1.0",), False) in downloads
    assert packed(tmp_path / "out") & {"other", "required-by-base", "numpy"} == set()
    # pip says there what the machine has of another version than is wanted.
    lines = (tmp_path / "out" / "requirements.txt").read_text().splitlines()
    assert lines == [*pack_bare.BASE, "some==1.0", "other>=1", "pip"]


@pytest.mark.parametrize(("limit", "status"), [(4, 0), (2, 2)])
def test_a_folder_that_weighs_too_much_is_an_error(
    pack_bare: ModuleType,
    downloads: Downloads,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    limit: int,
    status: int,
) -> None:
    assert pack_bare.main(["--limit", str(limit), str(tmp_path), "some"]) == status
    error = capsys.readouterr().err
    assert bool(error) == bool(status)
    assert re.fullmatch(
        r"(run_bare\.sh pack: expected at most 2 MiB in \S+, got 3\.\d MiB: pack fewer parts\n)?", error
    )


def test_a_rule_that_does_not_fit_is_an_error(
    pack_bare: ModuleType,
    downloads: Downloads,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = pack_bare.Part("another version's", ("some==1.0",), {"some": pack_bare.Rule(("gone/*",))})
    monkeypatch.setitem(pack_bare.PARTS, "some", part)
    assert pack_bare.main([str(tmp_path), "some"]) == 2
    assert "some-1.0-py3-none-any.whl: expected members that match gone/*, got none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "vlm"], "PART: expected some of base, "),
        (["--python", "3", "out"], "--python: expected a version as 3.12, got '3'"),
        (["--has", "no such file", "out"], "--has: expected a file, got no such file"),
        (["--arch", "sm_90", "out"], "--arch: invalid int value: 'sm_90'"),
    ],
)
def test_wrong_arguments_are_named(
    pack_bare: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        pack_bare.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_download_that_fails_is_named(pack_bare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_bare.sys, "executable", "/bin/false")
    with pytest.raises(pack_bare.PackError, match="pip has not downloaded numpy, rich>=13"):
        pack_bare.download(["numpy", "rich>=13"], tmp_path, "3.12", resolve=False)


def test_the_rules_of_a_part_are_of_what_it_requires(pack_bare: ModuleType) -> None:
    for name, part in pack_bare.PARTS.items():
        required = [pack_bare.name_of(each) for each in part.requirements]
        assert set(part.rules) <= set(required), name
        assert len(set(required)) == len(required), name


def test_the_two_parts_of_flashinfer_have_all_of_the_compiler_between_them(pack_bare: ModuleType) -> None:
    compiler = "nvidia-cutlass-dsl-libs-cu13"
    beside, alone = (pack_bare.PARTS[name].rules[compiler] for name in ("flashinfer", "cutlass-ir"))
    member = "nvidia_cutlass_dsl/dsl_packages/cutlass/_mlir/_mlir_libs/_cutlass_ir.cu13.cpython-312-x86_64-linux-gnu.so"
    assert any(fnmatchcase(member, each) for each in alone.keep)
    assert any(fnmatchcase(member, each) for each in beside.drop)
    assert beside.distribution is None
    assert alone.distribution is not None
    versions = {
        each for part in pack_bare.PARTS.values() for each in part.requirements if pack_bare.name_of(each) == compiler
    }
    assert len(versions) == 1


def closure(names: set[str]) -> set[str]:
    """These distributions and what they need, as installed here."""
    found: set[str] = set()
    while names:
        name = names.pop()
        found.add(name)
        try:
            needed = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue
        wanted = {each.name.lower() for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})}
        names |= {each.replace("_", "-") for each in wanted} - found
    return found


def test_run_bare_carries_everything_that_gpu_ops_imports(pack_bare: ModuleType) -> None:
    script = (
        "import sys, importlib.metadata as metadata; import gpu_ops; by_module = metadata.packages_distributions();"
        "print(*{name for module in sys.modules for name in by_module.get(module.split('.')[0], [])}, sep='\\n')"
    )
    path = os.pathsep.join([str(BENCHMARKS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {name.lower().replace("_", "-") for name in done.stdout.split()}
    carried = closure({pack_bare.name_of(each) for each in pack_bare.BASE} | {"torch", "triton"})
    assert imported - carried - {"qnext-plugins", "setuptools", "pip", "dill", "tqdm", "colorama"} == set()
    assert "pydantic" in imported


def test_run_bare_is_sound_shell_and_wants_the_wheels(tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", RUN_BARE], check=True)
    done = subprocess.run(
        ["bash", RUN_BARE, "--output", tmp_path / "out", "--wheels", tmp_path / "none"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"run_bare.sh: --wheels: expected a folder that 'run_bare.sh pack' has filled, got {tmp_path / 'none'}\n"
    )


def test_run_bare_takes_no_environment_that_is_not_there(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", RUN_BARE, "--wheels", "none", "--environment", tmp_path / "gone"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"run_bare.sh: --wheels: none: expected an environment in {tmp_path / 'gone'}, where is none\n"
    )
