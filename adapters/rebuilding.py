"""What adapters share that rebuild a library's checkpoint as the reference SASRec.

Each reads the weights without the library, says which configuration computes what the library
does, and renames them; what is not that library's SASRec is refused before anything is built.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerrec.adapters.sasrec import SASRecConfig, SASRecModel, SASRecRecommender
from steerrec.data import Catalogue
from steerrec.errors import ModelError
from steerrec.unpickling import find_state_dict
from steerrec.wrapping import as_catalogue


def weights_of(
    path: str | Path,
    checkpoint: Any,
    library: str,
    *,
    needed: Collection[str],
    own: Collection[str],
) -> dict[str, Tensor]:
    """The weights of a library's SASRec, by name.

    Parameters
    ----------
    path, library
        For the messages.
    checkpoint
        What `read_checkpoint` gave.
    needed
        Names that tell this model from others.
    own
        First parts of all the names that it has.

    Raises
    ------
    ModelError
        If it is another model, or a weight is no finite number.
    """
    weights = find_state_dict(checkpoint)
    if not set(needed) <= set(weights):
        found = ", ".join(sorted(weights)[:4])
        raise ModelError(
            f"{path} is not a {library} SASRec checkpoint: it has {found}, …; expected "
            f"{' and '.join(needed)}. Open other models with {library} and wrap the live object"
        )
    if others := sorted({name.partition(".")[0] for name in weights} - set(own)):
        raise ModelError(
            f"{path} has {', '.join(others[:3])} besides what {library}'s SASRec has: it is "
            f"another model; open it with {library} and wrap the live object"
        )
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ModelError(
                f"{path}: {name} is not all finite numbers, so the model scores nothing; take an "
                "earlier checkpoint of its training"
            )
    return weights


def table_of(path: str | Path, weights: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Rows and width of an embedding.

    Raises
    ------
    ModelError
        If it is none, or missing.
    """
    if name not in weights:
        raise ModelError(f"{path}: {name} is missing; expected a table [rows, width]")
    shape = tuple(weights[name].shape)
    if len(shape) != 2 or 0 in shape:
        raise ModelError(f"{path}: {name} has shape {shape}; expected a table [rows, width]")
    return shape[0], shape[1]


def count_layers(path: str | Path, weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers there are, from names such as ``prefix.0.weight``.

    Raises
    ------
    ModelError
        If they are not numbered from 0 on.
    """
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d{{1,4}})\..+")
    numbers = {int(match[1]) for name in weights if (match := pattern.fullmatch(name))}
    if not numbers or numbers != set(range(len(numbers))):
        raise ModelError(f"{path}: the layers {prefix}.… are not numbered 0, 1, …; one is missing")
    return len(numbers)


def items_for(path: str | Path, items: Catalogue | None, num_items: int) -> Catalogue:
    """The catalogue for a checkpoint, of bare numbers 1..N where none is given.

    Raises
    ------
    ModelError
        If there are more or fewer items than the checkpoint has.
    """
    if items is None:
        return as_catalogue(range(1, num_items + 1))
    if len(items) != num_items:
        raise ModelError(
            f"{path} has {num_items} items, the catalogue has {len(items)}; give the data that it "
            "was trained on with the same k-core (--k-core), or the order of its items (--item-map)"
        )
    return items


def rebuild(
    path: str | Path,
    library: str,
    config: SASRecConfig,
    weights: Mapping[str, Tensor],
    translate: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
    items: Catalogue,
    *,
    source: str,
    device: str | torch.device,
) -> SASRecRecommender:
    """The reference SASRec with a library's weights.

    Parameters
    ----------
    path, library
        For the messages.
    config
        What computes as the library does.
    weights
        By the library's names.
    translate
        Takes them out of a dict, and gives them under the names of `SASRecModel`.
    items
        The catalogue.
    source
        What opens it so again.
    device
        Where the model goes.

    Raises
    ------
    ModelError
        If a weight is missing, too many, or of another shape than the others say.
    """
    left = dict(weights)
    try:
        with torch.device("meta"):  # shapes are compared before anything is allocated
            expected = {name: t.shape for name, t in SASRecModel(config).state_dict().items()}
        translated = translate(left)
        if unfit := _unfit(translated, expected):
            raise RuntimeError(unfit)
        model = SASRecModel(config)
        model.load_state_dict(translated)
    except KeyError as missing:
        reason = f"{missing.args[0]} is missing"
    except (IndexError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[2].strip() or str(error)
    else:
        reason = f"{', '.join(sorted(left)[:3])} is none of its weights" if left else ""
    if reason:
        raise ModelError(f"{path} does not fit {library}'s SASRec: {' '.join(reason.split())}")
    model.to(torch.device(device))  # type: ignore[arg-type]
    return SASRecRecommender(model, items, source=source)


def _unfit(weights: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> str:
    """What does not fit, after a line as torch's own message has one; empty if all does."""
    for name, shape in expected.items():
        if name not in weights:
            return f"\n{name} is missing"
        if weights[name].shape != shape:
            found = tuple(weights[name].shape)
            return f"\nsize mismatch for {name}: it has {found}, expected {tuple(shape)}"
    return ""
