"""Names on the Hub: what may go to its client, which makes addresses and paths of them.

They may come from a file that a stranger wrote. Nothing here imports the client.
"""

from __future__ import annotations

import re

from steerrec.errors import HubError

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_PART}/{_PART}")
_SHA = re.compile(r"[0-9a-f]{40}")
_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(?:/[A-Za-z0-9_][A-Za-z0-9._+-]*)*")


def is_repo_id(text: str) -> bool:
    """Whether a text has the form of a Hub id, ``org/name``."""
    return bool(_REPO_ID.fullmatch(text)) and "--" not in text and ".." not in text


def check_repo_id(repo_id: object) -> str:
    """The id, if it has the form ``org/name``."""
    if not isinstance(repo_id, str) or not is_repo_id(repo_id):
        raise HubError(f"{repo_id!r} is not the id of a repository; expected org/name")
    return repo_id


def is_sha(revision: object) -> bool:
    """Whether a revision is the full id of a commit, which nobody can move."""
    return isinstance(revision, str) and _SHA.fullmatch(revision) is not None


def check_revision(revision: object) -> str:
    """The revision, if it is a commit id of 40 hex digits or a plain name of a branch or tag."""
    plain = isinstance(revision, str) and len(revision) <= 200 and _REF.fullmatch(revision)
    if not plain or ".." in str(revision) or str(revision).endswith((".lock", ".")):
        raise HubError(
            f"{revision!r} is not a revision; expected a branch, a tag, or a commit id of 40 hex "
            "digits"
        )
    return str(revision)


def check_subfolder(subfolder: str) -> str:
    """The path of a folder in a repository, if it is one that cannot lead out of it."""
    if not _REF.fullmatch(subfolder) or ".." in subfolder:
        raise HubError(f"{subfolder!r} is not a plain subfolder; expected such as a/b")
    return subfolder
