"""One site of an artifact: its SAE, attribution tables and steering recipes, and their files.

The record of all sites, and whose artifact it is, are in `artifacts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from steerrec.artifact_parts import (
    make_metadata,
    part_file,
    part_files,
    read_metadata,
    without,
)
from steerrec.artifact_recipes import RECIPES, read_recipe, unknown_keys, write_recipe
from steerrec.artifact_results import read_results, write_picture, write_result
from steerrec.attribution import AttributionTable
from steerrec.autoencoder import SparseAutoencoder
from steerrec.errors import ArtifactError, SiteError
from steerrec.files import atomic_file, write_json
from steerrec.recipes import Recipe
from steerrec.sites import Site, TokenIds
from steerrec.tensor_files import TensorFile, dtype_name, write_tensors
from steerrec.untrusted import (
    json_able,
    plain_name,
    printable,
    read_json,
    shown,
)

RECORD = "steerrec.json"
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
TABLES = "attribution"

_NEEDED_COLUMNS = ("cohens_d", "std_a", "std_b")
_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
}
_IN_CONFIG = f"{CONFIG} metadata"
# Settings of SAELens that change what the weights compute; an artifact has them folded in.
_FOLDED = {
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "rescale_acts_by_decoder_norm": False,
}


# Without it SAELens takes the configuration for one of before version 6, and drops the metadata.
_LAYOUT = {"sae_lens_version": "6.0.0"}


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
    results
        What was measured, by name: `sweep`, `compare`, `neurons-CONTRAST`; JSON-able.
    pictures
        Pictures of results, by the same names; PNG files.
    unknown
        By file, the keys that a newer steerrec wrote there; kept when saved.
    """

    site: Site
    sae: SparseAutoencoder
    training: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, AttributionTable] = field(default_factory=dict)
    steerings: dict[str, Recipe] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    unknown: dict[str, dict[str, Any]] = field(default_factory=dict)

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

    def recipe(self, name: str) -> Recipe:
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

    def passed_over(self) -> Iterator[str]:
        """What is kept for a newer steerrec, and where it is."""
        for file in (RECORD, CONFIG):
            yield from (f"{shown(key)} in {file}" for key in self.unknown.get(file, ()))
        for name, table in self.tables.items():
            yield from (f"{shown(key)} in {TABLES}/{name}" for key in table.unknown)
        for name, steering in self.steerings.items():
            yield from (f"{shown(key)} in {RECIPES}/{name}" for key in unknown_keys(steering))


# --- writing


def write_site(folder: Path, here: SiteArtifact, source: object) -> None:
    """Write everything there is for a site into its folder; `source` names the base model."""
    config = here.sae.config()
    if config["dtype"] not in _DTYPES:
        raise ArtifactError(
            f"the SAE is {config['dtype']}; expected one of {', '.join(_DTYPES)} to save it"
        )
    named = {"model_name": source, "hook_name": here.site.path}
    config["metadata"] = named | _LAYOUT | here.unknown.get(_IN_CONFIG, {})
    write_json(folder / CONFIG, json_able(config | here.unknown.get(CONFIG, {})))
    with atomic_file(folder / WEIGHTS) as temporary:
        write_tensors(temporary, here.sae.state_dict(), {})
    for table in here.tables.values():
        write_table(folder, table)
    for steering in here.steerings.values():
        write_recipe(folder, steering, here.sae.d_in)
    for name, found in here.results.items():
        write_result(folder, name, found)
    for name, picture in here.pictures.items():
        write_picture(folder, plain_name(name, "the name"), picture)


def write_table(folder: Path, table: AttributionTable) -> Path:
    """Write an attribution table into a site's folder."""
    file = part_file(folder, TABLES, table.name)
    made = {"contrast": table.contrast, "provenance": table.provenance}
    columns = {name: values.float() for name, values in table.columns.items()}
    with atomic_file(file) as temporary:
        write_tensors(temporary, columns, make_metadata("table", made, table.unknown))
    return file


# --- reading


