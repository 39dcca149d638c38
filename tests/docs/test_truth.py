"""What the pages say about the code is what the code has: variables, paths, tests, messages, flags, versions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import qnext_sglang
import qnext_vllm
from qnext_kernels.dispatch import BACKEND_NAMES, OPERATION_NAMES, OPERATIONS
from qnext_plugins.cli.bench.models import BF16_BYTES, Slice, SliceWork
from qnext_plugins.settings import Settings

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = {file.stem: file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))}
README = (ROOT / "README.md").read_text()
SOURCES = [
    file
    for folder in ("kernels", "qnext_plugins", "vllm_plugin", "sglang_plugin")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
PATH = re.compile(
    r"`((?:kernels|qnext_plugins|vllm_plugin|sglang_plugin|tests|examples|scripts|benchmarks|docs)/[\w./-]+)(?:::(\w+))?`"
)
READERS = ("Makefile", ".ci/run", "tests/**/*.py", "qnext_plugins/**/*.py", "kernels/**/*.py", "scripts/*")


def section(page: str, title: str) -> str:
    """The text under a heading of a page, to the next heading of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}$\n(.*?)(?=^#{{1,2}} |\Z)", PAGES[page], re.M | re.S)
    assert found, f"docs/{page}.md has no heading {title!r}"
    return found[2]


def test_every_setting_has_its_section_and_every_section_its_setting() -> None:
    documented = set(re.findall(r"^## (QNEXT_\w+)$", PAGES["environment"], re.M))
    assert documented == {f"QNEXT_{name.upper()}" for name in Settings.model_fields}


def test_backends_and_operations_are_those_of_the_dispatcher() -> None:
    named = set(re.findall(r"`(\w+)`", section("environment", "QNEXT_BACKEND")))
    assert set(BACKEND_NAMES) | set(OPERATION_NAMES) <= named
    for operation in OPERATIONS.values():
        assert {"native", "cpu", "reference"} <= {backend.name for backend in operation.backends}


@pytest.mark.parametrize("page", PAGES)
def test_every_variable_is_read_somewhere(page: str) -> None:
    known = {f"QNEXT_{name.upper()}" for name in Settings.model_fields}
    for variable in set(re.findall(r"QNEXT_[A-Z_]+", PAGES[page])) - known:
        files = (
            file for pattern in READERS for file in ROOT.glob(pattern) if file.is_file() and file != Path(__file__)
        )
        assert any(variable in file.read_text(errors="replace") for file in files if file.parent != HERE), variable


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists_and_every_named_test_too(page: str) -> None:
    for path, name in PATH.findall(PAGES[page]):
        assert (ROOT / path).exists(), path
        if name:
            assert re.search(rf"^\s*(?:def|class) {name}\b", (ROOT / path).read_text(), re.M), f"{path}::{name}"


def messages() -> list[str]:
    text = PAGES["troubleshooting"].split("\n## ")[1]
    return [
        *re.findall(r"^### `(.+)`$", text, re.M),
        *re.findall(r"^\| `(needs .+?|the C\+\+ .+?|QNEXT_.+?)` \|", text, re.M),
    ]


@pytest.mark.parametrize("message", messages())
def test_every_message_is_one_of_the_codes(message: str) -> None:
    # Literals that go on in the next line are one text.
    code = "".join(re.sub(r'"\n\s+f?"', "", file.read_text()) for file in SOURCES).replace('\\"', '"')
    for fragment in filter(None, (part.strip() for part in message.split("…"))):
        assert fragment in code


def test_supported_versions_are_those_of_the_plugins() -> None:
    assert (qnext_vllm.SUPPORTED_VLLM, qnext_sglang.SUPPORTED_SGLANG) == (">=0.32,<0.34", ">=0.5.23,<0.5.24")
    assert "vLLM 0.32 and 0.33 (0.33 has no CPU build" in PAGES["index"]
    assert "SGLang 0.5.23" in PAGES["index"]
    assert "| version | 0.32, 0.33 | 0.5.23 |" in PAGES["install"]
    assert re.search(r"^\| versions \| 0\.32; 0\.33 .* \| 0\.5\.23 \|$", README, re.M)
    assert "vllm 0.32 or 0.33, or sglang 0.5.23" in README


def test_every_flag_that_sglang_is_not_served_with_is_listed() -> None:
    code = (ROOT / "sglang_plugin" / "qnext_sglang" / "serving.py").read_text()
    code += (ROOT / "sglang_plugin" / "qnext_sglang" / "cpu" / "defaults.py").read_text()
    flags = set(re.findall(r"[\"' ](--[a-z0-9-]+)", code))
    assert len(flags) > 8
    assert flags <= set(re.findall(r"`(--[a-z0-9-]+)`", section("sglang", "What is not served")))


def test_every_setting_that_the_sglang_plugin_chooses_is_listed_with_its_value() -> None:
    code = (ROOT / "sglang_plugin" / "qnext_sglang" / "cpu" / "defaults.py").read_text()
    listed = section("sglang", "What the plugin chooses")
    assert set(re.findall(r"chosen\[\"(\w+)\"\]", code)) <= set(re.findall(r"^\| `(\w+)`", listed, re.M))
    (requests,) = re.findall(r"^MAX_RUNNING_REQUESTS = (\d+)", code, re.M)
    (tokens,) = re.findall(r"^MAX_TOTAL_TOKENS = ([\d_]+)", code, re.M)
    assert re.search(r"^STATE_SLOTS_PER_REQUEST = 10$", code, re.M)
    assert f"| `max_running_requests` | {requests} |" in listed
    assert f"| `max_total_tokens` | {tokens.replace('_', ' ')} |" in listed
    assert "ten slots of recurrent state" in listed


def test_every_figure_of_the_readme_is_one_of_the_pages() -> None:
    measured = README.partition("\n## What is measured\n")[2].partition("\n## ")[0]
    figures = re.findall(r"\b\d+\.\d+\b", re.sub(r"(vLLM|SGLang) [\d.]+", "", measured))
    assert len(figures) > 30
    known = PAGES["features"]
    assert [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", known)] == []


def test_what_the_weights_ask_for_is_what_their_shapes_say() -> None:
    said = section("features", "What the weights ask for")
    kinds: dict[str, dict[str, Any]] = {"bfloat16": {}, "block-wise FP8": {"fp8": True}}
    kinds |= {f"int4 in groups of {group}": {"int4": group} for group in (32, 128)}
    kinds["int4 in groups of 128, all but experts in int8"] = {"int4": 128, "int8": True}
    for name, stored in kinds.items():
        model = Slice(layers=48, experts=512, **stored)
        work = SliceWork(model)
        head = model.vocabulary * model.hidden * BF16_BYTES
        # A step of any number of tokens reads every expert once; the embedding is as large as the head.
        numbers = [f"{(work.weights(1 << 20) + head) / 1e9:.0f}"]
        numbers += [f"{work.decode(*step) / 1e9:.1f}" for step in ((128,), (32_768,), (128, 3))]
        assert "| {} | {} GB | {} / {} GB | {} GB |".format(name, *numbers) in said


def test_every_link_of_the_readme_leads_to_a_file_and_a_heading() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", README)
    assert len(links) > 15
    for path, anchor in links:
        file = ROOT / path if path else ROOT / "README.md"
        assert file.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in headings}, (
                anchor
            )
