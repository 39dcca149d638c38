#!/usr/bin/env python3
"""Check a built wheel in an empty virtual environment: `python scripts/check_wheel.py dist/*.whl`.

The wheel is installed alone. Its modules are then imported beside the libraries of the environment that runs this
script, where the editable install of this repository is out of reach.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

PACKAGES = ("qnext_kernels", "qnext_plugins", "qnext_vllm")
CHECK = """
import importlib, pkgutil, sys
from importlib.metadata import distribution

(plugin,) = distribution("qnext-plugins").entry_points.select(group="vllm.general_plugins")
assert callable(plugin.load()), plugin
assert not {"torch", "vllm"} & set(sys.modules), "loading the plugin's entry point imports torch or vllm"
sys.path.append(sys.argv[1])
names = []
for package in map(importlib.import_module, sys.argv[2:]):
    assert package.__file__.startswith(sys.prefix), f"{package.__file__} is not the wheel's"
    names += [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    importlib.import_module(name)
print(f"{len(names) + len(sys.argv) - 2} modules import")
"""


def missing_files(wheel: Path) -> set[str]:
    """What the wheel lacks of the files that no import would miss."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    absent = {f"{package}/py.typed" for package in PACKAGES} - set(names)
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
        check = [str(python), "-I", "-c", CHECK, sysconfig.get_path("purelib"), *PACKAGES]
        for command in (pip, check):
            # In the folder, so that the repository's own packages cannot stand in for the wheel's.
            if status := subprocess.run(command, cwd=folder).returncode:
                return status
    print(f"{wheel.name} is in order")
    return 0


if __name__ == "__main__":
    sys.exit(main())
