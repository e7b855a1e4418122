"""From the Hub to this machine: the files of a MODEL or ARTIFACT and nothing else, each verified.

The client compares sizes alone, so every file is compared with the checksum that the Hub has of it,
also where it comes from the cache; nothing is executed. What is in the cache is used without asking
the network, where the revision is the id of a commit.
"""

from __future__ import annotations

import inspect
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.hf_api import RepoFile

from steerrec import __version__
from steerrec.checksums import checksum, checksum_of
from steerrec.errors import HubError
from steerrec.files import atomic_folder
from steerrec.hub_client import client, hub_errors, patiently
from steerrec.hub_names import check_repo_id, check_revision, check_subfolder, is_repo_id, is_sha
from steerrec.published import (
    PATTERNS,
    RECORD,
    Kind,
    cache_of,
    files_of,
    is_part,
    kind_of,
    remember,
)


@dataclass(frozen=True)
class Snapshot(os.PathLike[str]):
    """A folder of the Hub at one commit, in the client's cache; a path like any other.

    Attributes
    ----------
    path
        The folder. Its files are links into the cache: they are read, never written.
    repo_id
        The repository.
    revision
        Id of the commit, 40 hex digits.
    """

    path: Path
    repo_id: str
    revision: str

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def origin(self) -> tuple[str, str] | tuple[None, None]:
        """What an artifact can name as its base model: repository and commit, of a whole one."""
        whole = self.path.name == self.revision
        return (self.repo_id, self.revision) if whole else (None, None)

    def copy_to(self, path: str | Path) -> Kind:
        """Copy the files of the format into a folder, after loading them; all of it or nothing.

        A MODEL remembers where it is from, so that artifacts made from the copy name it as their
        base model.

        Parameters
        ----------
        path
            The folder; one that is there is replaced.

        Returns
        -------
        Kind
            Whether it is a MODEL or an ARTIFACT.
        """
        kind = check_folder(self)
        with atomic_folder(path) as folder:
            for name, file in files_of(self.path, kind).items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, folder / name)
            repo_id, revision = self.origin
            if kind == "MODEL" and repo_id is not None and revision is not None:
                remember(folder, repo_id, revision)
        return kind


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
    endpoint: str | None = None,
) -> Snapshot:
    """Fetch a MODEL or ARTIFACT from the Hub into the client's cache, and verify every file.

    Parameters
    ----------
    repo_id
        ``org/name``.
    revision
        Branch, tag or id of a commit; ``main`` by default. Branches and tags can be moved: pin what
        matters by the id that the result has.
    token
        A token, False for none, or None for that of the login.
    cache_dir
        The client's cache, if not the usual one.
    local_files_only
        Whether to use the cache alone; HF_HUB_OFFLINE=1 says so too.
    subfolder
        Folder in the repository that holds the files.
    endpoint
        Address of the Hub; that of HF_ENDPOINT by default.

    Raises
    ------
    HubError
        If there is no such thing, the login may not read it, the network fails, or a file is not
        what the Hub says that it is; such a file is removed from the cache, so that the next pull
        fetches it anew.
    """
    check_repo_id(repo_id)
    wanted = check_revision(revision or constants.DEFAULT_REVISION)
    inside = f"{check_subfolder(subfolder)}/" if subfolder else ""
    api = client(endpoint, token)
    offline = local_files_only or constants.HF_HUB_OFFLINE
    with hub_errors(repo_id, revision=wanted, endpoint=endpoint, token=token):
        resolved = patiently(
            lambda: api.resolve_revision(
                repo_id, revision=wanted, cache_dir=cache_dir, local_files_only=local_files_only
            )
        )
        sha = resolved.resolved
        if not is_sha(sha):
            raise HubError(f"{repo_id} at {wanted!r} is commit {sha!r}; expected 40 hex digits")
        found = patiently(
            lambda: snapshot_download(
                repo_id,
                revision=sha,
                allow_patterns=[inside + pattern for pattern in PATTERNS],
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                endpoint=api.endpoint,
                library_name="steerrec",
                library_version=__version__,
            )
        )
        snapshot = Path(found)
        files = _files(snapshot, inside)
        _verify(files, _checksums(files, snapshot, None if offline else api, repo_id), repo_id)
    folder = snapshot / inside
    if not (folder / RECORD).is_file() and not (folder / "config.json").is_file():
        where = f"{repo_id}/{subfolder}" if subfolder else repo_id
        raise HubError(
            f"{where} at {wanted!r} holds neither a MODEL nor an ARTIFACT; expected what "
            "`steerrec push` writes"
        )
    return Snapshot(folder, repo_id, sha)


