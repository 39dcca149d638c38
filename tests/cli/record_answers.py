"""Writes what the tests read: `python -m tests.cli.record_answers 'vllm:examples/tiny/checkpoint' FILE`.

The answers of a real server to what ``qnext compare`` asks it: a completion, a chat, and their tokens scored.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from qnext_plugins.cli.compare.client import Client
from qnext_plugins.cli.compare.report import Prompt
from qnext_plugins.cli.compare.servers import Server
from qnext_plugins.cli.compare.sides import Pythons, parse_side

TEXT = Prompt(prompt="The with statement is used")
CHAT = Prompt(messages=[{"role": "user", "content": "What is `lambda`?"}])


class Recorder(Client):
    """A client that keeps what it was answered."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.kept: list[Any] = []

    async def _post(self, path: str, fields: dict[str, Any]) -> Any:
        self.kept.append(await super()._post(path, fields))
        return self.kept[-1]


async def record(server: Server) -> dict[str, Any]:
    await server.ready(600)
    client = Recorder(server.url)
    await client.about()
    completion = await client.greedy(0, TEXT, 8)
    await client.greedy(1, CHAT, 8)
    await client.score(completion.prompt_ids or [], completion.ids or [])
    await client.close()
    return dict(zip(("completion", "chat", "score"), client.kept, strict=True))


def main(side: str, file: Path) -> None:
    spec = parse_side(side, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(spec, Pythons().of(spec.kind), Path(folder) / "log.txt")
        try:
            answers = asyncio.run(record(server))
        finally:
            server.stop()
    file.write_text(json.dumps(answers, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
