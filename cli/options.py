"""Options that several commands share, and what they lead to: data, model, output."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from steerrec.artifacts import Artifact
    from steerrec.data import Catalogue, Histories, Interactions, Split
    from steerrec.evaluation import Evaluation
    from steerrec.recommender import Recommender
    from steerrec.sites import Site

Kind = Literal["file", "MODEL folder", "ARTIFACT folder"]

DATA_HELP = (
    "Interactions: RecBole .inter, MovieLens ratings.dat, CSV/TSV/Parquet with a header, "
    "'user item' pairs, or one sequence a line; a file or its folder."
)
MODEL_HELP = (
    "MODEL folder, Hub id, pkg.module:function, or a checkpoint such as recbole:FILE or "
    "pmixer:FILE,heads=2."
)
DataOption = Annotated[Path, typer.Option("--data", help=DATA_HELP, show_default=False)]
UserCol = Annotated[
    str | None, typer.Option("--user-col", help="Column of the user id.", rich_help_panel="Data")
]
ItemCol = Annotated[
    str | None, typer.Option("--item-col", help="Column of the item id.", rich_help_panel="Data")
]
TimeCol = Annotated[
    str | None, typer.Option("--time-col", help="Column of the time.", rich_help_panel="Data")
]
KCore = Annotated[
    int | None,
    typer.Option(
        "--k-core",
        min=0,
        help="Drop users and items with fewer interactions, until none is left.",
        rich_help_panel="Data",
    ),
]
Dedup = Annotated[
    bool | None,
    typer.Option(
        "--dedup/--no-dedup",
        help="Keep only the first of repeated (user, item) rows.",
        rich_help_panel="Data",
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="recbole, movielens, csv, parquet, pairs or sequences, where it is not recognised.",
        rich_help_panel="Data",
    ),
]
ArtifactArgument = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="ARTIFACT folder or Hub id.", show_default=False)
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The recommender: a folder, a Hub id, a checkpoint such as recbole:FILE, or "
        "pkg.module:function returning one.",
        show_default=False,
    ),
]
K = Annotated[int, typer.Option("-k", "--top-k", min=1, help="Length of the lists.")]
MaskSeen = Annotated[
    bool, typer.Option("--mask-seen", help="Leave out every item of a user's history.")
]
MaxUsers = Annotated[
    int | None,
    typer.Option(
        "--max-users",
        min=1,
        help="Measure on at most so many held-out users, a seeded sample; all by default.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same result.")]


def _usable(device: str) -> str:
    """The device, if there is one of that name here."""
    if device != "cpu":
        import torch

        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise typer.BadParameter(f"{device!r} cannot be used here: {reason}") from None
    return device


CONTRAST_HELP = (
    "popularity; items by attribute (genres=Horror), number or quantile (price>q80), list "
    "(items:FILE), each against all others or, by `A vs B`, another group."
)
Contrasts = Annotated[
    list[str] | None,
    typer.Option(
        "--contrast",
        help=f"What to look for, popularity by default: {CONTRAST_HELP} May be repeated.",
        show_default=False,
    ),
]
ContrastName = Annotated[
    str, typer.Option("--contrast", help="Which table, by the words that it was made with.")
]


Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, …", callback=_usable)]
ItemMap = Annotated[
    Path | None,
    typer.Option("--item-map", help="Table of a checkpoint's item numbers and your item ids."),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit, of what is on the Hub; main if none."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Layer = Annotated[
    str | None,
    typer.Option("--layer", help="Module path of the site; see `steerrec layers`."),
]
SiteName = Annotated[
    str | None,
    typer.Option(
        "--site",
        "--layer",
        help="Which site of ARTIFACT, where it has several: its module path or folder name.",
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict/--no-strict",
        help="Refuse any other model than the one that ARTIFACT was made for.",
    ),
]


def call_of(value: str) -> Any:
    """The `--call` option as a site takes it."""
    return int(value) if value.isdecimal() else value


_TABLES = (".csv", ".tsv", ".parquet", ".pq", ".inter")


def read_data(
    data: Path,
    recorded: dict[str, Any] | None = None,
    *,
    user_col: str | None = None,
    item_col: str | None = None,
    time_col: str | None = None,
    k_core: int | None = None,
    dedup: bool | None = None,
    format: str | None = None,
    keep: Sequence[str] = (),
) -> Interactions:
    """Read interactions; what is not given is as it was recorded when the model was trained.

    Recorded columns that this data does not have are recognised anew, with a warning.
    """
    from steerrec.data import DataWarning, read_interactions
    from steerrec.errors import ColumnError

    recorded = recorded or {}
    given = {"user_col": user_col, "item_col": item_col, "time_col": time_col}
    columns = {key: value or recorded.get(key) for key, value in given.items()}
    core = recorded.get("k_core") if k_core is None else k_core
    first_only = recorded.get("dedup") if dedup is None else dedup
    headless = recorded.get("format") in ("pairs", "sequences")
    if format is None and headless and data.is_file() and data.suffix.lower() not in _TABLES:
        format = recorded["format"]  # the two that a file does not tell apart for certain

    def read(columns: dict[str, str | None]) -> Interactions:
        return read_interactions(
            data,
            user_col=columns["user_col"],
            item_col=columns["item_col"],
            time_col=columns["time_col"],
            k_core=core or 0,
            dedup=bool(first_only),
            keep=keep,
            format=format,
        )

    try:
        return read(columns)
    except ColumnError:
        if columns == given:
            raise
    found = read(given)
    used = found.preparation
    warnings.warn(
        f"{data} does not have the columns of the data that the model was trained on; read as "
        f"user {used.user_col!r}, item {used.item_col!r}, "
        + (f"time {used.time_col!r}" if used.time_col else "in file order"),
        DataWarning,
        stacklevel=2,
    )
    return found


def split_for(rec: Recommender, interactions: Interactions) -> Split:
    """Histories as the model reads them, split leave-one-out."""
    from steerrec.data import leave_one_out

    return leave_one_out(histories_for(rec, interactions), len(rec.catalogue))


def histories_for(rec: Recommender, interactions: Interactions) -> Histories:
    """Histories in the rows of the model's own catalogue, with the columns that it reads."""
    from steerrec.data import build_histories
    from steerrec.recommender import columns_read

    return build_histories(interactions, rec.catalogue, columns=columns_read(rec))


