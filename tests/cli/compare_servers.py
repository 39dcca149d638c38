"""Real small HTTP servers for tests: one that misbehaves in front of a good one, and one that streams."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import ClassVar

import httpx


class Handler(BaseHTTPRequestHandler):
    """Passes requests on to a good server, except where ``misbehave`` has answered."""

    upstream: str
    misbehave: Callable[[Handler, int], bool]
    lock: Lock
    asked = 0
    """Completions that were asked for."""

    def do_GET(self) -> None:
        self.send(*self.fetch("GET", b""))

    def do_POST(self) -> None:
        cls = type(self)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with cls.lock:
            number = cls.asked
            cls.asked += 1
        if not cls.misbehave(self, number):
            self.send(*self.fetch("POST", body))

    def fetch(self, method: str, body: bytes) -> tuple[int, bytes]:
        kind = {"Content-Type": self.headers.get("Content-Type", "application/json")}
        url = self.upstream + self.path
        answer = httpx.request(method, url, content=body, headers=kind, timeout=60, trust_env=False)
        return answer.status_code, answer.content

    def send(self, status: int, body: bytes, *, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        # The client may have gone in the meantime.
        with contextlib.suppress(ConnectionError):
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server in a thread."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def misbehaving(upstream: str, misbehave: Callable[[Handler, int], bool]) -> Iterator[str]:
    """The URL of a server before ``upstream``; ``misbehave`` gets each completion's number and says if it answered."""
    with serving(type("Bound", (Handler,), {"upstream": upstream, "misbehave": misbehave, "lock": Lock()})) as url:
        yield url


class Plain(Handler):
    """An OpenAI-compatible server of no known make in front of a good one: text, and nothing beyond the interface."""

    published = frozenset({"model", "prompt", "messages", "max_tokens", "temperature", "stream"})
    chats_only = False
    lists_models = True
    shapes: ClassVar[dict[str, object]] = {}
    """What it adds to each choice."""

    def do_GET(self) -> None:
        if self.path == "/v1/models" and self.lists_models:
            self.send(200, json.dumps({"data": [{"id": "some-model"}]}).encode())
        else:
            self.send(404, b"<html>Not Found</html>")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.chats_only and self.path == "/v1/completions":
            self.send(404, json.dumps({"detail": "Not Found"}).encode())
        elif unknown := sorted(request.keys() - self.published):
            self.send(422, json.dumps({"detail": f"unexpected fields: {unknown}"}).encode())
        else:
            stream = request.pop("stream", False)
            _, answer = self.fetch("POST", json.dumps(request | {"ignore_eos": True}).encode())
            choice = json.loads(answer)["choices"][0]
            kept = {key: choice[key] for key in ("text", "message") if key in choice}
            if stream:
                self.stream(kept.get("text") or kept["message"]["content"])
            else:
                self.send(200, json.dumps({"choices": [kept | {"finish_reason": "length"} | self.shapes]}).encode())

    def stream(self, text: str) -> None:
        """In words, with the interface's mark of the end and neither a reason to finish nor a count of tokens."""
        pieces = [json.dumps({"choices": [{"text": word}]}) for word in text.split(" ")]
        self.send(200, "".join(f"data: {piece}\n\n" for piece in [*pieces, "[DONE]"]).encode())


@contextlib.contextmanager
def plain(upstream: str, **traits: object) -> Iterator[str]:
    """The URL of a ``Plain`` server before ``upstream``; ``traits`` are its attributes."""
    with serving(type("Bound", (Plain,), {"upstream": upstream, **traits})) as url:
        yield url


@contextlib.contextmanager
def streaming(pieces: list[str], *, first: float = 0.0, between: float = 0.0) -> Iterator[str]:
    """The URL of a server that streams ``pieces`` as they are, the first and the others after so many seconds."""

    class Streamer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/v1/models"
            body = json.dumps({"data": [{"id": "streamed", "owned_by": "somebody"}]} if found else {}).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for number, piece in enumerate(pieces):
                time.sleep(between if number else first)
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(f"{piece}\n\n".encode())
                    self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Streamer) as url:
        yield url


def event(text: str = "", *, finish: str | None = None, tokens: int | None = None) -> str:
    """A server-sent event of /v1/completions."""
    choices = [] if tokens is not None else [{"index": 0, "text": text, "finish_reason": finish}]
    usage = {"usage": {"completion_tokens": tokens}} if tokens is not None else {}
    return f"data: {json.dumps({'choices': choices} | usage)}"
