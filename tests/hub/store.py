"""What a loopback Hub holds: repositories with commits, branches and tags, LFS objects, users.

Contents are addressed as on the Hub: a regular file by the SHA-1 of its git blob, an LFS file by
its SHA-256, its git blob being the pointer that stands for it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import PurePosixPath

LFS_ABOVE = 10_000_000
ATTRIBUTES = ".gitattributes"
NEW_REPOSITORY = "".join(
    f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n"
    for suffix in ("safetensors", "parquet", "bin")
)


class Refused(Exception):
    """An answer of 4xx: the Hub's error code, a message, further headers and fields of the body."""

    def __init__(
        self,
        status: int,
        code: str | None = None,
        message: str = "",
        headers: Mapping[str, str] | None = None,
        shown: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code
        self.shown = {"error": message, **(shown or {})}


@dataclass(frozen=True)
class File:
    """One file of a commit; `sha256` is set for LFS files alone."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    message: str
    files: dict[str, File]


@dataclass
class Repository:
    id: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)  # users let into a private or gated repository
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    requests: dict[str, str] = field(default_factory=dict)  # refs/pr/N

    def commit_at(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request or commit id."""
        for names in (self.branches, self.tags, self.requests):
            if revision in names:
                return self.commits[names[revision]]
        if revision in self.commits:
            return self.commits[revision]
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def file_at(self, revision: str, path: str) -> tuple[Commit, File]:
        commit = self.commit_at(revision)
        if path not in commit.files:
            raise Refused(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.oid})
        return commit, commit.files[path]

    def add(self, message: str, files: dict[str, File], parent: str | None) -> Commit:
        tree = [(path, files[path].etag) for path in sorted(files)]
        text = json.dumps([self.id, message, tree, parent, len(self.commits)])
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, message, files)
        self.commits[commit.oid] = commit
        return commit


@dataclass
class User:
    name: str
    writes: bool = True


class Store:
    """Everything that outlives the server process; one lock for all of it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # regular files, by git SHA-1
        self.objects: dict[str, bytes] = {}  # LFS files, by SHA-256
        self.users: dict[str, User] = {}  # by token

    def user(self, token: str | None) -> User | None:
        if token is None:
            return None
        if token not in self.users:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return self.users[token]

    def readable(self, repo_id: str, user: User | None, *, contents: bool = False) -> Repository:
        """A repository for this user: to look at, or also to read the `contents` of its files."""
        repo = self.repositories.get(repo_id)
        inside = repo is not None and user is not None and may_read(repo, user)
        if repo is None or (repo.private and not inside):
            # over https a bare 401 means the same; over http the client wants the code
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if contents and repo.gated and not inside:
            message = f"Access to model {repo_id} is restricted"
            raise Refused(403 if user else 401, "GatedRepo", message)
        return repo

    def writable(self, repo_id: str, user: User | None) -> Repository:
        repo = self.readable(repo_id, user)
        if user is None or not may_write(repo_id, user):
            raise Refused(403 if user else 401, message="You don't have the rights to write here")
        return repo

    def create(
        self, repo_id: str, user: User | None, *, private: bool, shown: Mapping[str, str]
    ) -> Repository:
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        if not may_write(repo_id, user):
            raise Refused(403, message=f"You don't have the rights to create {repo_id}")
        if repo_id in self.repositories:
            raise Refused(409, message="You already created this model repo", shown=shown)
        repo = self.repositories[repo_id] = Repository(repo_id, private)
        first = repo.add("initial commit", {ATTRIBUTES: self.put(NEW_REPOSITORY.encode())}, None)
        repo.branches["main"] = first.oid
        return repo

    def put(self, content: bytes) -> File:
        """Keep a regular file."""
        oid = git_sha1(content)
        self.blobs[oid] = content
        return File(oid, len(content))

    def linked(self, sha256: str, size: int) -> File:
        """An LFS file whose contents have been uploaded before."""
        if sha256 not in self.objects or len(self.objects[sha256]) != size:
            raise Refused(400, message=f"LFS pointer to a file that does not exist: {sha256}")
        return File(git_sha1(pointer(sha256, size)), size, sha256)

    def content(self, file: File) -> bytes:
        return self.blobs[file.oid] if file.sha256 is None else self.objects[file.sha256]

    def goes_to_lfs(self, repo: Repository, revision: str, path: str, size: int) -> bool:
        """By size, or by the repository's own .gitattributes."""
        file = repo.commit_at(revision).files.get(ATTRIBUTES)
        lines = self.blobs[file.oid].decode().splitlines() if file else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line.split()]
        name = PurePosixPath(path).name
        return size > LFS_ABOVE or any(fnmatch(name, pattern) for pattern in patterns)


def may_read(repo: Repository, user: User) -> bool:
    return user.name == repo.id.partition("/")[0] or user.name in repo.readers


def may_write(repo_id: str, user: User) -> bool:
    return user.writes and user.name == repo_id.partition("/")[0]


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """What git holds in place of an LFS file."""
    version = "https://git-lfs.github.com/spec/v1"
    return f"version {version}\noid sha256:{sha256}\nsize {size}\n".encode()
