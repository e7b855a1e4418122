"""From an address to the function that answers it; the functions are in `reading` and `writing`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from .store import Refused, User

if TYPE_CHECKING:
    from .server import LoopbackHub


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    hub: LoopbackHub
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    user: User | None
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []
REPO = r"(?P<repo>[^/]+/[^/]+)"
API = rf"/api/models/{REPO}"


def route(methods: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    def add(function: Callable[..., Answer]) -> Callable[..., Answer]:
        _ROUTES.extend((method, re.compile(pattern), function) for method in methods.split())
        return function

    return add


def answer(request: Request) -> Answer:
    """What the Hub answers; raises `Refused` for anything but 2xx and 3xx."""
    for method, pattern, function in _ROUTES:
        match = pattern.fullmatch(request.path)
        if match and request.method == method:
            # a revision or a path is one segment, percent-encoded
            return function(request, **{k: unquote(v or "") for k, v in match.groupdict().items()})
    raise Refused(404, message=f"no such address: {request.method} {request.path}")


def as_json(value: Any, **headers: str) -> Answer:
    kind = {"Content-Type": "application/json"}
    return Answer(200, json.dumps(value).encode(), kind | headers)
