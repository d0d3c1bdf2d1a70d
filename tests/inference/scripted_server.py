"""A teacher with a script: a real server on loopback that speaks the OpenAI protocol and notes requests.

Conversations go to ``/chat/completions``; token ids go to ``/completions``, with what vLLM reports of them.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What the server sends back."""

    content: str = ""
    status: int = 200
    """0 hangs up."""
    finish: str = "stop"
    raw: bytes | None = None
    """Sent as it is instead of a completion."""
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    choice: dict[str, Any] = field(default_factory=dict)
    """Further fields of the choice, such as ``token_ids``."""
    drops: bool = False
    """A byte now and then, for ever in effect."""


Script = Callable[[dict[str, Any], int], Reply]
"""Takes a request's body and how often that body came before."""

Controls = Mapping[str, Callable[[dict[str, Any]], Reply]]
"""Requests beside the protocol that the server knows, by path."""


@dataclass(slots=True)
class Record:
    """What the server saw."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    controls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Paths and bodies of the requests beside the protocol."""
    headers: list[dict[str, str]] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    """Completions sent, by body."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    most_at_a_time: int = 0
    at_a_time: int = 0


@contextmanager
def scripted_server(script: Script, *, port: int = 0, controls: Controls | None = None) -> Iterator[Record]:
    """Run the server until the block ends; port 0 is any that is free."""
    seen: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.path.startswith("/v1/"):
                record.controls.append((self.path, body))
                unknown = Reply(status=404)
                self._send((controls or {}).get(self.path, lambda _: unknown)(body))
                return
            name = json.dumps(body, sort_keys=True)
            with record.lock:
                times, seen[name] = seen[name], seen[name] + 1
                record.bodies.append(body)
                record.headers.append(dict(self.headers))
                record.at_a_time += 1
                record.most_at_a_time = max(record.most_at_a_time, record.at_a_time)
            path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
            reply = script(body, times) if self.path == path else Reply(status=404)
            time.sleep(reply.delay_seconds)
            with record.lock:
                record.at_a_time -= 1
                record.answered[name] += reply.status == 200
            self._send(reply)

        def _send(self, reply: Reply) -> None:
            if reply.status == 0:
                return
            chat = self.path.endswith("/chat/completions")
            data = json.dumps(_completion(reply, chat=chat)).encode() if reply.raw is None else reply.raw
            try:
                self.send_response(reply.status)
                for header, value in ({"Content-Length": str(len(data))} | reply.headers).items():
                    self.send_header(header, value)
                self.end_headers()
                for piece in (data[place : place + 1] for place in range(len(data))) if reply.drops else [data]:
                    self.wfile.write(piece)
                    time.sleep(0.05 if reply.drops else 0)
            except OSError:
                pass  # the client no longer waits

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    record = Record(url=f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield record
    finally:
        server.shutdown()
        thread.join(timeout=10)
        server.server_close()


def _completion(reply: Reply, *, chat: bool) -> dict[str, Any]:
    if reply.status != 200:
        return {"error": {"message": reply.content}}
    said = {"message": {"role": "assistant", "content": reply.content}} if chat else {"text": reply.content}
    return {
        "object": "chat.completion" if chat else "text_completion",
        "choices": [{"index": 0, **said, "finish_reason": reply.finish, **reply.choice}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
