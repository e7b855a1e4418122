"""The Hub's checksums: SHA-256 of what is stored by LFS, SHA-1 of the git blob of other files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub.hf_api import RepoFile


def checksum_of(file: RepoFile) -> str:
    """The checksum in a listing of the Hub."""
    return file.blob_id if file.lfs is None else file.lfs.sha256


def checksum(content: Path | bytes, like: str) -> str:
    """The checksum of a file, of the same kind as `like`: 64 hex digits by LFS, 40 by git."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % size)
    if isinstance(content, bytes):
        sha.update(content)
        return sha.hexdigest()
    with content.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()