def local_folder(spec: str | Path | Snapshot, **hub: Any) -> Path | Snapshot:
    """The folder that is meant: the one here, or what `pull` fetches where there is none.

    Parameters
    ----------
    spec
        A folder, or a Hub id. A folder goes before a repository of the same name.
    **hub
        Options of `pull`.

    Raises
    ------
    HubError
        If an option is not one of `pull`, a revision of a folder is wanted, or nothing can be had
        from the Hub.
    """
    known = list(inspect.signature(pull).parameters)[1:]
    if unknown := sorted(hub.keys() - set(known)):
        raise HubError(f"{spec} cannot be had with {unknown[0]!r}; expected {', '.join(known)}")
    if isinstance(spec, Snapshot):
        return spec
    if Path(spec).exists() or not is_repo_id(str(spec)):
        if hub.get("revision") is not None:
            raise HubError(
                f"{spec} is not the id of a repository on the Hub: it has no revision "
                f"{hub['revision']!r}"
            )
        return Path(spec)
    try:
        return pull(str(spec), **hub)
    except HubError as error:
        raise HubError(
            f"{spec} is no folder here, and cannot be had from the Hub: {error}"
        ) from error


def check_folder(folder: Path | Snapshot) -> Kind:
    """What a folder is, once it has been loaded without an error."""
    path = Path(folder)
    kind = kind_of(path)
    files_of(path, kind)  # refuses links before anything behind them is read
    if kind == "MODEL":
        from steerrec.loading import load_recommender

        load_recommender(folder)
    else:
        from steerrec.artifacts import load_artifact

        load_artifact(path, root=cache_of(path))
    return kind


def _files(snapshot: Path, inside: str) -> dict[str, Path]:
    """The files of the format in a snapshot, by their names in the repository."""
    names = (path.relative_to(snapshot).as_posix() for path in (snapshot / inside).rglob("*"))
    return {name: snapshot / name for name in sorted(names) if is_part(name.removeprefix(inside))}


def _checksums(
    files: dict[str, Path], snapshot: Path, api: HfApi | None, repo_id: str
) -> dict[str, str]:
    """What the Hub says of files: the name of the blob that each is a link to, in the cache.

    Where the cache cannot have links, the Hub is asked; without it such files cannot be verified.
    """
    blobs = snapshot.parents[1] / "blobs"
    found: dict[str, str] = {}
    plain = []
    for name, file in files.items():
        if not file.is_symlink():
            plain.append(name)
            continue
        blob = Path(os.path.normpath(file.parent / file.readlink()))
        if blob.parent != blobs:
            raise HubError(f"{file} is a link to {blob}; expected one into {blobs}")
        found[name] = blob.name
    if plain and api is not None:
        tree = api.list_repo_tree(repo_id, recursive=True, revision=snapshot.name)
        listed = {file.path: checksum_of(file) for file in tree if isinstance(file, RepoFile)}
        found |= {name: listed[name] for name in plain if name in listed}
    return found


def _verify(files: dict[str, Path], expected: dict[str, str], repo_id: str) -> None:
    """Compare files with checksums; those that differ are removed from the cache."""
    damaged = []
    for name, right in expected.items():
        file = files[name]
        found = checksum(file, right) if file.is_file() else "none"
        if found != right:
            damaged.append(f"{name} (checksum {found[:12]}, on the Hub {right[:12]})")
            blob = file.parent / file.readlink() if file.is_symlink() else file
            for path in (file.resolve(), blob, file):
                path.unlink(missing_ok=True)
    if damaged:
        raise HubError(
            f"{repo_id} arrived damaged: {', '.join(damaged)}; what is wrong was removed from the "
            "cache: run again to fetch it anew"
        )
