"""Steering as a file for other runtimes: ONNX, or a program of `torch.export`.

The graph is ``(user_vectors [B, H], alpha [1] or [B]) -> [B, H]`` with B free: no hook, no host
model, no Python. What it was made from travels inside the file, as metadata.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from steerrec.artifact_record import versions
from steerrec.errors import ArtifactError, StorageError
from steerrec.files import atomic_file
from steerrec.serving import (
    Querying,
    QueryTransform,
    querying_of_record,
    require_scored,
    scoring_record,
)
from steerrec.steering import SteerTransform
from steerrec.untrusted import json_able

if TYPE_CHECKING:
    from steerrec.artifacts import Artifact
    from steerrec.recipes import Recipe
    from steerrec.recommender import Recommender

Format = Literal["onnx", "pt2"]

METADATA = "steerrec"
"""Key of the metadata: JSON in an ONNX file's `metadata_props`, an extra file of a .pt2."""

INPUTS, OUTPUT = ("user_vectors", "alpha"), "steered"
_OPSET = 18


def export_artifact(
    artifact: Artifact,
    path: str | Path,
    *,
    steering: Recipe | str | None = None,
    contrast: str = "popularity",
    site: str | None = None,
    alpha: float | None = None,
    rec: Recommender | None = None,
    queries: bool = False,
) -> dict[str, Any]:
    """Write an artifact's steering as a file for serving.

    Parameters
    ----------
    artifact
        Holds the SAE.
    path
        File to write: ``.onnx``, or ``.pt2`` for `torch.export`.
    steering, contrast, site
        Which steering, as in `Artifact.transform`.
    alpha
        Default strength; the recipe's own if not given.
    rec
        The model that the artifact was made for; only needed where the artifact does not record
        how that model scores (it is from before steerrec did so).
    queries
        Whether the file gives queries for an index by inner product (see `retrieval_vectors`)
        rather than user vectors: the two differ for models with an item bias or cosine scores.

    Returns
    -------
    dict
        The metadata of the file.

    Raises
    ------
    SiteError
        If the SAE is not where the model's scores are computed from.
    ArtifactError
        If the artifact does not say where that is, and `rec` is not given.
    StorageError
        If the path has another suffix, or a package that ONNX takes is missing.
    """
    check_suffix(path)
    here = artifact.at(site)
    if rec is not None:
        artifact.check(rec)
    scoring = scoring_record(rec) if rec is not None else artifact.base_model.get("scoring")
    if not isinstance(scoring, Mapping) or not isinstance(scoring.get("site"), Mapping):
        raise ArtifactError(
            f"the artifact does not record where its model scores, so whether {here.site.name} can "
            "be served without the model is not known; give the model (rec=..., --model)"
        )
    require_scored(here.site, scoring["site"])
    transform = artifact.transform(cast(Any, steering), contrast=contrast, site=site)
    if alpha is not None:
        transform = transform.with_steering(transform.steering.with_alpha(alpha))
    querying = querying_of_record(scoring)
    mark = artifact.base_model["fingerprint"].get(here.site.folder, {})
    about = {
        "site": here.site.to_dict(),
        "queries": querying.reason,
        "base_model": {
            key: artifact.base_model.get(key) for key in ("adapter", "repo_id", "revision")
        },
        "fingerprint": dict(mark),
    }
    return export_transform(transform, path, querying=querying if queries else None, about=about)


