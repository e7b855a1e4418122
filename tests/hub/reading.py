"""What is asked of the loopback Hub without changing anything: repositories, revisions, files."""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Any

from .routes import API, REPO, Answer, Request, as_json, route
from .store import File, Refused, pointer


@route("GET", r"/api/whoami-v2")
def whoami(request: Request) -> Answer:
    if request.user is None:
        raise Refused(401, message="Invalid username or password.")
    return as_json({"type": "user", "name": request.user.name, "orgs": [], "auth": {}})


@route("GET", API)
@route("GET", API + r"/revision/(?P<revision>[^/]+)")
def info(request: Request, repo: str, revision: str = "main") -> Answer:
    found = request.hub.store.readable(repo, request.user)
    commit = found.commit_at(revision)
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    shown: dict[str, Any] = {"id": repo, "sha": commit.oid, "siblings": siblings, "tags": []}
    shown |= {"private": found.private, "gated": "auto" if found.gated else False}
    return as_json(shown)


@route("GET", API + r"/refs")
def refs(request: Request, repo: str) -> Answer:
    found = request.hub.store.readable(repo, request.user)

    def listed(names: dict[str, str], kind: str) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"{kind}{n}", "targetCommit": c} for n, c in names.items()]

    shown = {"branches": listed(found.branches, "refs/heads/"), "converts": []}
    shown |= {"tags": listed(found.tags, "refs/tags/"), "pullRequests": listed(found.requests, "")}
    return as_json(shown)


@route("GET", API + r"/commits/(?P<revision>[^/]+)")
def commits(request: Request, repo: str, revision: str) -> Answer:
    found = request.hub.store.readable(repo, request.user)
    listed, oid = [], found.commit_at(revision).oid
    while oid is not None:
        commit = found.commits[oid]
        day = "2026-01-01T00:00:00.000Z"
        entry = {"id": oid, "title": commit.message, "message": "", "date": day, "authors": []}
        listed.append(entry)
        oid = commit.parent
    return as_json(listed)


# --- files ---------------------------------------------------------------------------------------


@route("GET", API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
def tree(request: Request, repo: str, revision: str, path: str) -> Answer:
    commit = request.hub.store.readable(repo, request.user).commit_at(revision)
    prefix = f"{path}/" if path else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, file in sorted(commit.files.items()):
        if not name.startswith(prefix):
            continue
        *folders, _ = name.split("/")
        for folder in accumulate(folders, "{}/{}".format):
            entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
        entries[name] = _listed(name, file)
    if request.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
        entries = {name: e for name, e in entries.items() if "/" not in name[len(prefix) :]}
    start, page = int(request.query.get("cursor", ["0"])[0]), request.hub.page
    headers = {}
    if start + page < len(entries):
        more = f"{request.hub.url}{request.path}?recursive=true&cursor={start + page}"
        headers["Link"] = f'<{more}>; rel="next"'
    return as_json(list(entries.values())[start : start + page], **headers)


@route("POST", API + r"/paths-info/(?P<revision>[^/]+)")
def paths_info(request: Request, repo: str, revision: str) -> Answer:
    commit = request.hub.store.readable(repo, request.user).commit_at(revision)
    asked = request.json["paths"]
    return as_json([_listed(path, file) for path, file in commit.files.items() if path in asked])


def _listed(path: str, file: File) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "oid": file.oid, "size": file.size}
    if file.sha256:
        size = len(pointer(file.sha256, file.size))
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": size}
    return entry


@route("GET HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request: Request, repo: str, revision: str, path: str) -> Answer:
    """A redirect that carries what is known of the file, to the Hub itself or to its storage."""
    found = request.hub.store.readable(repo, request.user, contents=True)
    commit, file = found.file_at(revision, path)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"'}
    headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
    if file.sha256:
        headers["Location"] = f"{request.hub.storage_url}/storage/{file.sha256}"
        return Answer(302, b"", headers)
    headers["Location"] = f"/api/resolve-cache/models/{repo}/{commit.oid}/{path}"
    return Answer(307, b"", headers)


@route("GET HEAD", rf"/api/resolve-cache/models/{REPO}/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve_cache(request: Request, repo: str, revision: str, path: str) -> Answer:
    found = request.hub.store.readable(repo, request.user, contents=True)
    commit, file = found.file_at(revision, path)
    content = request.hub.store.content(file)
    return _part(request, content, {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"'})


@route("GET HEAD", r"/storage/(?P<sha256>[0-9a-f]{64})")
def storage(request: Request, sha256: str) -> Answer:
    """Not the Hub: signed addresses are open to whoever has them, and no token belongs here."""
    if request.headers.get("Authorization"):
        raise Refused(400, message="Only one auth mechanism allowed")
    if sha256 not in request.hub.store.objects:
        raise Refused(404, message="no such object")
    return _part(request, request.hub.store.objects[sha256], {"ETag": '"storage"'})


def _part(request: Request, content: bytes, headers: dict[str, str]) -> Answer:
    """All of the content, or the range that is asked for."""
    headers = {"Accept-Ranges": "bytes", **headers}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if asked is None:
        if request.method == "HEAD":
            return Answer(200, b"", {**headers, "Content-Length": str(len(content))})
        return Answer(200, content, headers)
    start, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    if start >= len(content):
        raise Refused(416, headers={"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
    return Answer(206, content[start : last + 1], headers)
