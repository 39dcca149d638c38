#!/usr/bin/env python3
"""An MCP server with one tool, the time of day; it speaks MCP on standard input and output.

qwen_agent_assistant.py starts it, as any other MCP client can: the command is `python mcp_clock_server.py`.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Literal

try:
    from mcp.server.mcpserver import MCPServer
except ImportError:  # mcp 1, which Qwen-Agent needs
    from mcp.server.fastmcp import FastMCP as MCPServer  # type: ignore[attr-defined, no-redef]

server = MCPServer("clock")


@server.tool()
def now(utc_offset: Literal[-8, 0, 1, 8]) -> str:
    """The date and time of day, so many hours east of Greenwich."""
    return datetime.now(timezone(timedelta(hours=utc_offset))).isoformat(timespec="seconds")


if __name__ == "__main__":
    server.run("stdio")