@torch.no_grad()
def export_transform(
    transform: SteerTransform,
    path: str | Path,
    *,
    querying: Querying | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a transform as a file for serving, whatever its recipe.

    It takes `user_vectors` [B, H] and `alpha`, [1] for all users or [B], both float32; the default
    strength is in the metadata.

    Parameters
    ----------
    transform
        What to export; computed in float32.
    path
        ``.onnx`` or ``.pt2``; replaced if it exists.
    querying
        Makes queries of the steered vectors, which then have the width D of those.
    about
        More to keep in the metadata, JSON-able.

    Returns
    -------
    dict
        The metadata of the file.
    """
    kind = check_suffix(path)
    served = _Served(copy.deepcopy(transform).float().cpu().eval(), querying)
    width = transform.sae.d_in
    found = {
        "alpha": float(transform.steering.alpha),
        "steering": transform.steering.describe(),
        "d_in": width,
        "d_sae": transform.sae.d_sae,
        "output": "queries" if querying is not None else "user vectors",
        "versions": versions(),
        **(about or {}),
    }
    metadata: dict[str, Any] = json_able(found)
    program = _program(served, width)
    with atomic_file(path) as temporary:
        if kind == "onnx":
            _write_onnx(program, temporary, metadata)
        else:
            content = BytesIO()
            text = json.dumps(metadata, ensure_ascii=False)
            torch.export.save(program, content, extra_files={METADATA: text})
            temporary.write_bytes(content.getbuffer())
    return metadata


def check_suffix(path: str | Path) -> Format:
    """The format that a file name asks for, with what it takes installed.

    Raises
    ------
    StorageError
        If it is none of them, or a package is missing.
    """
    suffix = Path(path).suffix.removeprefix(".")
    if suffix not in get_args(Format):
        raise StorageError(
            f"{path} has no suffix that says its format; expected .onnx, or .pt2 for torch.export"
        )
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if suffix == "onnx" and missing:
        raise StorageError(
            f"writing ONNX takes {' and '.join(missing)}: pip install 'steerrec[export]'; or write "
            "a .pt2 file"
        )
    return cast(Format, suffix)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `export_transform` wrote into a file of its own."""
    if check_suffix(path) == "onnx":
        import onnx

        model = onnx.load(path, load_external_data=False)
        text = {entry.key: entry.value for entry in model.metadata_props}[METADATA]
    else:
        extra = {METADATA: ""}
        torch.export.load(path, extra_files=extra)
        text = extra[METADATA]
    found: dict[str, Any] = json.loads(text)
    return found


class _Served(nn.Module):
    """A transform whose strength is always a tensor, [1] or [B], told apart inside the graph."""

    def __init__(self, transform: SteerTransform, querying: Querying | None) -> None:
        super().__init__()
        self.transform: nn.Module = transform
        if querying is not None:
            self.transform = QueryTransform(transform, querying)

    def forward(self, user_vectors: Tensor, alpha: Tensor) -> Tensor:
        users = user_vectors.shape[0]
        given = torch.ones_like(alpha, dtype=torch.int64).sum()  # a shape would be a constant
        rows = torch.arange(users, device=alpha.device)
        # beyond the last one, which is an error, where there are neither 1 nor B of them
        rows = torch.where(given == 1, 0, rows + given * (given > users))
        steered: Tensor = self.transform(user_vectors, alpha[rows])
        return steered


class _NoBags(TorchFunctionMode):
    """Writes `embedding_bag` as a gather and a sum: in ONNX it would become a loop over users."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is not F.embedding_bag:
            return func(*args, **given)
        indices, weight = args[:2]
        picked = weight.index_select(0, indices.reshape(-1)).view(*indices.shape, -1)  # [B, k, H]
        return (given["per_sample_weights"].unsqueeze(2) * picked).sum(dim=1)


def _program(served: nn.Module, width: int) -> torch.export.ExportedProgram:
    batch, strengths = torch.export.Dim("batch", min=1), torch.export.Dim("strengths", min=1)
    example = torch.zeros(3, width), torch.zeros(2)
    with _NoBags(), _quiet():
        return torch.export.export(
            served,
            example,
            dynamic_shapes={"user_vectors": {0: batch}, "alpha": {0: strengths}},
            strict=False,
        )


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]
) -> None:
    import onnx

    with _quiet():
        made: Any = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            opset_version=_OPSET,
            verbose=False,
        )
        model = made.model_proto
    onnx.helper.set_model_props(model, {METADATA: json.dumps(metadata, ensure_ascii=False)})
    onnx.checker.check_model(model)
    onnx.save(model, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' remarks, which are about themselves, off stdout and stderr."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
