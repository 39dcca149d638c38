#!/usr/bin/env python3
"""Check a built wheel in an empty virtual environment: `python scripts/check_wheel.py dist/*.whl`.

The wheel is installed alone. Its modules are then imported beside the libraries of the environment that runs this
script, where the editable install of this repository is out of reach; an engine's side only where its engine is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

# Each package with the engine that its modules need.
PACKAGES = {"qnext_kernels": None, "qnext_plugins": None, "qnext_vllm": "vllm", "qnext_sglang": "sglang"}
ENTRY_POINTS = {
    "vllm.general_plugins": "qnext_vllm:register",
    "sglang.srt.plugins": "qnext_sglang:register",
    "sglang.srt.platforms": "qnext_sglang:activate",
}
CHECK = """
import importlib, json, pkgutil, sys
from importlib.metadata import distribution
from importlib.util import find_spec

wheel, libraries, packages, entry_points = map(json.loads, sys.argv[1:])
for group, value in entry_points.items():
    (plugin,) = distribution("qnext-plugins").entry_points.select(group=group)
    assert (plugin.name, plugin.value) == ("qnext", value), plugin
    assert callable(plugin.load()), plugin
    heavy = {"torch", "vllm", "sglang"} & set(sys.modules)
    assert not heavy, f"loading {value} imports {', '.join(heavy)}"
sys.path.append(libraries)
report = []
for name, engine in packages.items():
    package = importlib.import_module(name)
    assert package.__file__.startswith(sys.prefix), f"{package.__file__} is not the wheel's"
    if engine and not find_spec(engine):
        report.append(f"none of {name} ({engine} is not here)")
        continue
    modules = [module.name for module in pkgutil.walk_packages(package.__path__, name + ".")]
    for module in modules:
        importlib.import_module(module)
    report.append(f"{len(modules) + 1} of {name}")
print(f"{wheel} is in order; modules imported: {', '.join(report)}")
"""


def missing_files(wheel: Path) -> set[str]:
    """What the wheel lacks of the files that no import would miss."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    absent = {f"{package}/py.typed" for package in PACKAGES} | {"qnext_kernels/backend_table.csv"}
    absent -= set(names)
    return absent | ({"LICENSE"} if not any(name.endswith("/LICENSE") for name in names) else set())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    wheel: Path = parser.parse_args().wheel.resolve()
    if absent := missing_files(wheel):
        print(f"{wheel.name} lacks {', '.join(sorted(absent))}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = Path(folder, "bin", "python")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
        arguments = map(json.dumps, (wheel.name, sysconfig.get_path("purelib"), PACKAGES, ENTRY_POINTS))
        check = [str(python), "-I", "-c", CHECK, *arguments]
        for command in (pip, check):
            # In the folder, so that the repository's own packages cannot stand in for the wheel's.
            if status := subprocess.run(command, cwd=folder).returncode:
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