def catalogue_for(rec: Recommender, interactions: Interactions) -> Catalogue:
    """The model's catalogue, with the attributes that only the data has."""
    from steerrec.contrasts import with_attributes

    return with_attributes(rec.catalogue, interactions)


def open_model(
    model: str,
    read: Callable[..., Interactions],
    item_map: Path | None = None,
    device: str = "cpu",
    *,
    recorded: dict[str, Any] | None = None,
    items: Catalogue | None = None,
    revision: str | None = None,
) -> tuple[Recommender, Interactions]:
    """A model and the data for it, read as the model recorded it unless `recorded` says otherwise.

    A checkpoint that holds no ids gets those of the item map, else `items`, else of the data.
    """
    from steerrec.loading import check_settings, holds_no_items, items_of, load_recommender

    if holds_no_items(model) and revision is None:
        check_settings(model)
        interactions = read(recorded)
        if items is None or item_map is not None:
            items = items_of(model, interactions, item_map)
        return load_recommender(model, device=device, items=items), interactions
    if item_map is not None:
        raise no_item_map(model)
    rec = load_recommender(model, device=device, **hub_options(revision))
    if recorded is None:
        record = getattr(rec, "record", None)
        recorded = record.get("data") if isinstance(record, dict) else None
    return rec, read(recorded, keep=columns_to_keep(rec))


def columns_to_keep(rec: Recommender) -> list[str]:
    """Columns of the data, beside the time, that a model reads."""
    from steerrec.data import TIME
    from steerrec.recommender import columns_read

    return [name for name in columns_read(rec) if name != TIME]


def hub_options(revision: str | None) -> dict[str, Any]:
    """What to give on to where something may be loaded from the Hub."""
    return {} if revision is None else {"revision": revision}


