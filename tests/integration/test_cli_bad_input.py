"""What a user can get wrong: each is one clear line, a non-zero exit, and nothing half-written."""

import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from steerrec.data import simulate, write_csv

TINY = ("--hidden-size", "16", "--layers", "1", "--max-length", "10", "--epochs", "1")


def rows(text):
    return "user_id,item_id,timestamp\n" + text


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    """Every file and folder below, with what is in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def refuse(cli, here, world):
    """Run a command that has to fail, and leave everything as it is; its one line of complaint."""

    def refuse(*arguments):
        before = contents(here), contents(world.folder)
        found = cli(*arguments)
        assert found.code == 1, found
        assert found.out == ""
        *others, line = found.err.splitlines()
        assert line.startswith("steerrec: error: ")
        assert not any("error" in other or "Traceback" in other for other in others)
        assert "STEERREC_DEBUG" not in line  # an error that nobody foresaw
        assert (contents(here), contents(world.folder)) == before
        return line

    return refuse


@pytest.fixture
def misuse(cli, here):
    """Run a command line that cannot be meant; what is said about it, without the box around."""

    def misuse(*arguments):
        before = contents(here)
        found = cli(*arguments)
        assert found.code == 2, found
        assert found.out == ""
        assert contents(here) == before
        return " ".join(word for word in found.err.split() if word not in ("│", "|"))

    return misuse


# --- the data


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "data.csv does not exist"),
        ("", "data.csv is empty"),
        (rows(""), "data.csv holds no interactions"),
        ("who,item_id\n1,2\n", "no user column that is recognised; its columns are who, item_id"),
        ("user_id,what\n1,2\n", "no item column that is recognised; its columns are user_id, what"),
        (rows("1,2,3\n1,3,nan\n1,4,\n"), "2 rows have no usable time in column 'timestamp'"),
        (rows("1,2,3\n,3,4\n"), "1 row has no value in the id column 'user_id'"),
        (rows("1,2,3\n1,3,4\n2,3,4\n"), "none of 2 users has 3 interactions: nothing is left"),
    ],
)
def test_data_that_cannot_be_used(refuse, here, text, complaint):
    if text is not None:
        (here / "data.csv").write_text(text)
    assert complaint in refuse("train", "data.csv", "-o", "model")


@pytest.mark.parametrize("role", ["user", "item", "time"])
def test_a_column_that_is_not_there(refuse, world, role):
    columns = {"user": "who", "item": "what", "time": "when"} | {role: "nope"}
    options = [word for name, column in columns.items() for word in (f"--{name}-col", column)]
    line = refuse("train", world.data, "-o", "model", *options)
    assert f"no {role} column 'nope'; its columns are who, what, when" in line


def test_a_core_that_leaves_nothing(refuse, world):
    line = refuse("evaluate", world.model, "--data", world.data, "--k-core", "1000")
    assert "nothing of visits.csv is left after the 1000-core filter" in line


def renamed(world, share):
    """The data of the world with so much of its rows renamed to items that nobody knows."""
    visits = pl.read_csv(world.data)
    unknown = pl.Series(np.arange(len(visits)) < share * len(visits))
    visits = visits.with_columns(what=pl.when(unknown).then(pl.lit("what?")).otherwise("what"))
    visits.write_csv("renamed.csv")
    return "renamed.csv"


def test_more_than_a_fifth_of_unknown_items(refuse, world):
    data = renamed(world, 0.25)
    for command in (
        ("evaluate", world.model),
        ("attach", world.model, "-o", "artifact"),
        ("score", world.artifact, "--model", world.model),
        ("steer", world.artifact, "--model", world.model, "-o", "recs.csv"),
    ):
        line = refuse(*command, "--data", data)
        assert "an item id that the catalogue does not know (1 ids); at most a fifth may" in line


def test_fewer_unknown_items_are_dropped_and_counted(cli, world):
    found = cli("evaluate", world.model, "--data", renamed(world, 0.1), "--json")
    assert found.json["metrics"]
    warnings = [line for line in found.err.splitlines() if "does not know (1 ids)" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("steerrec: warning: dropped: ")


def test_short_users_are_counted(cli, here, world):
    (here / "more.csv").write_text(world.data.read_text() + "a,i1,1\na,i2,2\nb,i1,1\n")
    found = cli("evaluate", world.model, "--data", "more.csv", "--k-core", "0", "--json")
    assert found.json["protocol"]["users"] == 240
    assert "steerrec: warning: 3 of 243 users have fewer than 3 interactions" in found.err


# --- the model and its layers


@pytest.mark.parametrize("command", ["evaluate", "layers", "attach"])
@pytest.mark.parametrize("model", ["nowhere", "some_data", "some_data/items.csv"])
def test_no_model(refuse, here, command, model):
    write_csv(simulate(5, 5), here / "some_data")
    options = {"layers": (), "evaluate": ("--data", "x"), "attach": ("--data", "x", "-o", "a")}
    line = refuse(command, model, *options[command])
    assert f"{model}" in line
    assert "expected a folder written by `steerrec train`" in line


def test_a_path_that_could_be_a_hub_id(refuse, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "runs/modle is no folder here, and cannot be had" in refuse("layers", "runs/modle")


def test_a_damaged_model(refuse, world):
    model = Path(shutil.copytree(world.model, "model"))
    (model / "items.parquet").write_bytes(b"PAR1")
    assert "items.parquet cannot be read" in refuse("layers", model)
    (model / "items.parquet").unlink()
    assert "model has no items.parquet" in refuse("layers", model)


def test_a_layer_that_does_not_exist(refuse, world):
    attach = ("attach", world.model, "--data", world.data, "-o", "artifact")
    line = refuse(*attach, "--layer", "final_nrom")
    assert "no module 'final_nrom' in SASRecModel; nearest: final_norm" in line


def test_a_layer_that_never_fires(cli, refuse, world):
    """And nothing of it is in the way of the right layer afterwards."""
    attach = ("attach", world.model, "--data", world.data, "-o", "artifact", "--epochs", "1")
    line = refuse(*attach, "--layer", "position_embedding")
    assert "site 'position_embedding' never fired while SASRecModel scored" in line
    assert "`steerrec layers` lists the modules that fire" in line
    assert cli(*attach, "--latents", "32", "--k", "4").code == 0


def test_a_layer_that_the_artifact_has_no_sae_for(refuse, world):
    score = ("score", world.artifact, "--model", world.model, "--data", world.data)
    line = refuse(*score, "--layer", "layers.0")
    assert "the artifact has no site 'layers.0'; it has 'final_norm' (final-norm-" in line


# --- numbers


def test_lists_longer_than_the_catalogue(refuse, world):
    given = ("--data", world.data, "-k", "81")
    complaint = "k is 81 but the catalogue has 80 items; choose k between 1 and 80"
    steer = ("steer", world.artifact, "--model", world.model)
    assert complaint in refuse("evaluate", world.model, *given)
    assert complaint in refuse(*steer, *given, "-o", "recs.csv")
    assert complaint in refuse(*steer, *given, "--sweep", "-o", "sweep")


def test_more_than_there_are_latents(refuse, world):
    attach = ("attach", world.model, "--data", world.data, "-o", "artifact")
    line = refuse(*attach, "--latents", "16", "--k", "17")
    assert "k is 17; expected between 1 and the number of latents, 16" in line
    assert "65 neurons asked for; this SAE has 64" in refuse(*world.steer, "--neurons", "65")


@pytest.mark.parametrize("alpha", ["nan", "inf"])
def test_a_strength_that_is_no_number(refuse, world, alpha):
    assert "a score is NaN" in refuse(*world.steer, "--alpha", alpha, "-o", "recs.csv")
    sweep = ("--sweep", "--alphas", f"1,{alpha}", "-o", "sweep")
    assert "a score is NaN" in refuse(*world.steer, *sweep)


def test_a_width_that_the_heads_cannot_share(refuse, world):
    line = refuse("train", world.data, "-o", "model", *TINY, "--heads", "3", "--item-col", "what")
    assert "no user column" in line
    columns = ("--user-col", "who", "--item-col", "what")
    line = refuse("train", world.data, "-o", "model", *columns, *TINY, "--heads", "3")
    assert "hidden_size 16 is not a multiple of num_attention_heads 3" in line


def test_a_loss_that_is_not_finite(refuse, here):
    write_csv(simulate(60, 30), here / "data")
    line = refuse("train", "data", "-o", "model", *TINY, "--learning-rate", "1e30")
    assert "the loss became nan in epoch 1; lower the learning rate" in line


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--alphas", "1,2"], "--alphas goes with --sweep"),
        (["--sweep", "--alphas", "1,two"], "--alphas is '1,two'; expected numbers such as 0.5,1,2"),
        (["--sweep", "--alphas", ""], "expected numbers such as 0.5,1,2"),
        (["--sweep", "--alpha", "1"], "--sweep measures its own strengths"),
        (["--sweep", "--split", "test"], "on both held-out parts"),
        (["--sweep", "--save", "mine"], "--save goes with one strength"),
        (["--splice", "delta", "--popsteer-compat"], "--popsteer-compat"),
        (["--recipe", "mine", "--neurons", "3"], "--recipe says itself which neurons to turn"),
        (["--alpha", "strong"], "Invalid value for '--alpha'"),
        (["--split", "train"], "Invalid value for '--split'"),
        (["-k", "0"], "Invalid value for '-k'"),
        (["--neurons", "0"], "Invalid value for '--neurons'"),
        (["--device", "abacus"], "'abacus' cannot be used here"),
        (["--strength", "1"], "No such option"),
    ],
)
def test_wrong_usage(misuse, world, options, complaint):
    assert complaint in misuse(*world.steer, *options)


def test_nothing_to_work_on(misuse, world):
    assert "Missing option '--data'" in misuse("evaluate", world.model)
    assert "Missing option '-o'" in misuse("train", world.data)
    assert "No such command 'fly'" in misuse("fly")


# --- the artifact


@pytest.fixture
def artifact(world):
    return Path(shutil.copytree(world.artifact, "artifact"))


def use(artifact, world, model=None):
    """The commands that read an artifact."""
    given = ("--model", model or world.model, "--data", world.data)
    return [
        ("score", artifact, *given, "--users", "64"),
        ("steer", artifact, *given, "-o", "recs.csv"),
        ("steer", artifact, *given, "--sweep", "-o", "sweep"),
    ]


def test_no_artifact(refuse, world):
    for command in use("nowhere", world):
        assert "nowhere/steerrec.json does not exist; expected an artifact" in refuse(*command)
    for command in use(world.model, world):
        assert "model is not an artifact" in refuse(*command)


def test_an_artifact_without_its_model(refuse, world):
    """What is recorded is shown, and not opened."""
    line = refuse("score", world.artifact, "--data", world.data)
    assert f"give it with --model {world.model}" in line


def test_an_sae_whose_weights_have_another_width(refuse, world, artifact):
    (config,) = artifact.glob("*/cfg.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "d_in": 16}))
    for command in use(artifact, world):
        line = refuse(*command)
        assert "sae_weights.safetensors: tensor 'W_" in line
        assert "expected float32 of shape (" in line


def test_an_sae_of_another_width_than_its_site(refuse, world, artifact):
    (config,) = artifact.glob("*/cfg.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "d_in": 16}))
    file = config.with_name("sae_weights.safetensors")
    weights = load_file(file)
    half = {"W_enc": weights["W_enc"][:16], "W_dec": weights["W_dec"][:, :16]}
    half = {name: tensor.contiguous() for name, tensor in half.items()}
    save_file({**weights, **half, "b_dec": weights["b_dec"][:16].clone()}, file)
    for command in use(artifact, world):
        assert "width 16" in (line := refuse(*command)) or "the SAE reads 16" in line
        assert "32" in line


def test_an_sae_with_values_that_are_not_finite(refuse, world, artifact):
    (file,) = artifact.glob("*/sae_weights.safetensors")
    weights = load_file(file)
    save_file({**weights, "b_enc": torch.full_like(weights["b_enc"], torch.nan)}, file)
    for command in use(artifact, world):
        assert "tensor 'b_enc' has values that are not finite" in refuse(*command)


def test_an_artifact_of_another_model(cli, refuse, world, artifact):
    columns = ("--user-col", "who", "--item-col", "what", "--time-col", "when", "--k-core", "3")
    train = ("train", world.data, "-o", "other", *columns, "--epochs", "1", "--seed", "1")
    assert cli(*train, "--hidden-size", "32", "--layers", "1", "--max-length", "20").code == 0
    for command in use(artifact, world, model="other"):
        line = refuse(*command)
        assert "the artifact was made for a SASRecModel" in line
        assert "other weights; use the model that it was made for" in line


def test_an_artifact_without_a_table(refuse, world, artifact):
    (table,) = artifact.glob("*/attribution/popularity.safetensors")
    table.unlink()
    steer = ("steer", artifact, "--model", world.model, "--data", world.data)
    complaint = "no attribution table for contrast 'popularity' (there: none yet)"
    assert complaint in refuse(*steer)
    assert "make it with `steerrec score`" in refuse(*steer)


def test_a_contrast_that_does_not_exist(refuse, world):
    score = ("score", world.artifact, "--model", world.model, "--data", world.data)
    complaint = "'price' in contrast 'price' is no group of items; expected popularity, COLUMN="
    assert complaint in refuse(*score, "--contrast", "price")
    complaint = "no attribution table for contrast 'price' (there: popularity)"
    assert complaint in refuse(*world.steer, "--contrast", "price")


def test_a_recipe_that_does_not_exist(refuse, world):
    line = refuse(*world.steer, "--recipe", "mine")
    assert "'mine'" in line


def test_a_recipe_whose_name_cannot_be_a_file(refuse, world, artifact):
    steer = ("steer", artifact, "--model", world.model, "--data", world.data)
    assert "'../mine' cannot be a file name" in refuse(*steer, "--save", "../mine")


# --- the output


def test_output_that_is_there_already(refuse, here, world):
    shutil.copytree(world.model, here / "model")
    (here / "recs.csv").write_text("precious")
    (here / "sweep").mkdir()
    (here / "sweep" / "sweep.json").write_text("precious")
    given = ("--data", world.data)
    for command in (
        ("train", world.data, "-o", "model"),
        ("attach", world.model, *given, "-o", "model"),
        (*world.steer, "-o", "recs.csv"),
        (*world.steer, "--sweep"),
        (*world.steer, "--sweep", "-o", "sweep"),
    ):
        line = refuse(*command)
        assert "exists; choose another name, or replace it with --force" in line


def test_force_replaces_only_what_steerrec_wrote(refuse, here, world):
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter1.tex").write_text("precious")
    (here / "recs.csv").mkdir()
    given = ("--data", world.data, "--force")
    for command in (
        ("train", world.data, "-o", "thesis", "--force"),
        ("train", world.data, "-o", world.artifact, "--force"),
        ("attach", world.model, *given, "-o", world.model),
        ("attach", world.model, *given, "-o", "thesis"),
        ("attach", world.model, *given, "-o", "."),
        (*world.steer, "--force", "-o", "recs.csv"),
    ):
        assert "--force does not replace it; choose another name" in refuse(*command)


@pytest.mark.parametrize("name", ["recs.xlsx", "recs", "recs.csv.gz"])
def test_an_output_of_no_known_format(refuse, world, name):
    assert "expected .parquet, .csv, .tsv" in refuse(*world.steer, "-o", name)


def test_a_sweep_writes_into_a_folder(refuse, here, world):
    (here / "file").write_text("precious")
    for output in ("file", "recs.csv"):
        line = refuse(*world.steer, "--sweep", "-o", output)
        assert f"{output} is no folder; --sweep writes sweep.json and sweep.png into one" in line


def test_a_place_where_nothing_can_be_written(refuse, here, world):
    (here / "file").write_text("precious")
    assert "cannot write file/recs.csv: " in refuse(*world.steer, "-o", "file/recs.csv")


@contextmanager
def disk_of(size):
    """No file can grow beyond `size` bytes: writes fail in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(folder):
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_a_disk_that_fills_while_a_shard_is_written(cli, here, world):
    """Nothing that a later command takes for whole; with space again the command goes through."""
    attach = ("attach", world.model, "--data", world.data, "-o", "artifact")
    attach = (*attach, "--latents", "32", "--k", "4", "--epochs", "1", "--batch-size", "256")
    with disk_of(20_000):
        found = cli(*attach)
    assert (found.code, found.out) == (1, "")
    (line,) = found.err.splitlines()
    assert line.startswith("steerrec: error: cannot write ")
    assert "train-00000.safetensors: " in line
    assert "free space or choose another place and run again" in line
    assert files(here) == {"settings.json"}
    assert cli(*attach).code == 0
    assert not (here / "artifact.partial").exists()


