"""From this machine to the Hub: a MODEL or ARTIFACT folder in one commit, whole or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from steerrec import __version__
from steerrec.card import is_made, make_card
from steerrec.checksums import checksum, checksum_of
from steerrec.errors import HubError
from steerrec.hub_client import client, hub_errors, patiently
from steerrec.hub_names import check_repo_id, check_revision, is_sha
from steerrec.published import (
    CARD,
    Kind,
    base_model_of,
    belongs,
    cache_of,
    contents,
    remember,
    size_of,
    texts,
)
from steerrec.pulling import Snapshot, check_folder
from steerrec.recommender import Recommender


@dataclass(frozen=True)
class Pushed:
    """What a push did, or would do.

    Attributes
    ----------
    repo_id
        The repository.
    kind
        What was pushed.
    files
        Sizes of the files in bytes, by name.
    revision
        Id of the commit that holds them; None if nothing was sent.
    url
        Where to look at it: the repository, or the pull request.
    base_model
        Repository and commit that an ARTIFACT names as its base model; None if it names none, so
        that whoever pulls it has to know the model.
    card_kept
        Whether the card on the Hub, which somebody edited by hand, was left as it is.
    """

    repo_id: str
    kind: Kind
    files: dict[str, int]
    revision: str | None = None
    url: str | None = None
    base_model: dict[str, str] | None = None
    card_kept: bool = False


def push(
    folder: str | Path | Snapshot,
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    tag: str | None = None,
    endpoint: str | None = None,
    dry_run: bool = False,
    rec: Recommender | None = None,
    card: str | None = None,
    overwrite_card: bool | Callable[[], bool] = False,
) -> Pushed:
    """Publish a MODEL or ARTIFACT folder on the Hub, in one commit.

    The folder is loaded first: nothing is pushed that cannot be read. Files of the format that the
    folder does not have (any more) are deleted in the same commit, others stay as they are. A push
    that was cut off can be repeated: the repository has all of it or nothing.

    Parameters
    ----------
    folder
        A MODEL or ARTIFACT folder. A MODEL remembers where it was pushed to, so that artifacts made
        from this folder name it as their base model.
    repo_id
        ``org/name``; made if it does not exist.
    revision
        Branch to push to; ``main`` by default, and made if it does not exist.
    token
        A token, or None for that of the login.
    private
        Whether a new repository is private. An existing public one is refused if it should be.
    create_pr
        Propose the commit as a pull request instead; anybody may.
    commit_message
        One line about the push.
    tag
        Name to give the commit. Tags are not moved.
    endpoint
        Address of the Hub; that of HF_ENDPOINT by default.
    dry_run
        Only say what would be pushed; nothing is sent, nor asked.
    rec
        The base model of an ARTIFACT, loaded from the Hub or from a folder that was pushed to it:
        its id and commit are recorded, once it is found to be the very model.
    card
        Text of README.md. By default it is the folder's own if that was edited by hand, and for an
        ARTIFACT else one that is made anew (`steerrec.card`).
    overwrite_card
        Whether to replace a card on the Hub that was edited by hand, by any but `card`; a function
        is asked if there is one.

    Raises
    ------
    HubError
        If the Hub refuses, or cannot be reached.
    ArtifactError, ModelError
        If the folder cannot be loaded, or `rec` is another model.
    """
    check_repo_id(repo_id)
    branch = check_revision(revision or constants.DEFAULT_REVISION)
    if is_sha(branch):
        raise HubError(f"{branch} is a commit; expected a branch to push to")
    if tag is not None and (is_sha(check_revision(tag)) or create_pr):
        raise HubError("a tag has a plain name, and a pull request gets none")
    folder = Path(folder)
    kind = check_folder(folder)
    base_model = _base_model(folder, kind, rec)
    overwrite_card = overwrite_card if card is None else True
    if card is None and kind == "ARTIFACT":
        card = _card(folder, repo_id, base_model)
    files = contents(folder, kind, base_model=base_model, card=card)
    _refuse_secrets(files, token)
    sizes = {name: size_of(file) for name, file in files.items()}
    pushed = Pushed(repo_id, kind, sizes, base_model=base_model_of(files))
    if dry_run:
        return pushed
    message = commit_message or f"{kind} pushed by steerrec {__version__}"
    api = client(endpoint, token)
    sending = _Push(api, repo_id, kind, files, branch, message, tag, overwrite_card)
    with hub_errors(repo_id, revision=branch, endpoint=endpoint, token=token), _without_advice():
        if create_pr:  # a try whose answer was lost could not be told from none: only one
            return sending.propose(pushed)
        done = patiently(lambda: sending.commit(pushed, private))
    if kind == "MODEL" and done.revision is not None and cache_of(folder) is None:
        remember(folder, repo_id, done.revision)
    return done


@dataclass
class _Push:
    """One push; every step can be taken again, and sees what was done before."""

    api: HfApi
    repo_id: str
    kind: Kind
    files: dict[str, Path | bytes]
    branch: str
    message: str
    tag: str | None
    overwrite_card: bool | Callable[[], bool]
    card_kept: bool = False

    def commit(self, pushed: Pushed, private: bool | None) -> Pushed:
        try:
            public = not self.api.repo_info(self.repo_id).private
        except RepositoryNotFoundError:
            self.api.create_repo(self.repo_id, private=private, exist_ok=True)
        else:
            if private and public:
                raise HubError(
                    f"{self.repo_id} exists and is public; make it private on the Hub first"
                )
        if self.branch != constants.DEFAULT_REVISION and not self.branch.startswith("refs/"):
            self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)
        head = self._head()
        operations = self._operations(head)
        tags = {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.repo_id).tags}
        if self.tag in tags and (operations or tags[self.tag] != head):
            raise HubError(
                f"{self.repo_id} has a tag {self.tag!r} already, of another commit; tags are not "
                "moved: choose another"
            )
        if operations:
            head = self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=self.message,
                revision=self.branch,
                parent_commit=head,
            ).oid
        if self.tag is not None and self.tag not in tags:
            self.api.create_tag(self.repo_id, tag=self.tag, revision=head, exist_ok=True)
        url = f"{self.api.endpoint}/{self.repo_id}"
        return replace(pushed, revision=head, url=url, card_kept=self.card_kept)

    def propose(self, pushed: Pushed) -> Pushed:
        operations = self._operations(self._head())
        if not operations:
            raise HubError(f"{self.repo_id} has all of this at {self.branch!r}: nothing to propose")
        made = self.api.create_commit(
            self.repo_id,
            operations,
            commit_message=self.message,
            revision=self.branch,
            create_pr=True,
        )
        return replace(pushed, revision=made.oid, url=made.pr_url, card_kept=self.card_kept)

    def _head(self) -> str:
        sha = self.api.repo_info(self.repo_id, revision=self.branch).sha
        if sha is None or not is_sha(sha):
            raise HubError(f"{self.repo_id} at {self.branch!r} is commit {sha!r}; expected a sha")
        return sha

    def _operations(self, head: str) -> list[CommitOperationAdd | CommitOperationDelete]:
        """What makes the files of the format at a commit those of this push."""
        tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=head)
        there = {file.path: checksum_of(file) for file in tree if isinstance(file, RepoFile)}
        gone = [path for path in there if belongs(path, self.kind) and path not in self.files]
        changed = {
            path: file
            for path, file in self.files.items()
            if path not in there or checksum(file, there[path]) != there[path]
        }
        if CARD in changed and CARD in there and not self._may_replace_card(head):
            del changed[CARD]
            self.card_kept = True
        return [
            *(CommitOperationAdd(path, file) for path, file in changed.items()),
            *(CommitOperationDelete(path) for path in gone if path != CARD),
        ]

    def _may_replace_card(self, head: str) -> bool:
        """Whether the card on the Hub was made by steerrec, or may be replaced all the same."""
        if self.overwrite_card is True:
            return True
        with TemporaryDirectory() as folder:
            there = self.api.hf_hub_download(self.repo_id, CARD, revision=head, local_dir=folder)
            text = Path(there).read_bytes().decode(errors="replace")
        if is_made(text):
            return True
        if callable(self.overwrite_card):  # asked once, however often the push is tried
            self.overwrite_card = self.overwrite_card()
        return self.overwrite_card


def _card(folder: Path, repo_id: str, base_model: dict[str, Any] | None) -> str | None:
    """The card of an ARTIFACT as it is to be on the Hub; None if its own was edited by hand."""
    from steerrec.artifacts import load_artifact

    own = folder / CARD
    if own.is_file() and not is_made(own.read_text(encoding="utf-8", errors="replace")):
        return None
    artifact = load_artifact(folder, root=cache_of(folder))
    artifact.base_model |= base_model or {}
    return make_card(artifact, repo_id=repo_id)


def _base_model(folder: Path, kind: Kind, rec: Recommender | None) -> dict[str, Any] | None:
    """What to record of the base model of an ARTIFACT, if `rec` is that."""
    if rec is None:
        return None
    if kind == "MODEL":
        raise HubError(f"{folder} is a MODEL; a base model goes with an ARTIFACT")
    from steerrec.artifacts import load_artifact

    load_artifact(folder, rec=rec, root=cache_of(folder))
    found = rec.describe()
    if not found.get("repo_id"):
        raise HubError(
            f"the model at {found.get('source')!r} is not from the Hub, so that others could not "
            "get it; push it first"
        )
    repo_id, revision = found["repo_id"], found["revision"]
    return {"repo_id": repo_id, "revision": revision, "source": repo_id}


def _refuse_secrets(files: dict[str, Path | bytes], token: str | bool | None) -> None:
    secret = token if isinstance(token, str) else get_token()
    for name, text in texts(files):
        if secret and secret in text:
            raise HubError(f"{name} holds the token that this login uses; remove it from there")


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence the client's advice to publish tables as data sets, and on what a card should say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
