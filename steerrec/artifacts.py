"""Artifacts on disk: SAEs, attribution tables and steering recipes of one base model, in a folder.

Everything read is checked before use: format version, names, shapes, dtypes, finiteness, and that
the artifact belongs to the model it is used with. Tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steerrec.attribution import AttributionTable
from steerrec.autoencoder import SparseAutoencoder
from steerrec.errors import ArtifactError, SiteError
from steerrec.files import atomic_file, atomic_folder, recover_folder, write_json
from steerrec.recommender import Recommender, fingerprint
from steerrec.sites import Site
from steerrec.steering import Steering, SteerTransform

FORMAT_VERSION = 1
RECORD = "steerrec.json"
WEIGHTS = "sae_weights.safetensors"
CONFIG = "cfg.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NEEDED_COLUMNS = ("cohens_d", "std_a", "std_b")
_MAX_HEADER = 25_000_000
_PACKAGES = ("steerrec", "torch", "transformers", "safetensors", "numpy", "polars")


@dataclass
class SiteArtifact:
    """What an artifact holds for one site.

    Attributes
    ----------
    site
        Where the SAE belongs.
    sae
        The SAE.
    training
        JSON-able summary of how it was trained and how well it reconstructs.
    tables
        Attribution tables by contrast.
    steerings
        Steering recipes by name.
    """

    site: Site
    sae: SparseAutoencoder
    training: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, AttributionTable] = field(default_factory=dict)
    steerings: dict[str, Steering] = field(default_factory=dict)

    def table(self, contrast: str) -> AttributionTable:
        """The attribution table of a contrast.

        Raises
        ------
        ArtifactError
            If there is none; the message lists those that there are.
        """
        if contrast not in self.tables:
            there = ", ".join(self.tables) or "none yet"
            raise ArtifactError(
                f"no attribution table for contrast {contrast!r} (there: {there}); make it with "
                "`steerrec score`"
            )
        return self.tables[contrast]

    def recipe(self, name: str) -> Steering:
        """The steering recipe of this name.

        Raises
        ------
        ArtifactError
            If there is none; the message lists those that there are.
        """
        if name not in self.steerings:
            there = ", ".join(self.steerings) or "none yet"
            raise ArtifactError(
                f"no steering recipe {name!r} (there: {there}); save one with "
                "`steerrec steer --save NAME`"
            )
        return self.steerings[name]


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
    """

    base_model: dict[str, Any]
    sites: dict[str, SiteArtifact]
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        rec: Recommender,
        sae: SparseAutoencoder,
        *,
        site: Site | None = None,
        training: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """A new artifact with one SAE for a recommender."""
        site = site or rec.site
        known = {"adapter": type(rec).__name__, "source": None, **rec.describe()}
        base = {**known, "fingerprint": {site.folder: fingerprint(rec, site)}}
        here = SiteArtifact(site, sae, dict(training or {}))
        return cls(base, {site.folder: here}, dict(data or {}))

    def at(self, path: str | None = None) -> SiteArtifact:
        """The site with this module path; the only one there is by default."""
        found = [s for s in self.sites.values() if path in (None, s.site.path)]
        if len(found) != 1:
            there = ", ".join(s.site.path for s in self.sites.values())
            raise ArtifactError(
                f"{len(found)} sites match {path!r}; this artifact has {there}; name one of them"
            )
        return found[0]

    def transform(
        self,
        steering: Steering | str | None = None,
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

    def check(self, rec: Recommender, *, strict: bool = True) -> None:
        """Raise ArtifactError unless the artifact was made for this very model.

        With ``strict=False`` only the widths must fit.
        """
        for folder, here in self.sites.items():
            recorded = self.base_model["fingerprint"][folder]
            try:
                found = fingerprint(rec, here.site)
            except SiteError as error:
                raise ArtifactError(
                    f"the artifact was made for a {recorded.get('class')}: {error}"
                ) from error
            for key in ("class", "width", "items", "model_sha256"):
                if recorded.get(key) == found[key] or (not strict and key != "width"):
                    continue
                raise ArtifactError(
                    f"the artifact was made for a {recorded.get('class')} "
                    f"({_short(recorded.get(key))}), this is a {found['class']} "
                    f"({_short(found[key])}): {key} differs; use the model that it was made for, "
                    "or load with strict=False to go on anyway"
                )

    def save(self, path: str | Path) -> None:
        """Write the whole artifact; an existing one at `path` is replaced, never mixed with."""
        with atomic_folder(path) as folder:
            write_json(folder / RECORD, self._record())
            (folder / "README.md").write_text(self._card(), encoding="utf-8")
            for name, here in self.sites.items():
                _write_site(folder / name, here, self.base_model)

    def _record(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model,
            "data": self.data,
            "sites": {
                name: {"site": here.site.to_dict(), "training": here.training}
                for name, here in self.sites.items()
            },
            "versions": _versions(),
        }

    def _origin(self) -> str:
        adapter, source = (self.base_model.get(key) for key in ("adapter", "source"))
        return f"{adapter}" if source is None else f"{adapter} `{source}`"

    def _card(self) -> str:
        lines = [
            "---",
            "library_name: steerrec",
            "tags: [recommendation, sparse-autoencoder, steering]",
            "---",
            "",
            "# Sparse autoencoder for a sequential recommender",
            "",
            f"Base model: {self._origin()}.",
            "",
            "| site | latents | k | FVU | L0 | dead share |",
            "|---|---|---|---|---|---|",
        ]
        for here in self.sites.values():
            found = here.training.get("reconstruction", {})
            numbers = " | ".join(_number(found.get(key)) for key in ("fvu", "l0", "dead_share"))
            lines.append(f"| `{here.site.path}` | {here.sae.d_sae} | {here.sae.k} | {numbers} |")
        load = [
            "",
            "```python",
            "import steerrec",
            "",
            'artifact = steerrec.load_artifact("path/to/this/folder")',
            "transform = artifact.transform()  # transform(user_vectors, alpha) -> [B, H]",
            "```",
            "",
        ]
        return "\n".join(lines + load)


def load_artifact(
    path: str | Path, *, rec: Recommender | None = None, strict: bool = True
) -> Artifact:
    """Read an artifact folder, checking everything in it.

    Parameters
    ----------
    path
        The folder.
    rec
        The model that it is to be used with; its fingerprint is compared.
    strict
        Whether another model than the recorded one is an error.

    Raises
    ------
    ArtifactError
        If a file is missing or damaged, or the artifact belongs to another model.
    """
    folder = Path(path)
    recover_folder(folder)
    record = _read_json(folder / RECORD)
    found = record.get("format_version")
    if "format_version" not in record:
        raise ArtifactError(
            f"{folder} is not an artifact (its {RECORD} has no format version); expected a folder "
            "written by `steerrec attach`"
        )
    if found != FORMAT_VERSION:
        raise ArtifactError(
            f"{folder} has format version {found!r}; this steerrec reads {FORMAT_VERSION}: "
            "upgrade steerrec"
        )
    try:
        sites = {name: _read_site(folder, name, entry) for name, entry in record["sites"].items()}
        artifact = Artifact(record["base_model"], sites, record.get("data", {}))
        missing = set(sites) - set(artifact.base_model["fingerprint"])
    except (KeyError, TypeError, AttributeError, SiteError) as error:
        raise ArtifactError(f"{folder / RECORD} is not complete: {error!r}") from error
    if missing or not sites:
        raise ArtifactError(f"{folder / RECORD} names no site, or one without a fingerprint")
    if rec is not None:
        artifact.check(rec, strict=strict)
    return artifact


def save_table(path: str | Path, site: Site, table: AttributionTable) -> Path:
    """Add an attribution table to an artifact on disk, or replace the one of its contrast."""
    file = _part(_site_folder(path, site, len(table)), "attribution", table.name)
    return _write_table(file, table)


def save_steering(path: str | Path, site: Site, steering: Steering) -> Path:
    """Add a steering recipe to an artifact on disk, or replace the one of its name."""
    file = _part(_site_folder(path, site, len(steering.shift)), "steering", steering.name)
    return _write_steering(file, steering)


def _site_folder(path: str | Path, site: Site, latents: int) -> Path:
    """Where an artifact on disk holds an SAE of so many latents for the site."""
    folder = Path(path) / site.folder
    found = _read_json(folder / CONFIG).get("d_sae")
    if found != latents:
        raise ArtifactError(
            f"{folder} holds an SAE of {found} latents; what is to be added is for {latents}"
        )
    return folder


def _part(folder: Path, kind: str, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ArtifactError(
            f"{name!r} cannot be a file name; expected letters, digits, dots, dashes, underscores"
        )
    return folder / kind / f"{name}.safetensors"


def _write_site(folder: Path, here: SiteArtifact, base_model: Mapping[str, Any]) -> None:
    metadata = {"model_name": base_model.get("source"), "hook_name": here.site.path}
    write_json(folder / CONFIG, {**here.sae.config(), "metadata": metadata})
    weights = here.sae.state_dict()
    save_file({k: v.float().contiguous() for k, v in weights.items()}, folder / WEIGHTS)
    for table in here.tables.values():
        _write_table(_part(folder, "attribution", table.name), table)
    for steering in here.steerings.values():
        _write_steering(_part(folder, "steering", steering.name), steering)


def _write_table(file: Path, table: AttributionTable) -> Path:
    # one key: safetensors writes several in no fixed order, and equal tables should be equal files
    metadata = {"table": json.dumps({"contrast": table.contrast, "provenance": table.provenance})}
    columns = {name: values.float().contiguous() for name, values in table.columns.items()}
    with atomic_file(file) as temporary:
        save_file(columns, temporary, metadata)
    return file


def _write_steering(file: Path, steering: Steering) -> Path:
    recipe = {
        "operation": "shift",
        "alpha": steering.alpha,
        "splice": steering.splice,
        "name": steering.name,
        "provenance": dict(steering.provenance),
    }
    shift = steering.shift.float().contiguous()
    with atomic_file(file) as temporary:
        save_file({"shift": shift}, temporary, {"steering": json.dumps(recipe)})
    return file


def _read_site(folder: Path, name: str, entry: Mapping[str, Any]) -> SiteArtifact:
    if not _NAME.fullmatch(name):
        raise ArtifactError(f"{folder / RECORD} names a site folder {name!r}; not a plain name")
    here = folder / name
    config = _read_json(here / CONFIG)
    if config.get("architecture") != "topk" or config.get("dtype") != "float32":
        kind = f"{config.get('dtype')} {config.get('architecture')!r}"
        raise ArtifactError(f"{here / CONFIG} describes a {kind} SAE; expected a float32 topk one")
    d_in, d_sae, k = (_positive(config, key, here) for key in ("d_in", "d_sae", "k"))
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    weights, _ = _read_tensors(here / WEIGHTS, shapes)
    if k > d_sae:
        raise ArtifactError(f"{here / CONFIG}: k is {k}, more than the {d_sae} latents")
    sae = SparseAutoencoder(d_in, d_sae, k)
    sae.load_state_dict(weights)
    sae.requires_grad_(False)
    site = SiteArtifact(Site.from_dict(entry["site"]), sae, dict(entry.get("training", {})))
    for file in sorted((here / "attribution").glob("*.safetensors")):
        table = _read_table(file, d_sae)
        site.tables[table.name] = table
    for file in sorted((here / "steering").glob("*.safetensors")):
        steering = _read_steering(file, d_sae)
        site.steerings[steering.name] = steering
    return site


def _read_table(file: Path, d_sae: int) -> AttributionTable:
    columns, metadata = _read_tensors(
        file, dict.fromkeys(_NEEDED_COLUMNS, (d_sae,)), others=(d_sae,)
    )
    try:
        made = json.loads(metadata["table"])
        table = AttributionTable(columns, made["contrast"], made["provenance"])
        if table.name != file.stem:
            raise ArtifactError(f"{file} holds the table of contrast {table.name!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{file} does not say which contrast it is of: {error!r}") from error
    return table


def _read_steering(file: Path, d_sae: int) -> Steering:
    tensors, metadata = _read_tensors(file, {"shift": (d_sae,)})
    try:
        recipe = json.loads(metadata["steering"])
        if recipe["operation"] != "shift":
            raise ArtifactError(
                f"{file} uses operation {recipe['operation']!r}, which this steerrec does not "
                "know: upgrade steerrec"
            )
        return Steering(
            tensors["shift"],
            alpha=float(recipe["alpha"]),
            splice=recipe["splice"],
            name=file.stem,
            provenance=recipe["provenance"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{file} is not a steering recipe: {error!r}") from error


def _read_tensors(
    file: Path, shapes: Mapping[str, tuple[int, ...]], others: tuple[int, ...] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Float32 tensors of exactly these names and shapes, and the metadata.

    With `others`, further tensors of that shape are welcome.
    """
    try:
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        if header > _MAX_HEADER:
            raise ArtifactError(f"{file} has a header of {header} bytes; not an artifact's file")
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            metadata = opened.metadata() or {}
            found = {name: _shape_and_dtype(opened, name) for name in names}
            for name in (*shapes, *names):
                shape, here = shapes.get(name, others), found.get(name, "missing")
                expected = f"float32 of shape {shape}" if shape else "no such tensor"
                if here != expected:
                    raise ArtifactError(f"{file}: tensor {name!r} is {here}; expected {expected}")
            tensors = {name: opened.get_tensor(name).clone() for name in names}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ArtifactError(f"{file}: tensor {name!r} has values that are not finite")
    return tensors, metadata


def _shape_and_dtype(opened: Any, name: str) -> str:
    part = opened.get_slice(name)
    dtype = {"F32": "float32"}.get(part.get_dtype(), part.get_dtype())
    return f"{dtype} of shape {tuple(part.get_shape())}"


def _positive(config: Mapping[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArtifactError(f"{folder / CONFIG}: {key} is {value!r}; expected a positive integer")
    return value


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{file} does not exist; expected an artifact folder written by `steerrec attach`"
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{file} is not a JSON object")
    return value


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float | int) else "–"


def _short(value: object) -> str:
    return str(value)[:12]
