"""A Hugging Face Hub on 127.0.0.1, over real HTTP, for the unmodified huggingface_hub client.

It plays two hosts: the Hub at ``http://127.0.0.1:PORT``, and the storage that large files are
redirected to at ``http://localhost:PORT``, another origin, where the client sends no token (one
that comes is answered with 400). Large files travel by LFS alone: no xet header is ever sent, so
downloads need no setting; for uploads the client has to be told HF_HUB_DISABLE_XET=1.

What the addresses mean is in `reading` and `writing`, what is stored in `store`, what goes wrong in
`faults`.
"""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from . import reading, writing  # noqa: F401  # their functions are what `answer` finds
from .faults import Fault, Kind, damaged
from .routes import Answer, Request, answer
from .store import Refused, Repository, Store, User

CHUNK = 1 << 16


@dataclass(frozen=True)
class Seen:
    """A request that came in, as tests look at it."""

    method: str
    path: str
    host: str
    token: str | None
    status: int

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class LoopbackHub:
    """The server; its store and its port survive a `stop` and a `start`."""

    store: Store = field(default_factory=Store)
    seen: list[Seen] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    page: int = 1000  # entries of a tree listing in one answer
    port: int = 0
    running: bool = False

    def start(self) -> LoopbackHub:
        self._server = _Server(self)
        self.port = self._server.server_port
        self.running = True
        run = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        run.start()
        return self

    def stop(self) -> None:
        if self.running:
            self.running = False
            self._server.shutdown()
            self._server.server_close()

    def __enter__(self) -> LoopbackHub:
        return self if self.running else self.start()

    def __exit__(self, *exit: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage_url(self) -> str:
        return f"http://localhost:{self.port}"

    def add_user(self, name: str, token: str, *, writes: bool = True) -> str:
        self.store.users[token] = User(name, writes)
        return token

    def repository(self, repo_id: str) -> Repository:
        return self.store.repositories[repo_id]

    def fail(self, pattern: str, kind: Kind, *, times: int = 1, value: float = 0) -> Fault:
        """Set a fault for the next requests whose "METHOD /path" matches."""
        self.faults.append(Fault(pattern, kind, times, value))
        return self.faults[-1]

    def asked(self, pattern: str = "") -> list[Seen]:
        """The requests so far whose "METHOD /path" matches."""
        return [seen for seen in self.seen if re.search(pattern, str(seen))]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, hub: LoopbackHub) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", hub.port), _Handler)

    def handle_error(self, request: Any, address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    wbufsize = -1
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        hub = self.server.hub
        if not hub.running:  # an open connection to a server that has died
            self.close_connection = True
            return None
        url = urlsplit(self.path)
        name = f"{self.command} {unquote(url.path)}"
        with hub.store.lock:
            fault = next((fault for fault in hub.faults if fault.strikes(name)), None)
        if fault and fault.kind in ("hang up", "die") and self.command != "GET":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self._break(fault)
        body = self._body()  # all of it, or the next request of this connection would be the rest
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if fault and fault.kind == "status":
            reply = Answer(int(fault.value), b'{"error": "set up to fail"}')
        else:
            reply = self._answer(url.path, parse_qs(url.query), token, body)
        host = self.headers.get("Host", "")
        hub.seen.append(Seen(self.command, unquote(url.path), host, token, reply.status))
        self._send(reply, fault)
        return None

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _answer(
        self, path: str, query: dict[str, list[str]], token: str | None, body: bytes
    ) -> Answer:
        hub = self.server.hub
        try:
            with hub.store.lock:
                user = hub.store.user(token)
                request = Request(hub, self.command, path, query, self.headers, user, body)
                return answer(request)
        except Refused as error:
            return Answer(error.status, json.dumps(error.shown).encode(), error.headers)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, reply: Answer, fault: Fault | None) -> None:
        kind = fault.kind if fault else None
        body = damaged(reply.body) if kind == "flip" and reply.body else reply.body
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in reply.headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2
        self.wfile.write(body[:half])
        self.wfile.flush()
        if fault and kind in ("truncate", "hang up", "die"):
            self._break(fault)
            return
        if fault and kind == "stall":
            time.sleep(fault.value)
        for start in range(half, len(body), CHUNK):
            if not self.server.hub.running:
                self.close_connection = True
                return
            self.wfile.write(body[start : start + CHUNK])

    def _break(self, fault: Fault) -> None:
        """Close the connection where it stands; to die is to take no other one either."""
        self.close_connection = True
        if fault.kind == "die":
            self.server.hub.stop()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""
