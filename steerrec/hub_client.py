"""Talking to the Hub's client: once more where it gives up early, its errors in one clear line.

Not here: what is sent and fetched (`steerrec.pushing`, `steerrec.pulling`). Tokens are passed on
and never shown.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from steerrec import __version__
from steerrec.errors import HubError, SteerrecError

T = TypeVar("T")
logger = logging.getLogger(__name__)

_BUSY = (408, 429, 500, 502, 503, 504)
_PAUSES = (1.0, 2.0, 4.0)  # seconds before another try
_HTTP_ERROR = HfHubHTTPError.__bases__[0]  # of the client's HTTP library, whichever that is


def endpoint_of(endpoint: str | None = None) -> str:
    """The address of the Hub: as given, or of HF_ENDPOINT, or the client's own."""
    return (endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def client(endpoint: str | None, token: str | bool | None) -> HfApi:
    """The client for a Hub."""
    return HfApi(
        endpoint_of(endpoint),
        token=token,
        library_name="steerrec",
        library_version=__version__,
    )


def patiently(call: Callable[[], T]) -> T:
    """What a call returns; where the Hub is busy or down for a moment, after another try or more.

    The client tries some requests again by itself, but not all of them.
    """
    for pause in _PAUSES:
        try:
            return call()
        except Exception as error:
            status = _status(error)
            if status not in _BUSY:
                raise
            logger.info("the Hub answers %s; trying again in %g s", status, pause)
            time.sleep(pause)
    return call()


@contextmanager
def hub_errors(
    repo_id: str,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | bool | None = None,
) -> Iterator[None]:
    """Turn whatever the client raises into one HubError, and draw bars on terminals alone."""
    shown = not are_progress_bars_disabled() and not sys.stderr.isatty()
    if shown:
        disable_progress_bars()
    try:
        yield
    except SteerrecError:
        raise
    except Exception as error:  # the client lets through what its HTTP and xet libraries raise
        address = _without_login(endpoint_of(endpoint))
        message = _explained(error, repo_id, revision or "main", address)
        raise HubError(without_token(message, token)) from error
    finally:
        if shown:
            enable_progress_bars()


def without_token(text: str, token: str | bool | None = None) -> str:
    """The text with the token in use, should it be in there, left out."""
    secret = token if isinstance(token, str) else get_token()
    return text.replace(secret, "…") if secret else text


def _explained(error: Exception, repo_id: str, revision: str, endpoint: str) -> str:
    chain = list(_chain(error))

    def among(*types: type[BaseException]) -> bool:
        return any(isinstance(one, types) for one in chain)

    status = _status(error)
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if among(GatedRepoError):
        return (
            f"{repo_id} is gated: ask for access at {endpoint}/{repo_id}, and {login} as the user "
            "who has it"
        )
    if among(RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}; expected a branch, a tag or a commit of it"
    if among(RemoteEntryNotFoundError):
        return f"{repo_id} lacks a file at {revision!r}: {_first_line(error)}"
    if among(RepositoryNotFoundError):
        return (
            f"{endpoint} has no repository {repo_id}, or it is private and the login (if any) may "
            f"not see it: check the name, and {login} as a user who may"
        )
    if status == 401:
        return f"{endpoint} does not accept the token, or wants one: {login}"
    if status == 403:
        return f"{endpoint} does not let this login write to {repo_id}: {login} as a user who may"
    if status == 412:
        return f"somebody else pushed to {repo_id} in the meantime; look at that, then push again"
    if status in _BUSY:
        return (
            f"{endpoint} answers {status}, several tries in a row; nothing half is kept: run the "
            "same again later"
        )
    if status is not None:
        said = next((one.server_message for one in chain if isinstance(one, HfHubHTTPError)), None)
        return f"{endpoint} answers {status} for {repo_id} ({said or 'without a reason'})"
    if "xet" in str(error).lower():
        return (
            f"large files cannot be sent to {endpoint} by xet ({_first_line(error)}); where a Hub "
            "has no xet storage, set HF_HUB_DISABLE_XET=1"
        )
    if among(OfflineModeIsEnabled) or _is_cache_miss(chain):
        return (
            f"{repo_id} at {revision!r} is not in the cache, or not all of it, and the network is "
            "off (HF_HUB_OFFLINE or local_files_only): pull it once with the network on"
        )
    if "Consistency check failed" in str(error) or "peer closed" in str(error):
        return f"the transfer of {repo_id} broke off; nothing half is kept: run again"
    if among(_HTTP_ERROR, ConnectionError, TimeoutError):
        return (
            f"{endpoint} cannot be reached ({_first_line(chain[-1])}): check the network and run "
            "the same again, or work from the cache with HF_HUB_OFFLINE=1"
        )
    return f"{repo_id} on {endpoint}: {_first_line(error)}"


def _is_cache_miss(chain: list[BaseException]) -> bool:
    """Whether something is not in the cache, with no failed request behind it."""
    offline = any(type(one).__name__ in _CACHE_MISSES for one in chain)
    return offline and not any(isinstance(one, _HTTP_ERROR) for one in chain)


_CACHE_MISSES = ("LocalEntryNotFoundError", "IncompleteSnapshotError", "RevisionResolutionError")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes; not its context, which may be what a caller was dealing with."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """Status of the answer behind an error."""
    found = (one for one in _chain(error) if isinstance(one, HfHubHTTPError))
    return next((one.response.status_code for one in found), None)


def _first_line(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _without_login(endpoint: str) -> str:
    host = urlsplit(endpoint).netloc
    return endpoint.replace(host, host.rpartition("@")[2])