def is_on_hub(name: str) -> bool:
    """Whether an ARTIFACT is to come from the Hub: it has the form of an id, and is not here."""
    from steerrec.hub_names import is_repo_id

    return is_repo_id(name) and not Path(name).exists()


def no_item_map(model: str) -> Exception:
    """The error for an item map beside a model that has its own items."""
    from steerrec.errors import ModelError

    return ModelError(f"{model} holds its own items; --item-map is for checkpoints without ids")


def open_artifact(
    path: str,
    model: str | None,
    read: Callable[..., Interactions],
    item_map: Path | None,
    device: str = "cpu",
    *,
    site: str | None = None,
    strict: bool = True,
    revision: str | None = None,
) -> tuple[Artifact, Recommender, Interactions]:
    """An artifact, the model that it belongs to, and the data, read as the artifact recorded.

    Without `model` it is the one on the Hub that the artifact records, at its recorded commit. A
    path or function that it merely records is shown, never opened or imported. A checkpoint that
    holds no ids has those that the artifact was made with. With `strict` off another model passes,
    and how well the SAE of `site` fits it is noted.
    """
    from steerrec.artifacts import load_artifact
    from steerrec.errors import ArtifactError
    from steerrec.untrusted import printable

    artifact = load_artifact(path, **hub_options(revision))
    artifact.at(site)  # before the model is opened
    if model is None and artifact.base_model.get("repo_id"):
        if item_map is not None:
            raise no_item_map(printable(str(artifact.base_model["repo_id"])))
        rec = artifact.load_base_model(device=device, strict=strict)
        interactions = read(artifact.data, keep=columns_to_keep(rec))
    elif model is None:
        if artifact.base_model.get("source") is None:
            raise ArtifactError(
                f"{path} does not record where its model came from; give it with --model"
            )
        recorded = printable(str(artifact.base_model.get("source")), limit=1000)
        raise ArtifactError(
            f"{path} was made for the model at {recorded!r}, which is not opened on the artifact's "
            f"word; give it with --model {recorded}"
        )
    else:
        rec, interactions = open_model(
            model, read, item_map, device, recorded=artifact.data, items=artifact.items
        )
        artifact.check(rec, strict=strict)
    if not strict and (differing := artifact.differences(rec)):
        fit = artifact.measure_fit(rec, split_for(rec, interactions).train, site=site)
        note(f"{path} was made for another model (other {' and '.join(differing)}): {fit}")
    return artifact, rec, interactions


def adds_to(output: Path, force: bool) -> bool:
    """Whether an SAE for OUTPUT joins the artifact that is there; refuses anything else there."""
    if not force and _kind(output) == "ARTIFACT folder":
        return True
    refuse_existing(output, force, kind="ARTIFACT folder")
    return False


def refuse_held(output: Path, rec: Recommender, site: Site) -> None:
    """Refuse before anything is computed if the artifact cannot take an SAE for this site."""
    from steerrec.artifacts import load_artifact
    from steerrec.errors import StorageError

    artifact = load_artifact(output)
    if any(here.site == site for here in artifact.sites.values()):
        raise StorageError(
            f"{output} exists and holds an SAE at {site.name}; choose another layer, another name, "
            "or replace the whole artifact with --force"
        )
    artifact.check(rec)


def record_result(
    artifact: str, site: Site, name: str, found: dict[str, Any], picture: Path | None = None
) -> None:
    """Keep what was measured in ARTIFACT, for its card; not where it is on the Hub or read-only."""
    from steerrec.artifacts import save_result
    from steerrec.errors import SteerrecError

    if is_on_hub(artifact):
        return
    try:
        drawn = None if picture is None else picture.read_bytes()
        note(f"{save_result(artifact, site, name, found, picture=drawn)} written")
    except (SteerrecError, OSError) as error:
        note(f"not recorded in {artifact}: {error}")


