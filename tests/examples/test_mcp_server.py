"""The MCP server by its protocol, lines of JSON-RPC on standard input and output; so with mcp 1 and mcp 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp", reason="the server needs mcp")

SERVER = Path(__file__).parents[2] / "examples" / "mcp_clock_server.py"
HELLO = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}


class Connection:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.asked = 0

    def send(self, **message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        self.process.stdin.flush()

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to a request; what the server says unasked is passed over."""
        self.asked += 1
        self.send(id=self.asked, method=method, params=params)
        assert self.process.stdout is not None
        return next(answer for line in self.process.stdout if (answer := json.loads(line)).get("id") == self.asked)


@pytest.fixture
def server() -> Iterator[Connection]:
    command = [sys.executable, str(SERVER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        connection = Connection(process)
        assert connection.ask("initialize", **HELLO)["result"]["serverInfo"]["name"] == "clock"
        connection.send(method="notifications/initialized")
        yield connection
        process.kill()


def test_its_one_tool_has_a_schema(server: Connection) -> None:
    (tool,) = server.ask("tools/list")["result"]["tools"]
    assert tool["name"] == "now"
    assert tool["inputSchema"]["properties"]["utc_offset"]["enum"] == [-8, 0, 1, 8]
    assert tool["inputSchema"]["required"] == ["utc_offset"]


def test_the_tool_gives_the_time(server: Connection) -> None:
    result = server.ask("tools/call", name="now", arguments={"utc_offset": 8})["result"]
    now = datetime.fromisoformat(result["content"][0]["text"])
    assert now.utcoffset() == timedelta(hours=8)
    assert abs(datetime.now(now.tzinfo) - now) < timedelta(minutes=1)


def test_arguments_outside_the_schema_are_an_error(server: Connection) -> None:
    answer = server.ask("tools/call", name="now", arguments={"utc_offset": 5})
    assert "error" in answer or answer["result"]["isError"]
