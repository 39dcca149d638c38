"""What the command line of ``qnext compare`` takes as a side, as prompts, and what it refuses in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from qnext_plugins.cli.compare.command import compare
from qnext_plugins.cli.compare.prompts import load_prompts, marked
from qnext_plugins.cli.compare.report import Prompt
from qnext_plugins.cli.compare.sides import Pythons, SpecError, parse_side, parse_sides

VLLM_DRAFTS = """vllm:m --speculative-config '{"method": "qwen3_next_mtp"}' --dtype float32"""
SGLANG_DRAFTS = "sglang:m --speculative-algo NEXTN --speculative-num-steps 3 --device cpu"

app = typer.Typer()
app.command()(compare)


def refused(*arguments: str) -> str:
    """The one line that ``qnext compare`` refuses these arguments with."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    line = result.stderr.strip()
    assert "\n" not in line
    return line


def test_name_engine_model_and_flags_are_read() -> None:
    side = parse_side("fast=vllm:/models/m --dtype bfloat16 --hf-overrides '{\"a\": 1}'")
    assert (side.name, side.kind, side.target) == ("fast", "vllm", "/models/m")
    assert side.flags == ("--dtype", "bfloat16", "--hf-overrides", '{"a": 1}')


def test_url_may_contain_equals_signs_and_the_path_of_the_api() -> None:
    side = parse_side("http://host:8000/v1?key=vllm:x")
    assert (side.kind, side.name) == ("url", "host:8000")
    assert parse_side("mine=https://host/v1/").target == "https://host"


def test_dtype_is_added_where_the_flags_have_none() -> None:
    assert parse_side("hf:m", dtype="float32").flags == ("--dtype", "float32")
    assert parse_side("hf:m --dtype=bfloat16", dtype="float32").flags == ("--dtype=bfloat16",)
    assert parse_side("http://host", dtype="float32").flags == ()


def test_sides_of_one_engine_get_names_of_their_own() -> None:
    assert [side.name for side in parse_sides(["hf:a", "hf:b", "hf:c"])] == ["hf", "hf-2", "hf-3"]
    assert [side.name for side in parse_sides(["hf-2=hf:a", "hf:b", "hf:c"])] == ["hf-2", "hf", "hf-3"]


@pytest.mark.parametrize(
    ("spec", "kept"), [(VLLM_DRAFTS, ("--dtype", "float32")), (SGLANG_DRAFTS, ("--device", "cpu"))]
)
def test_speculation_is_left_out_with_its_values_and_nothing_else(spec: str, kept: tuple[str, ...]) -> None:
    sides = parse_sides([spec, "hf:m"], without_speculation=True)
    assert [side.without_drafts_of for side in sides] == [None, None, sides[0].name]
    assert sides[2].flags == kept
    assert not sides[2].speculates


def test_commands_start_what_the_engines_document() -> None:
    python = sys.executable
    vllm = parse_side("vllm:m --max-model-len 2048").command(python, 1234)
    assert vllm[:6] == [python, "-P", "-m", "vllm.entrypoints.cli.main", "serve", "m"]
    assert vllm[-2:] == ["--max-model-len", "2048"]
    sglang = parse_side("sglang:m --enable-metrics").command(python, 1234)
    assert sglang[2:6] == ["-m", "sglang.launch_server", "--model-path", "m"]
    assert sglang.count("--enable-metrics") == 1
    assert "--enable-metrics" in parse_side("sglang:m").command(python, 1234)


def test_pythons_come_from_the_environment_else_are_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM", "SGLANG", "HF"):
        monkeypatch.delenv(f"QNEXT_{name}_PYTHON", raising=False)
    monkeypatch.setenv("QNEXT_SGLANG_PYTHON", "/s/bin/python")
    assert [Pythons().of(kind) for kind in ("vllm", "sglang", "hf")] == [
        sys.executable,
        "/s/bin/python",
        sys.executable,
    ]


@pytest.mark.parametrize(
    "text", ["llama:m", "m", "vllm", "vllm:", "http://", "vllm:m --x 'open", "vllm:m --port 1", "hf:m --port=1"]
)
def test_what_names_no_side_is_refused_with_the_text(text: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_side(text)
    assert repr(text) in str(error.value)
    assert "expected" in str(error.value)
    assert "unpack" not in str(error.value), "which is about our code"


def test_shipped_prompts_are_distinct_and_short_and_long() -> None:
    prompts = [prompt.text for prompt in load_prompts()]
    assert len(set(prompts)) == len(prompts) == 32
    lengths = sorted(map(len, prompts))
    assert lengths[0] < 30
    assert lengths[-1] > 900


def test_chat_makes_messages_of_texts_and_leaves_conversations(tmp_path: Path) -> None:
    conversation = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "p"}) + "\n\n" + json.dumps({"messages": conversation}) + "\n")
    assert [prompt.messages for prompt in load_prompts(file, chat=True)] == [
        [{"role": "user", "content": "p"}],
        conversation,
    ]
    assert [prompt.prompt for prompt in load_prompts(file, limit=1)] == ["p"]


def test_mark_is_the_first_thing_of_a_prompt() -> None:
    assert marked(Prompt(prompt="p"), "[1]").text == "[1] p"
    conversation = marked(Prompt(messages=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]), "[1]")
    assert [message["content"] for message in conversation.messages or []] == ["[1] a", "b"]


@pytest.mark.parametrize(
    "line",
    ["no json", '{"text": "p"}', "{}", '{"prompt": ""}', '{"prompt": "p", "messages": [{"role": "user"}]}', "[]"],
)
def test_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "p"}\n' + line + "\n")
    assert f"{file}, line 2" in refused("hf:a", "hf:b", "--prompts", str(file))


def test_wrong_arguments_are_refused_before_anything_starts(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert "two sides" in refused("hf:a")
    assert "--concurrency" in refused("hf:a", "hf:b", "--concurrency", "1,0")
    assert "--concurrency" in refused("hf:a", "hf:b", "--concurrency", "many")
    assert "--referee" in refused("hf:a", "hf:b", "--referee", "c")
    assert "at least one prompt" in refused("hf:a", "hf:b", "--prompts", str(empty))
    missing = refused("hf:a", "hf:b", "--prompts", str(tmp_path / "missing.jsonl"))
    assert "--prompts" in missing
    assert "cannot be read" in missing
    assert "--html" in refused("hf:a", "hf:b", "--html", str(tmp_path / "missing" / "page.html"))