def read_site(folder: Path, root: Path, entry: Any) -> SiteArtifact:
    """Read and check everything in a site's folder.

    Parameters
    ----------
    folder
        The site's folder.
    root
        Where its files have to lie, links followed.
    entry
        What the record says of the site.

    Raises
    ------
    ArtifactError
        If anything is missing, damaged, or not understood.
    """
    site, training = read_entry(folder, entry)
    config = read_json(folder / CONFIG, root)
    here = SiteArtifact(site, _read_sae(folder, root, config), training)
    d_sae = here.sae.d_sae
    for file in part_files(folder / TABLES):
        table = _read_table(file, root, d_sae)
        here.tables[table.name] = table
    for file in part_files(folder / RECIPES):
        steering = read_recipe(file, root, d_sae, here.sae.d_in)
        here.steerings[steering.name] = steering
    here.results, here.pictures = read_results(folder, root)
    metadata = config.get("metadata")
    unknown = {
        RECORD: without(entry, {"site", "training"}),
        CONFIG: without(config, {*here.sae.config(), *_FOLDED, "metadata"}),
        _IN_CONFIG: without(metadata, {"model_name", "hook_name", *_LAYOUT})
        if isinstance(metadata, dict)
        else {},
    }
    here.unknown = {file: keys for file, keys in unknown.items() if keys}
    return here


def read_entry(folder: Path, entry: Any) -> tuple[Site, dict[str, Any]]:
    """Site and training summary, of what the record says of a site's folder."""
    where = f"{RECORD} is not complete: what it says of {folder.name}"
    training = entry.get("training", {}) if isinstance(entry, dict) else None
    if not isinstance(training, dict) or not isinstance(entry.get("site"), dict):
        raise ArtifactError(f"{where} is not a site and a training summary")
    try:
        site = Site.from_dict(entry["site"])
    except SiteError as error:
        raise ArtifactError(f"{where} is not understood: {printable(str(error))}") from error
    source = site.positions_from
    if isinstance(source, TokenIds) and type(source.pad_id) is not int:
        raise ArtifactError(f"{where} has a padding id {shown(source.pad_id)}; expected a number")
    return site, training


def _read_sae(folder: Path, root: Path, config: Mapping[str, Any]) -> SparseAutoencoder:
    file = folder / CONFIG
    dtype = _DTYPES.get(str(config.get("dtype")))
    architecture = config.get("architecture")
    if architecture not in ("topk", "jumprelu") or dtype is None:
        kind = f"{shown(architecture)} of {shown(config.get('dtype'))}"
        raise ArtifactError(
            f"{file} describes an SAE {kind}; expected 'topk' or 'jumprelu' of {', '.join(_DTYPES)}"
        )
    for key, expected in _FOLDED.items():
        if config.get(key, expected) != expected:
            raise ArtifactError(
                f"{file} says {key} {shown(config[key])}; an artifact has {expected!r}: "
                "`steerrec import-sae` reads SAEs of SAELens"
            )
    d_in, d_sae = (_positive(config, key, file) for key in ("d_in", "d_sae"))
    jumps = architecture == "jumprelu"
    k = None if jumps and "k" not in config else _positive(config, "k", file)
    if k is not None and k > d_sae:
        raise ArtifactError(f"{file}: k is {k}, more than the {d_sae} latents")
    shapes: dict[str, tuple[int, ...]]
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if jumps:
        shapes["threshold"] = (d_sae,)
    with TensorFile(folder / WEIGHTS, root) as opened:
        opened.require(shapes, dtype)
        return SparseAutoencoder.from_weights({name: opened.read(name) for name in shapes}, k)


def _read_table(file: Path, root: Path, d_sae: int) -> AttributionTable:
    with TensorFile(file, root) as opened:
        needed = dict.fromkeys(_NEEDED_COLUMNS, (d_sae,))
        opened.require(needed, torch.float32, others=(d_sae,))
        made, metadata = read_metadata(opened, "table")
        columns = {name: opened.read(name) for name in opened.tensors}
    match made:
        case {"contrast": {"name": str(name)} as contrast, "provenance": dict() as provenance}:
            if name != file.stem:
                raise ArtifactError(f"{file} holds the table of contrast {shown(name)}")
        case _:
            raise ArtifactError(f"{file} does not say which contrast it is of, and how it was made")
    unknown = without(made, {"contrast", "provenance"}) | metadata
    return AttributionTable(columns, contrast, provenance, unknown)


def _positive(config: Mapping[str, Any], key: str, file: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArtifactError(f"{file}: {key} is {shown(value)}; expected a positive integer")
    return value
