"""`steerrec report`: one page that says what neurons mean and what steering changes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerrec.cli import options as opt

if TYPE_CHECKING:
    from steerrec.artifact_site import SiteArtifact
    from steerrec.data import Catalogue, Histories
    from steerrec.neurons import NeuronDescriptions
    from steerrec.recommender import Recommender


def report(
    artifact: opt.ArtifactArgument,
    data: opt.DataOption,
    model: opt.ModelOption = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The page, an HTML file.")] = Path(
        "report.html"
    ),
    title: Annotated[str | None, typer.Option("--title", help="What the page is called.")] = None,
    contrast: opt.ContrastName = "popularity",
    users: Annotated[int, typer.Option("--users", min=0, help="Real users to show.")] = 12,
    k: opt.K = 10,
    mask_seen: opt.MaskSeen = False,
    site: opt.SiteName = None,
    strict: opt.Strict = True,
    revision: opt.Revision = None,
    device: opt.Device = "cpu",
    item_map: opt.ItemMap = None,
    user_col: opt.UserCol = None,
    item_col: opt.ItemCol = None,
    time_col: opt.TimeCol = None,
    k_core: opt.KCore = None,
    dedup: opt.Dedup = None,
    format: opt.Format = None,
    force: opt.Force = False,
) -> None:
    """Write one HTML page: what neurons mean, what steering gains and costs, and for whom.

    What the neurons mean is found out once and kept in ARTIFACT, as is the trade-off, which is
    measured if ARTIFACT holds none (`steer --sweep`; -k and --mask-seen are for this). What
    `compare` recorded there is on the page too.
    """
    from steerrec.contrasts import contrast_name
    from steerrec.report_page import TITLE, write_report
    from steerrec.reporting import report_data

    opt.refuse_existing(output, force)
    read = partial(
        opt.read_data,
        data,
        user_col=user_col,
        item_col=item_col,
        time_col=time_col,
        k_core=k_core,
        dedup=dedup,
        format=format,
    )
    opened, rec, interactions = opt.open_artifact(
        artifact, model, read, item_map, device, site=site, strict=strict, revision=revision
    )
    opt.check_k(k, rec)
    here = opened.at(site)
    here.sae.to(device)
    split = opt.split_for(rec, interactions)
    name, catalogue = contrast_name(contrast), opt.catalogue_for(rec, interactions)
    found = descriptions(artifact, rec, here, split.train, name, catalogue)
    gathered = report_data(
        rec,
        here,
        split,
        contrast=name,
        catalogue=catalogue,
        found=found,
        prepared=opened.data,
        source=name_of(opened.base_model.get("repo_id"), model),
        users=users,
        top_k=k,
        mask_seen=mask_seen,
    )
    if gathered.sweep is not here.results.get("sweep") and "sweep" not in here.results:
        opt.record_result(artifact, here.site, "sweep", dict(gathered.sweep))
    write_report(gathered, output, title=title or TITLE)
    opt.note(f"{output} written, {output.stat().st_size / 1e6:.1f} MB")


def name_of(repo_id: str | None, model: str | None) -> str:
    """What the base model is called: its id on the Hub, or the name of its folder or file."""
    if model is None or repo_id:
        return str(repo_id)
    path = Path(model.partition(",")[0].rpartition(":")[2])
    return "/".join(path.parts[-2:]) if path.name == "model" else path.name or model


def descriptions(
    artifact: str,
    rec: Recommender,
    here: SiteArtifact,
    train: Histories,
    contrast: str,
    catalogue: Catalogue,
) -> NeuronDescriptions:
    """What neurons mean, as ARTIFACT holds it of this data, or found out and kept there."""
    from steerrec.artifacts import load_descriptions, save_descriptions
    from steerrec.describing import describe_neurons, protocol_of
    from steerrec.errors import ArtifactError, StorageError

    table = here.table(contrast)
    here_on_disk = not opt.is_on_hub(artifact)
    if here_on_disk:
        protocol = protocol_of(rec, here.sae, table, train, site=here.site, catalogue=catalogue)
        try:
            kept = load_descriptions(artifact, here.site, table)
        except ArtifactError as error:
            opt.note(f"found out again: {error}")
            kept = None
        if kept is not None and kept.protocol == protocol:
            return kept
    found = describe_neurons(rec, here.sae, table, train, site=here.site, catalogue=catalogue)
    if here_on_disk:
        try:
            opt.note(f"{save_descriptions(artifact, here.site, found)} written")
        except (StorageError, OSError) as error:
            opt.note(f"not kept in {artifact}: {error}")
    return found
