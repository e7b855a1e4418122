"""`--engine local` and `--item-dtype` on the command line; Ray itself is in test_ray_engine."""

import polars as pl
import pytest

from steerrec.data import build_histories, read_interactions
from steerrec.data.history_files import write_histories
from steerrec.loading import load_recommender


def test_blocks_give_the_recommendations_that_one_file_has(cli, world, tmp_path):
    one, folder = tmp_path / "recs.parquet", tmp_path / "recs"
    plain = cli(*world.steer, "--mask-seen", "-o", one, "--json").json
    options = ("--mask-seen", "--engine", "local", "--block-users", 50, "-o", folder)
    found = cli(*world.steer, *options, "--json").json
    assert found["metrics"] == plain["steered"]["metrics"]
    assert found["blocks"] == len(list(folder.glob("part-*.parquet"))) > 3
    assert {path.name for path in folder.iterdir() if not path.name.startswith("part-")} == {
        "_blocks",
        "steer.json",
    }
    parts, whole = pl.read_parquet(folder / "part-*.parquet"), pl.read_parquet(one)
    keys = ["user_id", "rank", "item_id", "title"]
    assert parts.select(keys).equals(whole.select(keys))
    assert (parts["score"] - whole["score"]).abs().max() < 1e-5

    again = cli(*world.steer, *options)
    assert again.code == 1
    assert "replace it with --force" in again.err
    assert "0 of them done before" in cli(*world.steer, *options, "--force").err


def test_histories_in_parquet_are_read_as_they_are(cli, world, tmp_path):
    rec = load_recommender(world.model)
    names = {"user_col": "who", "item_col": "what", "time_col": "when"}
    histories = build_histories(read_interactions(world.data, k_core=3, **names), rec.catalogue)
    write_histories(histories, rec.catalogue, tmp_path / "users" / "all.parquet")
    steer = ("steer", world.artifact, "--model", world.model, "--engine", "local", "--json")
    one = cli(*steer, "--data", tmp_path / "users", "-o", tmp_path / "one").json
    other = cli(*steer, "--data", world.data, "-o", tmp_path / "other").json
    assert one["metrics"] == other["metrics"]
    part = "part-00000.parquet"
    assert pl.read_parquet(tmp_path / "one" / part).equals(
        pl.read_parquet(tmp_path / "other" / part)
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--workers", 2), "--workers goes with --engine ray"),
        (("--threads", 2), "--threads goes with --engine"),
        (("--engine", "local", "--address", "auto"), "--address goes with --engine ray"),
        (("--engine", "local", "--sweep"), "no --sweep, --save or --split"),
        (("--engine", "local", "-o", "x.csv"), "writes a folder of Parquet files"),
    ],
)
def test_options_that_do_not_go_together(cli, world, options, line):
    found = cli(*world.steer, *options)
    assert found.code == 2
    assert line in " ".join(found.err.replace("│", " ").split())


def test_a_folder_with_something_else_is_left_alone(cli, world, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    found = cli(*world.steer, "--engine", "local", "-o", tmp_path, "--force")
    assert found.code == 1
    assert "something else than recommendations" in found.err
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_items_in_int8_on_a_sample_of_users(cli, world):
    options = ("--data", world.data, "--max-users", 40, "--seed", 3, "--item-dtype", "int8")
    found = cli("evaluate", world.model, *options, "--json").json
    assert found["protocol"]["item_dtype"] == "int8"
    assert found["protocol"]["users"] == 40
    assert found["protocol"]["sample"]["seed"] == 3
    assert found["item_dtype"]["recall@10"] > 0.9
    shown = cli("evaluate", world.model, *options)
    assert "a sample of" in shown.out
    assert "items in int8: recall@10" in shown.err
    steered = cli(*world.steer, "--split", "valid", "--item-dtype", "bfloat16", "--json").json
    assert steered["item_dtype"]["dtype"] == "bfloat16"
    assert steered["steered"]["protocol"]["item_dtype"] == "bfloat16"


def test_comparing_on_a_sample_says_so(cli, world, tmp_path):
    options = ("--methods", "popsteer,logit-adjustment", "--bootstrap", 5, "--max-users", 50)
    found = cli("compare", *world.steer[1:], "-o", tmp_path, *options, "--json").json
    assert found["protocol"]["users"] == {"valid": 50, "test": 50}
    assert found["protocol"]["sample"]["seed"] == 0
