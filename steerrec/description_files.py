"""Descriptions of neurons kept in an artifact's folder, so that they are found out once.

``<site>/descriptions/<contrast>.safetensors`` holds facts of neurons and items as tensors, texts
as UTF-8 bytes, one a line. It quotes real histories: it stays on this machine, `push` leaves it
out, and `Artifact.save` does not write it.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from steerrec.attribution import AttributionTable
from steerrec.enrichment import GROUP_WORDS
from steerrec.errors import ArtifactError
from steerrec.files import atomic_file
from steerrec.neurons import ItemFacts, NeuronDescriptions, NeuronFacts
from steerrec.tensor_files import TensorFile, write_tensors
from steerrec.untrusted import json_able, parse_object, plain_name

FOLDER = "descriptions"

_FLOATS = {
    *("firing_rate", "mean_activation", "low", "high", "raise_effects", "lower_effects"),
    *("activations", "cosines", "raises_ratios", "raises_q", "fired_ratios", "fired_q"),
}
_ITEMS = {
    "item_rows": torch.int64,
    "item_counts": torch.int64,
    "item_groups": torch.int8,
    "item_attributes": torch.int32,
    "item_titles": torch.uint8,
    "attribute_names": torch.uint8,
}
_FACTS = tuple(each.name for each in fields(NeuronFacts))


def description_file(folder: Path, contrast: str) -> Path:
    """Where a site's folder keeps the descriptions of a contrast."""
    return folder / FOLDER / f"{plain_name(contrast, 'the contrast')}.safetensors"


def write_descriptions(folder: Path, found: NeuronDescriptions) -> Path:
    """Write descriptions into a site's folder."""
    items = found.items
    tensors: dict[str, Tensor] = {name: getattr(found.facts, name) for name in _FACTS}
    tensors |= {
        "item_rows": torch.from_numpy(items.rows),
        "item_counts": torch.from_numpy(items.counts.astype(np.int64)),
        "item_groups": torch.from_numpy(items.groups.astype(np.int8)),
        "item_attributes": torch.from_numpy(np.ascontiguousarray(items.attributes)),
        "item_titles": _bytes(items.titles),
        "attribute_names": _bytes(items.names),
    }
    file = description_file(folder, found.contrast["name"])
    protocol = json.dumps(json_able(found.protocol), ensure_ascii=False)
    with atomic_file(file) as temporary:
        write_tensors(temporary, tensors, {"protocol": protocol})
    return file


def read_descriptions(
    folder: Path, root: Path, table: AttributionTable
) -> NeuronDescriptions | None:
    """The descriptions of a table's contrast in a site's folder; None where there are none.

    Raises
    ------
    ArtifactError
        If they are damaged, or name neurons, items or attributes that are not there.
    """
    file = description_file(folder, table.name)
    if not file.exists():
        return None
    with TensorFile(file, root) as opened:
        _check_types(opened)
        read = {name: opened.read(name) for name in (*_FACTS, *_ITEMS)}
        text = opened.metadata.get("protocol", "")
    protocol = parse_object(text, f"the metadata of {file}")
    facts = NeuronFacts(**{name: read[name] for name in _FACTS})
    items = ItemFacts(
        rows=read["item_rows"].numpy(),
        titles=_lines(read["item_titles"], file),
        counts=read["item_counts"].numpy(),
        groups=read["item_groups"].numpy(),
        attributes=read["item_attributes"].numpy(),
        names=_lines(read["attribute_names"], file),
    )
    problem = _problem(facts, items, len(table))
    if problem:
        raise ArtifactError(f"{file} {problem}; delete it, and it is made again")
    return NeuronDescriptions(table.contrast, dict(table.columns), protocol, facts, items)


def _bytes(texts: object) -> Tensor:
    """Texts of one line each as UTF-8."""
    lines = [" ".join(str(text).split()) for text in texts]  # type: ignore[attr-defined]
    data = "\n".join(lines).encode("utf-8", "replace")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0).byte()


def _lines(data: Tensor, file: Path) -> list[str]:
    try:
        text = data.numpy().tobytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error
    return text.split("\n")


def _check_types(opened: TensorFile) -> None:
    """Raise unless every tensor is there, in its dtype; shapes are checked when all are read."""
    for name in (*_FACTS, *_ITEMS):
        info = opened.tensors.get(name)
        expected = _ITEMS.get(name, torch.float32 if name in _FLOATS else torch.int32)
        if info is None or info.dtype != expected:
            raise ArtifactError(
                f"{opened.path}: tensor {name!r} is {info or 'missing'}; expected {expected}; "
                "delete the file, and it is made again"
            )


def _problem(facts: NeuronFacts, items: ItemFacts, neurons: int) -> str:
    """What is wrong with what was read, if anything."""
    for name in _FACTS:
        axes = {"fired_by": 3}.get(name, _axes(name))
        value: Tensor = getattr(facts, name)
        if value.ndim != axes or len(value) != neurons:
            return f"has {name!r} of shape {tuple(value.shape)} for {neurons} neurons"
    for first, *others in _SAME_SHAPE:
        shape = getattr(facts, first).shape[:2]
        if any(getattr(facts, other).shape[:2] != shape for other in others):
            return f"has {', '.join(others)} of another shape than {first!r}"
    count, names = len(items.rows), len(items.names)
    sizes = (len(items.titles), len(items.counts), len(items.groups), len(items.attributes))
    if any(size != count for size in sizes if count) or items.attributes.ndim != 2:
        return f"describes {count} items by {sizes} titles, counts, groups and attributes"
    if count and (np.diff(items.rows) <= 0).any():
        return "has items that are not in order"
    if names < len(GROUP_WORDS):
        return f"has {names} attributes"
    numbers = (items.attributes, facts.raises_attributes.numpy(), facts.fired_attributes.numpy())
    if any(each.size and not -1 <= each.min() <= each.max() < names for each in numbers):
        return "has numbers of attributes that it does not name"
    if count and not 0 <= items.groups.min() <= items.groups.max() < len(GROUP_WORDS):
        return "has popularity groups that there are not"
    similar = facts.similar
    if similar.numel() and not 0 <= int(similar.min()) <= int(similar.max()) < neurons:
        return "has neurons that there are not"
    for rows in (facts.raises, facts.lowers, facts.fired_by):
        spoken = np.unique(rows.numpy())
        if not np.isin(spoken[spoken >= 0], items.rows).all():
            return "speaks of items that it does not describe"
    return ""


_SAME_SHAPE = (
    ("raises", "raise_effects"),
    ("lowers", "lower_effects"),
    ("fired_by", "activations"),
    ("similar", "cosines"),
    ("histogram_a", "histogram_b"),
    ("raises_attributes", "raises_ratios", "raises_hits", "raises_q"),
    ("fired_attributes", "fired_ratios", "fired_hits", "fired_q"),
)
_ONE_AXIS = {"firing_rate", "mean_activation", "low", "high", "raises_drawn", "fired_drawn"}


def _axes(name: str) -> int:
    return 1 if name in _ONE_AXIS else 2
