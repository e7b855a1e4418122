"""What can go wrong on the way: one fault a request, for as many requests as it is set to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["status", "hang up", "die", "truncate", "flip", "stall"]


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path" matches `pattern`.

    Attributes
    ----------
    kind
        "status" answers `value` instead; "hang up" closes the connection in the middle of the
        request's body, or of the answer's; "die" does that and stops the server; "truncate" sends
        half of the answer under its full length; "flip" changes one byte in the middle of the
        answer; "stall" waits `value` seconds in the middle of the answer.
    """

    pattern: str
    kind: Kind
    times: int = 1
    value: float = 0

    def strikes(self, request: str) -> bool:
        """Whether this request is struck; each strike is counted."""
        struck = self.times > 0 and re.search(self.pattern, request) is not None
        self.times -= struck
        return struck


def damaged(body: bytes) -> bytes:
    """The same length, one byte changed."""
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 0x10]) + body[middle + 1 :]
