"""`steerrec neurons` and `steerrec neuron`: what neurons mean, on the terminal."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerrec.cli import options as opt

if TYPE_CHECKING:
    from steerrec.attribution import AttributionTable
    from steerrec.neurons import AttributeNote, ItemNote, NeuronDescription, NeuronDescriptions

Data = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Find out what they mean on these interactions, if it is not known yet."
    ),
]
_DOTS = ("●●●", "●●○", "●○○")


def neurons(
    artifact: opt.ArtifactArgument,
    data: Data = None,
    model: opt.ModelOption = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Neurons to show.")] = 20,
    contrast: opt.ContrastName = "popularity",
    by: Annotated[
        str | None, typer.Option("--by", help="Column of the table that says which are strongest.")
    ] = None,
    site: opt.SiteName = None,
    item_map: opt.ItemMap = None,
    device: opt.Device = "cpu",
    revision: opt.Revision = None,
    json_output: opt.Json = False,
) -> None:
    """The strongest neurons of a contrast in words: labels, firing rates, what they raise.

    `steerrec report` finds out what neurons mean and keeps it in ARTIFACT, as --data does here.
    """
    from steerrec.report_page import COLUMNS, shown_columns

    found = _opened(artifact, data, model, contrast, site, item_map, device, revision)
    chosen = [found[neuron] for neuron in found.strongest(top, by)]
    if json_output:
        opt.print_json(
            {
                "contrast": dict(found.contrast),
                "protocol": dict(found.protocol),
                "by": by or found.ranking,
                "neurons": [each.to_dict() for each in chosen],
            }
        )
        return
    shown = shown_columns(found)[:5]
    columns = ["neuron", *(COLUMNS.get(name, (name,))[0] for name in shown), "fires"]
    rows = [
        [
            str(each.neuron),
            *(f"{each.numbers[name]:+.3g}" for name in shown),
            f"{each.firing_rate:.2%}",
            _EVIDENCE[each.evidence],
            _plain(each.label),
            _plain("; ".join(moved.item.title for moved in each.raises[:2])),
        ]
        for each in chosen
    ]
    _print_words(
        f"{found.contrast['name']}: strongest of {len(found):,} neurons by {by or found.ranking}; "
        f"{_protocol(found)}",
        columns,
        ["evidence", "label", "raises most"],
        rows,
    )


def neuron(
    artifact: opt.ArtifactArgument,
    number: Annotated[int, typer.Argument(metavar="ID", help="Its number.", show_default=False)],
    data: Data = None,
    model: opt.ModelOption = None,
    contrast: opt.ContrastName = "popularity",
    site: opt.SiteName = None,
    item_map: opt.ItemMap = None,
    device: opt.Device = "cpu",
    revision: opt.Revision = None,
    json_output: opt.Json = False,
) -> None:
    """One neuron: numbers, items that it raises and lowers, histories that fire it, its like."""
    found = _opened(artifact, data, model, contrast, site, item_map, device, revision)
    shown = found[number]
    if json_output:
        opt.print_json(
            {
                "contrast": dict(found.contrast),
                "protocol": dict(found.protocol),
                **shown.to_dict(),
            }
        )
        return
    _print_words(f"neuron {number}: {_plain(shown.label)}", ["", "value"], [], _numbers(shown))
    labels = [str(found.contrast[group]["label"]) for group in ("group_a", "group_b")]
    if shown.histogram is not None:
        _print_words(
            f"pre-activations of made-up users, {shown.histogram.low:+.3g} to "
            f"{shown.histogram.high:+.3g}",
            [],
            ["", ""],
            [
                [_plain(labels[0]), _bars(shown.histogram.group_a)],
                [_plain(labels[1]), _bars(shown.histogram.group_b)],
            ],
        )
    for title, moved in (("raises most", shown.raises), ("lowers most", shown.lowers)):
        rows = [[f"{each.effect:+.3g}", *_item(each.item)] for each in moved]
        if rows:
            _print_words(title, ["score"], ["popularity", "title", "attributes"], rows)
    for title, notes in (
        ("items that it raises most have in common", shown.raises_attributes),
        ("histories that fire it most end in", shown.fired_by_attributes),
    ):
        if notes:
            _print_words(title, ["ratio", "of", "corrected p"], ["attribute"], _common(notes))
    rows = [
        [f"{each.activation:.3g}", _plain(" → ".join(item.title for item in each.items))]
        for each in shown.fired_by
    ]
    if rows:
        _print_words("histories that fire it most", ["activation"], ["latest items"], rows)
    rows = [
        [str(each.neuron), f"{each.cosine:.2f}", _plain(found.label(each.neuron)[0])]
        for each in shown.similar
    ]
    _print_words("neurons most like it", ["neuron", "cosine"], ["label"], rows)


_EVIDENCE = {"both": "agrees", "items": "items only", "histories": "histories only", "none": "none"}


def _opened(
    artifact: str,
    data: Path | None,
    model: str | None,
    contrast: str,
    site: str | None,
    item_map: Path | None,
    device: str,
    revision: str | None,
) -> NeuronDescriptions:
    """What ARTIFACT holds of its neurons; found out first if there is data."""
    from steerrec.artifacts import load_artifact, load_descriptions
    from steerrec.cli.report import descriptions
    from steerrec.contrasts import contrast_name
    from steerrec.errors import ArtifactError

    if data is not None:
        opened, rec, interactions = opt.open_artifact(
            artifact,
            model,
            partial(opt.read_data, data),
            item_map,
            device,
            site=site,
            revision=revision,
        )
        here = opened.at(site)
        here.sae.to(device)
        train = opt.split_for(rec, interactions).train
        catalogue = opt.catalogue_for(rec, interactions)
        return descriptions(artifact, rec, here, train, contrast_name(contrast), catalogue)
    found = None
    here = load_artifact(artifact, **opt.hub_options(revision)).at(site)
    table: AttributionTable = here.table(contrast_name(contrast))
    if not opt.is_on_hub(artifact):
        found = load_descriptions(artifact, here.site, table)
    if found is None:
        raise ArtifactError(
            f"{artifact} does not hold what its neurons mean; find it out with `steerrec report`, "
            "or give --data (and --model) here"
        )
    return found


def _protocol(found: NeuronDescriptions) -> str:
    users = found.protocol.get("synthetic_users")
    made = f", {users:,} made-up users a group" if isinstance(users, int) else ""
    return f"{found.protocol.get('histories')} histories{made}"


def _numbers(shown: NeuronDescription) -> list[list[str]]:
    rows = [
        ["evidence", _EVIDENCE[shown.evidence]],
        ["fires after", f"{shown.firing_rate:.2%} of histories"],
        ["mean where it fires", f"{shown.mean_activation:.3g}"],
    ]
    return rows + [[name, f"{value:+.4g}"] for name, value in shown.numbers.items()]


def _item(item: ItemNote) -> list[str]:
    return [f"{_DOTS[item.group]} {item.count:,}", _plain(item.title), ", ".join(item.attributes)]


def _common(notes: tuple[AttributeNote, ...]) -> list[list[str]]:
    return [[f"×{n.ratio:.1f}", f"{n.hits}/{n.drawn}", f"{n.q:.1g}", _plain(n.name)] for n in notes]


def _bars(counts: tuple[int, ...]) -> str:
    most = max(counts) or 1
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // most)] for count in counts)


def _plain(text: str) -> str:
    """A text of somebody else's: no control characters, nothing that turns the writing round."""
    return "".join(c for c in text if c.isprintable())


def _print_words(title: str, numbers: list[str], words: list[str], rows: list[Any]) -> None:
    """A table whose last columns are words."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_header=any((*numbers, *words)))
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    for column in words:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    console.print(table)
