"""The reason of a failed start, out of logs of real engines; of a traceback's frames they keep the outer and inner."""

from __future__ import annotations

from pathlib import Path

import pytest

from qnext_plugins.cli.compare.logs import LONGEST, root_cause

LOGS = Path(__file__).parent / "data" / "logs"
NOT_A_FOLDER = "OSError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/no/such/model'."
NO_SUCH_FLAG = "error: unrecognized arguments: --no-such-flag"
NO_TENSOR = "CheckpointError: checkpoint: missing model.layers.1.linear_attn.out_proj.weight"
REASONS = {
    "vllm_cache": (
        "ValueError: Available memory on node 0 (21.98/23.54 GiB) on kv cache allocation is less than requested memory "
        "for kv (1000.0 GiB). Decrease --kv-cache-memory-bytes"
    ),
    "vllm_share": (
        "ValueError: Available memory on node 0 (21.6/23.54 GiB) on startup is less than desired CPU memory "
        "utilization (1.0, 23.54 GiB)."
    ),
    "vllm_tensor": NO_TENSOR,
    "vllm_path": NOT_A_FOLDER,
    "vllm_flag": NO_SUCH_FLAG,
    "vllm_ranks": (
        "ValidationError: 1 validation error for VllmConfig Value error, Total number of attention heads (4) must be "
        "divisible by tensor parallel size (3)."
    ),
    "sglang_memory": "ValueError: Loaded weights leave no GPU memory for the KV cache under --mem-fraction-static=",
    "sglang_tensor": NO_TENSOR,
    "sglang_path": NOT_A_FOLDER,
    "sglang_flag": NO_SUCH_FLAG,
    "sglang_context": "ValueError: Warning: User-specified context_length (100000) is greater than the derived",
}


@pytest.mark.parametrize("name", REASONS)
def test_reason_of_a_failed_start_is_the_exception_that_the_others_point_to(name: str) -> None:
    reason = root_cause((LOGS / f"{name}.txt").read_text())
    assert reason.startswith(REASONS[name])
    assert "\n" not in reason
    assert len(reason) <= LONGEST + 1


def test_every_recorded_log_has_its_reason() -> None:
    assert {file.stem for file in LOGS.iterdir()} == set(REASONS)


def test_tracebacks_of_two_processes_that_are_mixed_up_are_told_apart() -> None:
    worker, core = "(Worker pid=1) ERROR 11-26 07:52:54 [a.py:1] ", "(EngineCore pid=2) ERROR 11-26 07:52:54 [b.py:2] "
    log = [
        f"{worker}Traceback (most recent call last):",
        f"{core}Traceback (most recent call last):",
        f'{worker}  File "a.py", line 1, in f',
        f'{core}  File "b.py", line 2, in g',
        f"{worker}MemoryError: no room",
        f"{core}    raise RuntimeError(",
        f"{core}RuntimeError: Worker failed with error 'no room', please check the stack trace above",
        "ConnectionResetError: [Errno 104] Connection reset by peer",
    ]
    assert root_cause("\n".join(log)) == "MemoryError: no room"


def test_what_only_follows_from_an_end_is_said_where_nothing_else_is() -> None:
    log = ["Traceback (most recent call last):", '  File "a.py", line 1, in f', "EOFError"]
    assert root_cause("\n".join(log)) == "EOFError"
    first = ["Traceback (most recent call last):", '  File "b.py", line 1, in g', "ValueError: the reason"]
    assert root_cause("\n".join([*first, "", *log])) == "ValueError: the reason"


def test_without_a_traceback_it_is_the_last_error_else_the_last_line() -> None:
    assert root_cause("starting\ntool: error: no such file\nbye\n") == "error: no such file"
    assert root_cause("[2026-11-26 07:57:37] loading\n[2026-11-26 07:57:38] still loading\n\n") == "still loading"
    assert root_cause("") == "it printed nothing"


def test_message_that_lists_something_goes_on_to_the_first_of_it() -> None:
    log = [
        "Traceback (most recent call last):",
        '  File "a.py", line 1, in f',
        "ValueError: cannot read one of: ",
        "(1) a",
    ]
    assert root_cause("\n".join([*log, "(2) b", "done"])) == "ValueError: cannot read one of: (1) a"


def test_long_reason_is_cut() -> None:
    reason = root_cause("Traceback (most recent call last):\nValueError: " + "x" * 1000)
    assert len(reason) == LONGEST + 1
    assert reason.endswith("…")
