"""Artifacts on disk: SAEs, attribution tables and steering recipes of one base model, in a folder.

Everything read is checked before use: format version, names, shapes, dtypes, finiteness, and that
the artifact belongs to the model it is used with. Tensors are safetensors, the rest is JSON. The
files of a site are in `artifact_site`.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from steerrec.artifact_fit import Fit, measure_fit
from steerrec.artifact_parts import without
from steerrec.artifact_recipes import write_recipe
from steerrec.artifact_record import FORMAT_VERSION, KNOWN, minor, read_record, versions
from steerrec.artifact_results import write_result
from steerrec.artifact_site import (
    CONFIG,
    RECORD,
    WEIGHTS,
    SiteArtifact,
    read_entry,
    read_site,
    write_site,
    write_table,
)
from steerrec.attachment import count_firings
from steerrec.attribution import AttributionTable
from steerrec.autoencoder import SparseAutoencoder
from steerrec.card import is_made, make_card
from steerrec.data import Catalogue, Histories
from steerrec.description_files import read_descriptions, write_descriptions
from steerrec.errors import ArtifactError, ArtifactWarning, DataError, SiteError
from steerrec.files import atomic_file, atomic_folder, recover_folder, write_json
from steerrec.hub_names import check_repo_id, is_repo_id, is_sha
from steerrec.neurons import NeuronDescriptions
from steerrec.published import cache_of
from steerrec.recipes import Recipe
from steerrec.recommender import Recommender, fingerprint
from steerrec.serving import scoring_record
from steerrec.sites import Site, get_module
from steerrec.steering import Steering, SteerTransform
from steerrec.untrusted import json_able, open_inside, plain_name, read_json, shown

if TYPE_CHECKING:
    from steerrec.pulling import Snapshot
    from steerrec.pushing import Pushed

__all__ = [
    "CONFIG",
    "FORMAT_VERSION",
    "RECORD",
    "WEIGHTS",
    "Artifact",
    "Fit",
    "SiteArtifact",
    "load_artifact",
    "load_descriptions",
    "save_card",
    "save_descriptions",
    "save_result",
    "save_site",
    "save_steering",
    "save_table",
]

logger = logging.getLogger(__name__)

CARD = "README.md"
CATALOGUE = "catalogue.parquet"
_COMPARED = {
    "class": "class",
    "width": "width",
    "items": "number of items",
    "model_sha256": "weights",
    "config_sha256": "configuration",
}
_LATER = "config_sha256"  # artifacts from before it was recorded do without


@dataclass
class Artifact:
    """SAEs, attribution tables and steering recipes of one base model.

    Attributes
    ----------
    base_model
        `Recommender.describe()` of the model, and its `fingerprint`s by site folder.
    sites
        By folder name.
    data
        How the interactions were read, the default of later commands.
    items
        The catalogue, where the base model is a checkpoint that does not hold its items.
    about
        What only people know, for the card: `datasets`, a list of names, and `license`.
    unknown
        Keys of the record that a newer steerrec wrote; kept when saved.
    """

    base_model: dict[str, Any]
    sites: dict[str, SiteArtifact]
    data: dict[str, Any] = field(default_factory=dict)
    items: Catalogue | None = None
    about: dict[str, Any] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        rec: Recommender,
        sae: SparseAutoencoder,
        *,
        site: Site | None = None,
        training: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        items: Catalogue | None = None,
    ) -> Artifact:
        """A new artifact with one SAE for a recommender."""
        site = site or rec.site
        known = {"adapter": type(rec).__name__, "source": None, **rec.describe()}
        base = {
            **known,
            "scoring": scoring_record(rec),
            "fingerprint": {site.folder: fingerprint(rec, site)},
        }
        here = SiteArtifact(site, sae, dict(training or {}))
        return cls(base, {site.folder: here}, dict(data or {}), items)

    def add(
        self,
        rec: Recommender,
        sae: SparseAutoencoder,
        *,
        site: Site | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> SiteArtifact:
        """Add an SAE for another site of the same model.

        Raises
        ------
        ArtifactError
            If the artifact is of another model, or has an SAE for this site.
        """
        site = site or rec.site
        self.refuse_site(site)
        self.check(rec)
        here = SiteArtifact(site, sae, dict(training or {}))
        self.base_model["fingerprint"][site.folder] = fingerprint(rec, site)
        self.sites[site.folder] = here
        return here

    def refuse_site(self, site: Site) -> None:
        """Raise ArtifactError if there is an SAE for this site already."""
        if site.folder in self.sites or any(here.site == site for here in self.sites.values()):
            raise ArtifactError(f"the artifact already holds an SAE at {site.name}")

    def at(self, name: str | None = None) -> SiteArtifact:
        """The site with this module path or folder name; the only one there is by default.

        Raises
        ------
        ArtifactError
            If there is none, or several; the message lists those that there are.
        """
        found = [
            here for folder, here in self.sites.items() if name in (None, folder, here.site.path)
        ]
        if len(found) == 1:
            return found[0]
        there = ", ".join(f"{here.site.name} ({folder})" for folder, here in self.sites.items())
        if not found:
            raise ArtifactError(f"the artifact has no site {name!r}; it has {there}")
        at = "" if name is None else f" at {name!r}"
        raise ArtifactError(
            f"the artifact has {len(found)} sites{at}; choose one by path or by folder (--site): "
            f"{there}"
        )

    def transform(
        self,
        steering: Recipe | str | None = None,
        *,
        contrast: str = "popularity",
        site: str | None = None,
    ) -> SteerTransform:
        """Steering as a pure module: user vectors [B, H] to [B, H], without hook or host model.

        `steering` is a recipe, or the name of one saved in the artifact; with none given it is
        the PopSteer rule on the table of `contrast`.
        """
        here = self.at(site)
        if isinstance(steering, str):
            steering = here.recipe(steering)
        return SteerTransform(here.sae, steering or Steering.popsteer(here.table(contrast)))

    def differences(self, rec: Recommender) -> list[str]:
        """In what a model differs from the one that the artifact was made for; empty if in nothing.

        Compared are class, width, number of items, configuration and all weights; not versions
        of packages.
        """
        found = fingerprint(rec)
        recorded = self.base_model["fingerprint"].values()
        return [
            word
            for key, word in _COMPARED.items()
            if any(mark.get(key) != found[key] for mark in recorded if key in mark or key != _LATER)
        ]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | Snapshot,
        *,
        rec: Recommender | None = None,
        strict: bool = True,
        **options: Any,
    ) -> Artifact:
        """The same as `load_artifact`, by the name that it has in other libraries."""
        return load_artifact(path, rec=rec, strict=strict, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> Pushed:
        """Publish the artifact on the Hub in one commit.

        Parameters
        ----------
        repo_id
            ``org/name``.
        **options
            Those of `steerrec.push`: revision, token, private, create_pr, commit_message, tag,
            endpoint, dry_run, rec.
        """
        from steerrec.pushing import push

        with TemporaryDirectory() as folder:
            self.save(Path(folder) / "artifact")
            return push(Path(folder) / "artifact", repo_id, **options)

    def load_base_model(
        self, *, device: str = "cpu", strict: bool = True, **hub: Any
    ) -> Recommender:
        """The model that the artifact was made for, from the Hub, at the commit that is recorded.

        Parameters
        ----------
        device
            Where the model goes.
        strict
            As for `check`.
        **hub
            Options of `steerrec.pull`: token, cache_dir, local_files_only, endpoint.

        Raises
        ------
        ArtifactError
            If no commit on the Hub is recorded (a recorded path or function is never opened on the
            artifact's word), or what is there is another model.
        HubError
            If it cannot be had.
        """
        from steerrec.loading import load_recommender
        from steerrec.pulling import pull

        repo_id, revision = self.base_model.get("repo_id"), self.base_model.get("revision")
        if repo_id is None:
            raise ArtifactError(
                f"the artifact was made for the model at {shown(self._source(), 1000)}, "
                "which is not on the Hub: load that model yourself"
            )
        if not is_sha(revision):
            raise ArtifactError(
                f"the artifact names {shown(revision)} as the revision of its base model; expected "
                "the id of a commit, 40 hex digits"
            )
        rec = load_recommender(
            pull(check_repo_id(repo_id), revision=revision, **hub), device=device
        )
        self.check(rec, strict=strict)
        return rec

    def check(self, rec: Recommender, *, strict: bool = True) -> None:
        """Raise ArtifactError unless the artifact was made for this very model.

        With ``strict=False`` it is enough that every site is there and gives vectors of the width
        that its SAE reads, for which one short history is scored.
        """
        for folder, here in self.sites.items():
            made_for = _description(self.base_model["fingerprint"][folder])
            try:
                get_module(rec.model, here.site.path)
                if not strict:
                    count_firings(rec, here.site, width=here.sae.d_in)
            except SiteError as error:
                raise ArtifactError(f"the artifact was made for {made_for}: {error}") from error
        differing = self.differences(rec) if strict else []
        if differing:
            raise ArtifactError(
                f"the artifact was made for {made_for}, this is {_description(fingerprint(rec))}: "
                f"other {' and '.join(differing)}; use the model that it was made for, continue "
                "its SAE on this one (attach --warm-start), or go on anyway with strict=False "
                "(--no-strict)"
            )
        held = self.items
        if strict and held is not None and not held.item_ids.equals(rec.catalogue.item_ids):
            raise ArtifactError(
                "the artifact was made for a model whose items have other ids, or are in another "
                "order; leave out --item-map, or give the one that it was made with"
            )

    def measure_fit(
        self, rec: Recommender, histories: Histories, *, site: str | None = None
    ) -> Fit:
        """How well the SAE of a site reconstructs the user vectors of a model.

        See `Fit` for what is measured and the rule by which it fits.
        """
        here = self.at(site)
        return measure_fit(rec, histories, here)

    def save(self, path: str | Path) -> None:
        """Write the whole artifact; an existing one at `path` is replaced, never mixed with.

        Only a card that was edited by hand stays.
        """
        edited = _edited_card(Path(path))
        with atomic_folder(path) as folder:
            self._write_record(folder)
            if self.items is not None:
                self.items.write(folder / CATALOGUE)
            (folder / CARD).write_text(edited or make_card(self), encoding="utf-8")
            for name, here in self.sites.items():
                write_site(folder / plain_name(name, "site folder"), here, self._source())

    def _write_record(self, folder: Path) -> None:
        record = {
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model,
            "data": self.data,
            "about": self.about,
            "sites": {
                name: {"site": here.site.to_dict(), "training": here.training}
                | here.unknown.get(RECORD, {})
                for name, here in self.sites.items()
            },
            "versions": versions(),
        }
        write_json(folder / RECORD, json_able(record | self.unknown))
        read_json(folder / RECORD, folder)  # what could not be read again is not left there

    def _source(self) -> object:
        return self.base_model.get("source")


def load_artifact(
    path: str | Path | Snapshot,
    *,
    rec: Recommender | None = None,
    strict: bool = True,
    histories: Histories | None = None,
    root: str | Path | None = None,
    **hub: Any,
) -> Artifact:
    """Read an artifact folder, checking everything in it.

    Parameters
    ----------
    path
        The folder, or the id of a Hub repository.
    rec
        The model that it is to be used with; its fingerprint is compared.
    strict
        Whether another model than the recorded one is an error.
    histories
        With ``strict=False``, training histories: on another model the FVU of every SAE is then
        measured, with a warning where it no longer fits (`Fit`).
    root
        Where files that are links may lead; the folder itself by default, and the Hub's cache for
        what was pulled.
    **hub
        Options of `steerrec.pull` for a Hub repository: revision, token, cache_dir,
        local_files_only, subfolder, endpoint.

    Raises
    ------
    ArtifactError
        If a file is missing or damaged, or the artifact belongs to another model.
    HubError
        If there is no such folder here, and no such repository that can be had.

    Warns
    -----
    ArtifactWarning
        If a newer steerrec wrote what this one does not know (it is kept by `Artifact.save`), or
        an SAE no longer fits.
    """
    where: str | Path | Snapshot = path
    recover_folder(Path(path))
    if hub or (is_repo_id(str(path)) and not Path(path).exists()):
        from steerrec.pulling import local_folder

        where = local_folder(path, **hub)
    folder = Path(where)
    if not isinstance(where, str | Path):  # files of the Hub's client are links into its cache
        root = root or cache_of(folder)
    artifact, newer = _read(folder, Path(root or folder))
    if newer:
        warnings.warn(newer, ArtifactWarning, stacklevel=2)
    if rec is None:
        return artifact
    artifact.check(rec, strict=strict)
    if not strict and histories is not None and artifact.differences(rec):
        for name, here in artifact.sites.items():
            fit = measure_fit(rec, histories, here)
            if not fit.fits:
                warnings.warn(f"the SAE at {here.site.name}: {fit}", ArtifactWarning, stacklevel=2)
            logger.info("the SAE in %s: %s", name, fit)
    return artifact


def _read(folder: Path, root: Path) -> tuple[Artifact, str]:
    """The artifact, and what is to be said of what a newer steerrec wrote."""
    record = read_record(folder, root)
    marks = record["base_model"]["fingerprint"]
    sites = {name: read_site(folder / name, root, entry) for name, entry in record["sites"].items()}
    for name, here in sites.items():
        if marks[name].get("site", here.site.path) != here.site.path:
            raise ArtifactError(
                f"{folder / RECORD}: site folder {name!r} is at {here.site.name}, its fingerprint "
                f"at {shown(marks[name]['site'])}"
            )
    artifact = Artifact(
        record["base_model"],
        sites,
        record.get("data", {}),
        _read_catalogue(folder, root),
        record.get("about", {}),
        without(record, KNOWN),
    )
    unknown = [f"{shown(key)} in {RECORD}" for key in artifact.unknown]
    for here in sites.values():
        unknown += here.passed_over()
    newer = []
    if minor(record["format_version"]) > minor(FORMAT_VERSION):
        newer.append(f"its format {record['format_version']} is newer than {FORMAT_VERSION}")
    if unknown:
        newer.append(f"not known here, passed over, and kept when saved: {', '.join(unknown)}")
    return artifact, f"{folder}: {'; '.join(newer)}" if newer else ""


def _read_catalogue(folder: Path, root: Path) -> Catalogue | None:
    file = folder / CATALOGUE
    if not file.is_symlink() and not file.exists():
        return None
    open_inside(file, root).close()
    try:
        return Catalogue.read(file)
    except DataError as error:
        raise ArtifactError(str(error)) from error


def save_table(path: str | Path, site: Site, table: AttributionTable) -> Path:
    """Add an attribution table to an artifact on disk, or replace the one of its contrast."""
    return _refreshed(path, write_table(_site_folder(path, site, len(table)), table))


def save_steering(path: str | Path, site: Site, steering: Recipe) -> Path:
    """Add a steering recipe to an artifact on disk, or replace the one of its name."""
    folder = _site_folder(path, site, steering.latents)
    d_in = read_json(folder / CONFIG, Path(path)).get("d_in")
    return _refreshed(path, write_recipe(folder, steering, d_in if type(d_in) is int else 0))


def save_result(
    path: str | Path,
    site: Site,
    name: str,
    found: Mapping[str, Any],
    *,
    picture: bytes | None = None,
) -> Path:
    """Add what was measured to an artifact on disk, or replace the result of this name.

    Parameters
    ----------
    path
        The artifact's folder.
    site
        The site that was steered.
    name
        `sweep` or `compare` for what the card is to show; others are kept too.
    found
        JSON-able.
    picture
        A PNG file that shows it.
    """
    folder = _site_folder(path, site)
    return _refreshed(path, write_result(folder, name, found, picture))


def save_descriptions(path: str | Path, site: Site, found: NeuronDescriptions) -> Path:
    """Keep descriptions of neurons in an artifact on disk, so that they are found out once.

    They quote real histories: `push` leaves them out, as does `Artifact.save`.
    """
    return write_descriptions(_site_folder(path, site, len(found)), found)


def load_descriptions(
    path: str | Path, site: Site, table: AttributionTable
) -> NeuronDescriptions | None:
    """What `save_descriptions` kept of the neurons of a site; None where there is nothing.

    Raises
    ------
    ArtifactError
        If it is damaged.
    """
    folder = _site_folder(path, site, len(table))
    return read_descriptions(folder, Path(path), table)


def save_card(
    path: str | Path,
    *,
    datasets: Sequence[str] | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> bool:
    """Make the card of an artifact on disk anew from what the artifact holds.

    Parameters
    ----------
    path
        The artifact's folder.
    datasets, license
        What the front matter says of them from now on; as before if not given.
    overwrite
        Whether to replace a card that was edited by hand.

    Returns
    -------
    bool
        Whether the card was written; False where an edited one was left as it is.
    """
    artifact = load_artifact(path)
    if datasets is not None:
        artifact.about["datasets"] = list(datasets)
    if license is not None:
        artifact.about["license"] = license
    text = make_card(artifact)
    if datasets is not None or license is not None:
        artifact._write_record(Path(path))
    if not overwrite and _edited_card(Path(path)) is not None:
        return False
    with atomic_file(Path(path) / CARD) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return True


def _refreshed(path: str | Path, file: Path) -> Path:
    """The file, with a card that tells of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ArtifactWarning)  # said when the artifact was loaded
        save_card(path)
    return file


