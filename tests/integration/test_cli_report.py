"""`steerrec report`, `neurons` and `neuron`."""

import shutil
from pathlib import Path

import pytest

from .conftest import World, steerrec


@pytest.fixture(scope="module")
def made(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that a report was made of, and `report.html` beside it."""
    folder = tmp_path_factory.mktemp("reported")
    shutil.copytree(world.artifact, folder / "artifact")
    result = report(world, folder)
    assert result.code == 0, result.err
    assert "report.html written" in result.err
    assert result.out == ""
    return folder


def report(world: World, folder: Path, *options: object):
    common = ("--model", world.model, "--data", world.data, "-o", folder / "report.html")
    return steerrec("report", folder / "artifact", *common, "--users", 3, *options)


def test_a_page_is_written_once(world, made):
    text = (made / "report.html").read_text(encoding="utf-8")
    assert "<title>What the recommender has learned" in text
    again = report(world, made)
    assert again.code == 1
    assert "exists" in again.err


def test_what_was_found_out_is_kept_and_used_again(world, made, monkeypatch):
    site = next((made / "artifact").glob("*/descriptions")).parent
    assert (site / "descriptions" / "popularity.safetensors").is_file()
    assert (site / "results" / "sweep.json").is_file()
    monkeypatch.setattr("steerrec.describing.describe_neurons", None)
    before = (made / "report.html").read_bytes()
    again = report(world, made, "--force")
    assert again.code == 0, again.err
    assert (made / "report.html").read_bytes() == before


def test_damaged_descriptions_are_found_out_again(world, made, tmp_path):
    shutil.copytree(made / "artifact", tmp_path / "artifact")
    [file] = tmp_path.glob("artifact/*/descriptions/popularity.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    shown = steerrec("neurons", tmp_path / "artifact")
    assert shown.code == 1
    assert "cannot be read" in shown.err
    again = report(world, tmp_path)
    assert again.code == 0, again.err
    assert "found out again" in again.err


def test_neurons_are_listed_without_model_and_data(made):
    shown = steerrec("neurons", made / "artifact", "--top", 5)
    assert shown.code == 0, shown.err
    assert "strongest of 64 neurons by" in shown.out
    found = steerrec("neurons", made / "artifact", "--top", 5, "--json").json
    assert len(found["neurons"]) == 5
    strengths = [abs(each["numbers"][found["by"]]) for each in found["neurons"]]
    assert strengths == sorted(strengths, reverse=True)
    by_d = steerrec("neurons", made / "artifact", "--by", "cohens_d", "--json").json["neurons"]
    d = [abs(each["numbers"]["cohens_d"]) for each in by_d]
    assert d == sorted(d, reverse=True)
    for each in found["neurons"]:
        assert str(each["neuron"]) in shown.out
        assert each["evidence"] in ("both", "items", "histories", "none")


def test_one_neuron_is_told_in_full(made):
    found = steerrec("neurons", made / "artifact", "--json").json["neurons"]
    best = next(each for each in found if each["fired_by"] and each["raises"])
    shown = steerrec("neuron", made / "artifact", best["neuron"])
    assert shown.code == 0, shown.err
    for words in ("raises most", "lowers most", "histories that fire it most", "most like it"):
        assert words in shown.out
    assert best["raises"][0]["item"]["title"] in shown.out
    told = steerrec("neuron", made / "artifact", best["neuron"], "--json").json
    assert {name: told[name] for name in best} == best


def test_what_is_not_there_is_said(world, made):
    unknown = steerrec("neuron", made / "artifact", 64)
    assert (unknown.code, unknown.out) == (1, "")
    assert "there is no neuron 64; expected one of 0 to 63" in unknown.err
    untold = steerrec("neurons", world.artifact)
    assert untold.code == 1
    assert "find it out with `steerrec report`" in untold.err
    other = steerrec("neurons", made / "artifact", "--contrast", "horror")
    assert "no attribution table for contrast 'horror'" in other.err


def test_data_finds_out_what_is_not_known(world, tmp_path):
    shutil.copytree(world.artifact, tmp_path / "artifact")
    given = ("--model", world.model, "--data", world.data)
    shown = steerrec("neurons", tmp_path / "artifact", *given)
    assert shown.code == 0, shown.err
    assert "descriptions" in shown.err
    assert steerrec("neuron", tmp_path / "artifact", 3).code == 0


def test_real_histories_are_not_published(made, hub, monkeypatch, world):
    from steerrec.artifacts import load_artifact
    from steerrec.pushing import push

    pushed = push(made / "artifact", "acme/steered", dry_run=True)
    assert not [name for name in pushed.files if "descriptions" in name]
    load_artifact(made / "artifact").save(made / "copy")
    assert not list((made / "copy").rglob("descriptions"))
