"""What changes the loopback Hub: new repositories, uploads, commits, branches and tags."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

from .routes import API, REPO, Answer, Request, as_json, route
from .store import Commit, File, Refused


@route("POST", r"/api/repos/create")
def create(request: Request) -> Answer:
    asked = request.json
    owner = asked.get("organization") or (request.user.name if request.user else "")
    repo_id = f"{owner}/{asked['name']}"
    private = asked.get("visibility") == "private"
    address = {"url": f"{request.hub.url}/{repo_id}"}  # which the client reads from a 409 too
    request.hub.store.create(repo_id, request.user, private=private, shown=address)
    return as_json(address)


@route("POST", r"/api/validate-yaml")
def validate_yaml(request: Request) -> Answer:
    front = re.match(r"---\n(.*?\n)---\n", request.json["content"], re.DOTALL)
    if front is None:
        return as_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
    return as_json({"errors": [], "warnings": []})


@route("POST", API + r"/preupload/(?P<revision>[^/]+)")
def preupload(request: Request, repo: str, revision: str) -> Answer:
    store = request.hub.store
    proposal = request.query.get("create_pr") == ["1"]
    check = store.readable if proposal else store.writable
    found = check(repo, request.user)
    there = found.commit_at(revision).files
    files = []
    for file in request.json["files"]:
        lfs = store.goes_to_lfs(found, revision, file["path"], file["size"])
        entry = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular"}
        known = there.get(file["path"])
        files.append({**entry, "shouldIgnore": False, "oid": known.etag if known else None})
    return as_json({"files": files})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def batch(request: Request, repo: str) -> Answer:
    hub = request.hub
    hub.store.readable(repo, request.user)
    objects = []
    for wanted in request.json["objects"]:
        entry = dict(wanted)
        if wanted["oid"] not in hub.store.objects:
            upload = {"href": f"{hub.storage_url}/storage/{wanted['oid']}"}
            verify = {"href": f"{hub.url}/{repo}.git/info/lfs/verify"}
            entry["actions"] = {"upload": upload, "verify": verify}
        objects.append(entry)
    return as_json({"transfer": "basic", "objects": objects})


@route("PUT", r"/storage/(?P<sha256>[0-9a-f]{64})")
def upload(request: Request, sha256: str) -> Answer:
    if request.headers.get("Authorization"):
        raise Refused(400, message="Only one auth mechanism allowed")
    if hashlib.sha256(request.body).hexdigest() != sha256:
        raise Refused(400, message="what was uploaded has another SHA-256")
    request.hub.store.objects[sha256] = request.body
    return Answer()


@route("POST", rf"/{REPO}\.git/info/lfs/verify")
def verify(request: Request, repo: str) -> Answer:
    request.hub.store.linked(request.json["oid"], request.json["size"])
    return Answer()


@route("POST", API + r"/commit/(?P<revision>[^/]+)")
def commit(request: Request, repo: str, revision: str) -> Answer:
    store = request.hub.store
    proposal = request.query.get("create_pr") == ["1"]
    found = store.readable(repo, request.user) if proposal else store.writable(repo, request.user)
    if not proposal and revision not in {**found.branches, **found.requests}:
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    head = found.commit_at(revision)
    header, *changes = (json.loads(line) for line in request.body.splitlines())
    if header["value"].get("parentCommit") not in (None, head.oid):
        raise Refused(412, message="A commit has happened since. Please refresh and try again.")
    made = found.add(header["value"]["summary"], _changed(request, head, changes), head.oid)
    shown = {"commitOid": made.oid, "commitUrl": f"{request.hub.url}/{repo}/commit/{made.oid}"}
    if proposal:
        number = len(found.requests) + 1
        found.requests[f"refs/pr/{number}"] = made.oid
        shown["pullRequestUrl"] = f"{request.hub.url}/{repo}/discussions/{number}"
    else:
        names = found.branches if revision in found.branches else found.requests
        names[revision] = made.oid
    return as_json(shown)


def _changed(request: Request, head: Commit, changes: list[dict[str, Any]]) -> dict[str, File]:
    store, files = request.hub.store, dict(head.files)
    for change in changes:
        value = change["value"]
        match change["key"]:
            case "file":
                files[value["path"]] = store.put(base64.b64decode(value["content"]))
            case "lfsFile":
                files[value["path"]] = store.linked(value["oid"], value["size"])
            case "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            case "deletedFolder":
                files = {p: f for p, f in files.items() if not p.startswith(value["path"])}
            case other:
                raise Refused(400, message=f"unknown operation {other}")
    return files


@route("POST DELETE", API + r"/(?P<kind>tag|branch)/(?P<revision>[^/]+)")
def ref(request: Request, repo: str, kind: str, revision: str) -> Answer:
    found = request.hub.store.writable(repo, request.user)
    names = found.tags if kind == "tag" else found.branches
    if request.method == "DELETE":
        if names.pop(revision, None) is None:
            raise Refused(404, "RevisionNotFound", f"no {kind} {revision}")
        return Answer()
    asked = request.json if request.body else {}
    name = asked["tag"] if kind == "tag" else revision
    start = revision if kind == "tag" else asked.get("startingPoint", "main")
    if name in names:
        raise Refused(409, message=f"Reference {name} already exists")
    names[name] = found.commit_at(start).oid
    return Answer()