def test_a_disk_that_fills_while_a_model_is_saved(cli, here):
    write_csv(simulate(60, 30), here / "data")
    before = contents(here)
    with disk_of(20_000):
        found = cli("train", "data", "-o", "model", *TINY)
    assert (found.code, found.out) == (1, "")
    assert "cannot write " in found.err.splitlines()[-1]
    assert files(here) == files(here / "data")
    assert not (here / "model").exists()
    assert (
        contents(here / "data").items()
        <= {name.removeprefix("data/"): content for name, content in before.items()}.items()
    )


@pytest.mark.parametrize("name", ["recs.parquet", "recs.csv"])
def test_a_disk_that_fills_while_recommendations_are_written(refuse, world, name):
    with disk_of(2_000):
        assert f"cannot write {name}: " in refuse(*world.steer, "-o", name)


def test_a_disk_that_fills_while_a_table_or_a_plot_is_written(refuse, here, world, artifact):
    score = ("score", artifact, "--model", world.model, "--data", world.data)
    with disk_of(1_000):
        assert "popularity.safetensors: " in refuse(*score, "--users", "64")
    (here / "sweep").mkdir()
    with disk_of(20_000):
        assert "cannot write sweep/sweep.png: " in refuse(*world.steer, "--sweep", "--alphas", "1")


# --- the process


def test_exit_status_and_streams_of_a_process(here):
    """As a script sees them."""
    run = subprocess.run(
        [sys.executable, "-m", "steerrec.cli", "train", "nowhere.csv", "-o", "model"],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("steerrec: error: nowhere.csv does not exist; expected an ")
    assert run.stderr.count("\n") == 1
    assert contents(here) == {}


def test_a_traceback_only_if_asked_for(cli, monkeypatch):
    monkeypatch.setenv("STEERREC_DEBUG", "1")
    found = cli("train", "nowhere.csv", "-o", "model")
    assert found.code == 1
    assert "Traceback" in found.err
    assert "DataError: nowhere.csv does not exist" in found.err