def not_on_hub(artifact: str, why: str) -> Exception:
    """The error for an artifact on the Hub where one has to be here, since it is written to."""
    from steerrec.errors import ArtifactError

    return ArtifactError(
        f"{artifact} is not a folder here, but {why}: get it with `steerrec pull {artifact} -o DIR`"
    )


def not_scored(site: Site, scored: Site, what: str) -> Exception:
    """The error for an SAE that is not at the vector that the scores are computed from."""
    from steerrec.errors import SiteError

    return SiteError(
        f"the SAE is at {site.name}, not at the scored vector ({scored.name}), which {what} needs; "
        "attach one there"
    )


def warn_unless_conforming(rec: Recommender) -> None:
    """Say what is wrong with a recommender before anything is computed with it.

    A warning and no error: a model in half precision is off by more than the check allows.
    """
    from steerrec.conformance import conformance
    from steerrec.errors import ModelWarning

    if problems := conformance(rec).problems:
        warnings.warn(
            f"{type(rec.model).__name__} is not wrapped right, so that the numbers are not "
            f"its own: {'; '.join(problems)}",
            ModelWarning,
            stacklevel=2,
        )


def refuse_existing(path: Path, force: bool, *, kind: Kind = "file") -> None:
    """Raise unless nothing is at `path`, or it may be replaced: only by what is of its kind."""
    from steerrec.errors import StorageError

    if not path.exists():
        return
    if not force:
        raise StorageError(f"{path} exists; choose another name, or replace it with --force")
    if kind != "file" and path.is_dir() and not any(path.iterdir()):
        return
    if _kind(path) != kind:
        raise StorageError(
            f"{path} is not a {kind}: --force does not replace it; choose another name"
        )


def _kind(path: Path) -> Kind | None:
    if path.is_file():
        return "file"
    if not (path / "steerrec.json").is_file():
        return None
    return "MODEL folder" if (path / "items.parquet").is_file() else "ARTIFACT folder"


def check_k(k: int, rec: Recommender) -> None:
    """Refuse lists longer than the catalogue before anything is computed."""
    from steerrec.errors import DataError

    if k > len(rec.catalogue):
        raise DataError(
            f"k is {k} but the catalogue has {len(rec.catalogue)} items; choose k between 1 and "
            f"{len(rec.catalogue)}"
        )


def partial(path: Path) -> Path:
    """Folder of a run's unfinished work, beside its result."""
    path = path.resolve()  # "." has no name
    return path.with_name(f"{path.name}.partial")


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def note(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(text + "\n")


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout under its title: the first column names the row, the others are numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # a pipe has no width: never cut numbers off
        console.width = 200
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    console.print(table)


def print_evaluations(named: dict[str, Evaluation]) -> None:
    """Metrics side by side, one column an evaluation, under the protocol of each."""
    first = next(iter(named.values()))
    protocols = {name: describe_protocol(found) for name, found in named.items()}
    if len(set(protocols.values())) == 1:
        title = describe_protocol(first)
    else:
        title = "\n".join(f"{name}: {protocol}" for name, protocol in protocols.items())
    rows = [
        [metric, *(number(found.metrics[metric]) for found in named.values())]
        for metric in first.metrics
    ]
    print_table(title, ["", *named], rows)


def describe_protocol(found: Evaluation) -> str:
    """The protocol in a line."""
    protocol = found.protocol
    split = "whole histories" if protocol["split"] == "none" else f"{protocol['split']} split"
    seen = "seen items masked" if protocol["mask_seen"] else "seen items not masked"
    line = (
        f"{split}, {seen}, k = {protocol['k']}, "
        f"{protocol['users']:,} users, {protocol['items']:,} items"
    )
    if sample := protocol.get("sample"):
        line += f", a sample of {sample['of']:,} users (seed {sample['seed']})"
    if "item_dtype" in protocol:
        line += f", items in {protocol['item_dtype']}"
    unreachable = protocol.get("unreachable", 0.0)
    return line + (f", {unreachable:.1%} of targets unreachable" if unreachable else "")


def number(value: float | None, form: str = ".4f") -> str:
    """The number, or a dash where it is not defined."""
    return "–" if value is None or value != value else format(value, form)