def _edited_card(folder: Path) -> str | None:
    """The card in a folder, if there is one and it is not as steerrec made it."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    return None if is_made(text) else text


def save_site(
    path: str | Path,
    rec: Recommender,
    sae: SparseAutoencoder,
    *,
    site: Site | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Add an SAE for another site of the same model to an artifact on disk.

    Everything else in the folder stays, a card that was edited by hand included; see
    `Artifact.add`.
    """
    artifact = load_artifact(path)
    site = site or rec.site
    here = artifact.add(rec, sae, site=site, training=training)
    with atomic_folder(path) as folder:
        shutil.copytree(Path(path).resolve(), folder, symlinks=True, dirs_exist_ok=True)
        if _edited_card(folder) is None:
            (folder / CARD).write_text(make_card(artifact), encoding="utf-8")
        write_site(folder / site.folder, here, artifact._source())
        artifact._write_record(folder)


def _site_folder(path: str | Path, site: Site, latents: int | None = None) -> Path:
    """Where an artifact on disk holds an SAE, of so many latents, for the site."""
    folder = Path(path)
    name: str
    for name, entry in read_record(folder, folder)["sites"].items():
        if read_entry(folder / name, entry)[0] != site:
            continue
        found = read_json(folder / name / CONFIG, folder).get("d_sae")
        if latents is not None and found != latents:
            raise ArtifactError(
                f"{folder / name} holds an SAE of {found} latents; what is to be added is for "
                f"{latents}"
            )
        return folder / name
    raise ArtifactError(f"{folder} holds no SAE at {site.name}")


def _description(mark: Mapping[str, Any]) -> str:
    """A model in a few words, from its fingerprint."""
    return (
        f"a {str(mark.get('class'))[:80]} of width {mark.get('width')} with {mark.get('items')} "
        f"items and weights {str(mark.get('model_sha256'))[:12]}"
    )
