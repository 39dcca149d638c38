"""The frame of the ``qnext`` command, in processes of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

import qnext_plugins
from qnext_plugins.cli.app import COMMANDS

QNEXT = [sys.executable, "-c", "from qnext_plugins.cli.app import main; main()"]
IMPORTED = """
import sys
from qnext_plugins.cli.app import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "matplotlib", "openai", "vllm", "sglang"}))
"""


def qnext(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*QNEXT, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_help_names_every_subcommand_and_imports_none_of_their_libraries() -> None:
    command = [sys.executable, "-c", IMPORTED, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert all(name in done.stdout for name in COMMANDS)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version_is_printed() -> None:
    assert qnext("--version").stdout == f"qnext-plugins {qnext_plugins.__version__}\n"


def test_an_unknown_subcommand_is_named() -> None:
    done = qnext("docter")
    assert done.returncode == 2
    assert "No such command 'docter'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "option"), [("doctor", "--model"), ("checkpoint", "--mtp-acceptance"), ("bench", "headline")]
)
def test_help_of_a_subcommand_is_its_own(name: str, option: str) -> None:
    done = qnext(name, "--help")
    assert done.returncode == 0
    assert f"Usage: qnext {name}" in done.stdout
    assert option in done.stdout


def test_an_unknown_option_of_a_subcommand_is_named() -> None:
    done = qnext("checkpoint", "--size", "3", "out")
    assert done.returncode == 2
    assert "No such option: --size" in done.stderr


def test_the_script_is_installed() -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="qnext")
    assert script.value == "qnext_plugins.cli.app:main"
