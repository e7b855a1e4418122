"""Every command from an interactions file to steered recommendations, as a user types it."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch

import steerrec
from steerrec.data import build_histories, read_interactions, simulate, write_csv

METRICS = {
    *("ndcg@10", "hr@10", "ltc@10", "gini@10", "coverage@10", "arp@10", "tail_share@10"),
    *("ndcg_head@10", "ndcg_mid@10", "ndcg_tail@10"),
}
EXPOSURE = {"ltc@10", "gini@10", "coverage@10", "arp@10", "tail_share@10"}
PROTOCOL = {"split": "test", "mask_seen": False, "k": 10, "users": 240, "items": 80}


def tables(folder):
    """Name and content of every attribution table of an artifact."""
    return {file.name: file.read_bytes() for file in folder.glob("*/attribution/*.safetensors")}


@pytest.fixture
def recommender(world):
    return steerrec.load_recommender(world.model)


@pytest.fixture
def histories(world, recommender):
    columns = {"user_col": "who", "item_col": "what", "time_col": "when"}
    interactions = read_interactions(world.data, **columns, k_core=3)
    return build_histories(interactions, recommender.catalogue)


# --- train, evaluate


def test_train_reports_test_metrics_with_and_without_the_mask(world):
    document = world.trained.json
    assert document["model"] == str(world.model)
    unmasked, masked = document["training"]["test"]
    assert unmasked["protocol"] == PROTOCOL
    assert masked["protocol"] == {**PROTOCOL, "mask_seen": True, "unreachable": 12 / 240}
    for found in (unmasked, masked):
        assert set(found["metrics"]) >= METRICS
    assert unmasked["metrics"]["ndcg@10"] > 0.08  # lists at random: .057


def test_train_writes_a_whole_model_and_nothing_else(world):
    names = {"config.json", "model.safetensors", "items.parquet", "steerrec.json"}
    assert {file.name for file in world.model.iterdir()} == names
    there = {path.name for path in world.folder.iterdir()}
    assert there == {"visits.csv", "items.csv", "model", "artifact"}
    record = json.loads((world.model / "steerrec.json").read_text())
    assert record == {key: world.trained.json[key] for key in ("data", "training")}


def test_model_and_artifact_record_how_the_data_was_read(world):
    read = {"user_col": "who", "item_col": "what", "time_col": "when", "k_core": 3, "dedup": False}
    for folder in (world.model, world.artifact):
        record = json.loads((folder / "steerrec.json").read_text())
        assert record["data"] == {"format": "csv", **read}


@pytest.mark.parametrize("mask_seen", [False, True])
def test_evaluate_reads_the_data_as_train_did_and_finds_the_same(cli, world, mask_seen):
    options = ["--mask-seen"] if mask_seen else []
    found = cli("evaluate", world.model, "--data", world.data, "--json", *options)
    assert found.err == ""
    assert found.json == {
        "model": str(world.model),
        **world.trained.json["training"]["test"][mask_seen],
    }


def test_evaluate_on_validation_with_another_k(cli, world):
    options = ("--split", "valid", "-k", "5", "--json")
    found = cli("evaluate", world.model, "--data", world.data, *options).json
    assert found["protocol"] == {**PROTOCOL, "split": "valid", "k": 5}
    assert all(name.endswith("@5") for name in found["metrics"])


def test_evaluate_prints_its_protocol_and_every_metric(cli, world):
    found = cli("evaluate", world.model, "--data", world.data, "--mask-seen")
    assert found.code == 0
    protocol = "test split, seen items masked, k = 10, 240 users, 80 items"
    assert found.out.startswith(f"{protocol}, 5.0% of targets unreachable\n")
    assert all(f" {metric} " in found.out for metric in METRICS)


def test_options_go_before_what_is_recorded(cli, world):
    """Without the 3-core there are users too short and items that the model does not know."""
    found = cli("evaluate", world.model, "--data", world.data, "--k-core", "0", "--json")
    assert found.json["protocol"] == PROTOCOL
    unknown, short = found.err.splitlines()
    assert unknown.startswith("steerrec: warning: dropped: 2 of ")
    assert unknown.endswith("interactions have an item id that the catalogue does not know (2 ids)")
    assert short.startswith("steerrec: warning: 1 of 241 users have fewer than 3 interactions")


def test_data_with_other_columns_than_recorded_is_recognised_with_a_warning(cli, world, tmp_path):
    rows = pl.read_csv(world.data)
    rows.rename({"who": "user", "what": "item", "when": "time"}).write_csv(tmp_path / "usual.csv")
    found = cli("evaluate", world.model, "--data", tmp_path / "usual.csv", "--json")
    assert found.json["metrics"] == world.trained.json["training"]["test"][0]["metrics"]
    (warning,) = found.err.splitlines()
    assert "read as user 'user', item 'item', time 'time'" in warning


def test_sequences_stay_sequences_and_a_table_is_still_a_table(cli, tmp_path):
    """Two items a line look like pairs; the format that a model was trained on says otherwise."""
    three = simulate(60, 20, seed=2, min_length=3, max_length=5)
    items = pl.DataFrame({"user": three.user, "item": three.item})
    lines = items.group_by("user", maintain_order=True).agg("item")["item"]
    sequences = tmp_path / "sequences.txt"
    sequences.write_text("".join(" ".join(map(str, line)) + "\n" for line in lines))
    size = ("--hidden-size", "16", "--layers", "1", "--max-length", "10", "--epochs", "1")
    model = tmp_path / "model"
    assert cli("train", sequences, "-o", model, *size, "--format", "sequences").code == 0

    evaluate = ("evaluate", model, "--json", "--data")
    assert cli(*evaluate, sequences).json["protocol"]["users"] == 60
    twos = tmp_path / "twos.txt"
    twos.write_text("".join(f"{line[0]} {line[1]}\n" for line in lines))
    assert "none of 60 users has 3 interactions" in cli(*evaluate, twos).err
    table = items.with_columns(time=np.arange(len(items)))
    table.write_csv(tmp_path / "table.csv")
    found = cli(*evaluate, tmp_path / "table.csv")
    assert found.json["protocol"]["users"] == 60
    assert "read as user 'user', item 'item', time 'time'" in found.err


# --- layers


def test_layers_marks_the_recommended_site_and_what_never_fires(cli, world):
    found = cli("layers", world.model, "--json").json
    assert found["recommended"]["path"] == "final_norm"
    firings = {layer["path"]: layer["firings"] for layer in found["layers"]}
    assert firings["final_norm"] == firings["layers.0"] == 1
    assert firings["position_embedding"] == 0
    lines = cli("layers", world.model).out.splitlines()
    assert [line.split()[:3] for line in lines if "*" in line][-1] == ["final_norm", "*", "1"]


# --- attach, score


def test_attach_reports_the_reconstruction_and_what_it_costs(world):
    found = world.attached.json
    assert found["artifact"] == str(world.artifact)
    assert found["site"]["path"] == "final_norm"
    assert 0 < found["reconstruction"]["fvu"] < 0.6
    assert 0 < found["reconstruction"]["l0"] <= 8
    assert 0 <= found["reconstruction"]["dead_share"] <= 1
    assert list(found["downstream"]) == ["valid", "test"]
    for which, cost in found["downstream"].items():
        base, through = cost["base"], cost["reconstruction"]
        assert base["protocol"] == through["protocol"] == {**PROTOCOL, "split": which}
        assert cost["ndcg_kept"] == through["metrics"]["ndcg@10"] / base["metrics"]["ndcg@10"]


def test_the_artifact_opens_with_its_model(world, recommender):
    here = steerrec.load_artifact(world.artifact, rec=recommender).at()
    assert (here.sae.d_in, here.sae.d_sae, here.sae.k) == (32, 64, 8)
    assert list(here.tables) == ["popularity"]


def test_score_names_the_strongest_neurons(world, recommender):
    found = world.scored.json
    table = steerrec.load_artifact(world.artifact).at().table("popularity")
    assert found["contrast"] == table.contrast
    assert found["by"] == table.ranking == "grad_attribution"
    assert [row["neuron"] for row in found["top"]] == table.strongest(10).tolist()
    first = found["top"][0]["neuron"]
    assert abs(found["top"][0]["grad_attribution"]) == table["grad_attribution"].abs().max()
    assert found["top"][0]["cohens_d"] == table["cohens_d"][first]
    head, _, tail = recommender.catalogue.groups.sizes
    groups = [found["contrast"][group] for group in ("group_a", "group_b")]
    assert groups == [{"label": "popular", "items": head}, {"label": "unpopular", "items": tail}]


def test_one_seed_gives_one_table(cli, world, tmp_path):
    found = {}
    for name, seed in (("again", 0), ("other", 1)):
        copy = shutil.copytree(world.artifact, tmp_path / name)
        options = ("--model", world.model, "--data", world.data, "--users", "512", "--seed", seed)
        result = cli("score", copy, *options)
        assert result.code == 0
        assert "strongest of 64 neurons by grad_attribution, 512 synthetic users a " in result.out
        found[name] = tables(copy)
    assert found["again"] == tables(world.artifact)
    assert found["other"] != tables(world.artifact)


def test_score_adds_the_columns_that_are_asked_for(cli, world, tmp_path):
    copy = shutil.copytree(world.artifact, tmp_path / "copy")
    score = ("score", copy, "--model", world.model, "--data", world.data, "--users", "64")

    def columns(*options):
        assert cli(*score, *options).code == 0
        return set(steerrec.load_artifact(copy).at().table("popularity").columns)

    plain = columns("--columns", "none")
    assert "auroc" in plain
    assert "logit_attribution" not in plain
    assert columns("--columns", "logit_attribution") == plain | {"logit_attribution"}
    every = columns("--causal", "5", "-k", "3")
    assert every >= {"grad_attribution", "direct_effect", "cohens_d_users", "causal_gini"}
    table = steerrec.load_artifact(copy).at().table("popularity")
    assert table["causal_measured"].sum() == 5
    assert table.provenance["lists"] == {"k": 3, "mask_seen": False}
    found = cli(*score, "--by", "cohens_d", "--top", "2", "--json").json
    ranked = steerrec.load_artifact(copy).at().table("popularity").strongest(2, by="cohens_d")
    assert [row["neuron"] for row in found["top"]] == ranked.tolist()


def test_the_attribution_study(cli, world, tmp_path):
    copy, folder = shutil.copytree(world.artifact, tmp_path / "copy"), tmp_path / "study"
    score = ("score", copy, "--model", world.model, "--data", world.data, "--users", "256")
    shown = cli(*score, "--study", folder)
    assert shown.code == 0
    assert "rank correlation with causal_effect over" in shown.out
    assert shown.err == f"{folder}/study.json and {folder}/study.png written\n"
    found = json.loads((folder / "study.json").read_text())
    best = found["rows"][0]
    assert best["correlation"] > 0.5  # some column predicts what switching off does
    again = cli(*score, "--study", folder)
    assert again.code == 1
    assert "study.json exists" in again.err
    told = cli(*score, "--study", folder, "--force", "--json").json
    assert told["study"] == found


def test_wrong_options_of_score(cli, world, tmp_path):
    copy = shutil.copytree(world.artifact, tmp_path / "copy")
    before = tables(copy)
    score = ("score", copy, "--model", world.model, "--data", world.data, "--users", "64")
    for options, code, message in (
        (("--causal", "many"), 2, "expected a number of neurons, or all"),
        (("--columns", "taste"), 1, "no column 'taste' can be added; there are cohens_d_users"),
        (("--by", "taste"), 1, "will have no column 'taste'; it will have auroc"),
        (("-k", "9999"), 1, "choose k between 1 and 80"),
    ):
        result = cli(*score, *options)
        assert "synthetic users" not in result.err  # before anything is scored
        assert result.code == code
        assert message in " ".join(result.err.replace("│", " ").split())
        assert tables(copy) == before


def test_an_sae_inside_the_model_is_scored_and_steers(cli, world, tmp_path):
    """Anywhere but at the scored vector the model itself has to run with the SAE attached."""
    artifact = tmp_path / "artifact"
    given = ("--model", world.model, "--data", world.data)
    size = ("--latents", "64", "--k", "8", "--batch-size", "256", "--epochs", "2")
    attach = ("attach", world.model, "--data", world.data, "-o", artifact)
    attached = cli(*attach, "--layer", "layers.0.attention", *size, "--json").json
    assert attached["site"]["path"] == "layers.0.attention"
    assert cli("score", artifact, *given, "--users", "128").code == 0
    steer = ("steer", artifact, *given, "--alpha", "2", "--split", "test", "--json")
    steered = cli(*steer, "--layer", "layers.0.attention").json
    assert steered["unsteered"] == world.trained.json["training"]["test"][0]
    assert steered["steered"]["metrics"] != steered["unsteered"]["metrics"]
    sweep = ("--sweep", "--alphas", "2", "-o", tmp_path / "sweep", "--json")
    swept = cli("steer", artifact, *given, *sweep).json
    assert [point["test"] for point in swept["points"]] == [
        steered["unsteered"],
        steered["steered"],
    ]


# --- steer


def test_recommendations_carry_the_ids_and_titles_of_the_data(cli, world, histories, tmp_path):
    """Whole histories by default, into a folder that is not there yet; in every format alike."""
    frames = {}
    for suffix, read in (("parquet", pl.read_parquet), ("csv", pl.read_csv)):
        file = tmp_path / "not" / "yet" / f"recs.{suffix}"
        found = cli(*world.steer, "-k", "5", "-o", file, "--json")
        assert found.json["recommendations"] == str(file)
        assert found.err == f"{file} written\n"
        frames[suffix] = read(file)
        assert [path.name for path in file.parent.glob(".*")] == []
    cli(*world.steer, "-k", "5", "-o", tmp_path / "recs.tsv")
    frames["tsv"] = pl.read_csv(tmp_path / "recs.tsv", separator="\t")
    frame = frames["parquet"]
    assert frame.columns == ["user_id", "rank", "item_id", "title", "score"]
    assert frame["user_id"].unique(maintain_order=True).equals(histories.user_ids, null_equal=True)
    assert frame["rank"].to_list() == [1, 2, 3, 4, 5] * 240
    items = pl.read_csv(world.folder / "items.csv")
    titles = dict(zip(items["item_id"], items["title"], strict=True))
    assert frame["title"].to_list() == [titles[item] for item in frame["item_id"]]
    assert not frame.select("user_id", "item_id").is_duplicated().any()
    for name in ("csv", "tsv"):
        assert frames[name].drop("score").equals(frame.drop("score"))
        assert frames[name]["score"].to_numpy() == pytest.approx(frame["score"].to_numpy())


def test_integer_ids_stay_integers(cli, tmp_path):
    """And an output name without a folder goes where one is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        write_csv(simulate(60, 30, seed=1), "data")
        size = ("--hidden-size", "16", "--layers", "1", "--max-length", "10", "--epochs", "1")
        assert cli("train", "data", "-o", "model", *size).code == 0
        small = ("--latents", "32", "--k", "4", "--batch-size", "64", "--epochs", "1")
        given = ("--data", "data")
        assert cli("attach", "model", *given, "-o", "artifact", *small).code == 0
        assert cli("score", "artifact", "--model", "model", *given, "--users", "64").code == 0
        steer = ("steer", "artifact", "--model", "model", *given)
        assert cli(*steer, "-o", "recs.parquet").code == 0
    frame = pl.read_parquet(tmp_path / "recs.parquet")
    assert frame.schema["user_id"] == frame.schema["item_id"] == pl.Int64
    rows = pl.read_csv(tmp_path / "data" / "interactions.csv")
    for column in ("user_id", "item_id"):
        assert set(frame[column]) <= set(rows[column])
    assert set(frame["user_id"]) == set(rows["user_id"])


def test_strength_zero_changes_nothing(cli, world, recommender, histories, tmp_path):
    found = cli(*world.steer, "--alpha", "0", "-o", tmp_path / "zero.parquet", "--json").json
    assert found["steered"] == found["unsteered"]
    assert found["unsteered"]["protocol"] == {**PROTOCOL, "split": "none"}
    assert set(found["unsteered"]["metrics"]) == EXPOSURE
    lists = steerrec.recommend(recommender, histories)
    item_ids = recommender.catalogue.item_ids
    frame = pl.read_parquet(tmp_path / "zero.parquet")
    assert frame["item_id"].to_list() == item_ids.gather(lists.ids.flatten().numpy()).to_list()
    assert torch.equal(frame["score"].to_torch(), lists.scores.flatten())


def test_steering_moves_exposure_to_the_tail(cli, world):
    found = cli(*world.steer, "--alpha", "2", "--json").json
    before, after = found["unsteered"]["metrics"], found["steered"]["metrics"]
    assert after["gini@10"] < before["gini@10"]
    assert after["arp@10"] < before["arp@10"]
    assert after["tail_share@10"] > before["tail_share@10"]


def test_mask_seen_recommends_nothing_seen(cli, world, tmp_path):
    seen = pl.read_csv(world.data).select(user_id="who", item_id="what")
    for options, expected in ((["--mask-seen"], False), ([], True)):
        file = tmp_path / f"recs{len(options)}.parquet"
        assert cli(*world.steer, "--alpha", "1", *options, "-o", file).code == 0
        frame = pl.read_parquet(file)
        repeats = frame.join(seen, on=["user_id", "item_id"], how="semi")
        assert bool(len(repeats)) == expected


def test_a_held_out_part_has_metrics_before_and_after(cli, world, tmp_path):
    options = ("--split", "test", "--mask-seen", "-o", tmp_path / "recs.csv", "--json")
    found = cli(*world.steer, "--alpha", "0.5", *options).json
    assert found["unsteered"] == world.trained.json["training"]["test"][1]
    assert found["steered"]["protocol"] == found["unsteered"]["protocol"]
    assert set(found["steered"]["metrics"]) == set(found["unsteered"]["metrics"])
    assert found["steered"]["metrics"] != found["unsteered"]["metrics"]
    table = cli(*world.steer, "--alpha", "0.5", "--split", "test", "--mask-seen").out
    ndcg = next(line for line in table.splitlines() if "ndcg@10" in line).split()
    assert ndcg[1:] == [
        f"{found[name]['metrics']['ndcg@10']:.4f}" for name in ("unsteered", "steered")
    ]


def test_a_sweep_is_drawn_and_agrees_with_the_other_commands(cli, world, tmp_path):
    folder = tmp_path / "new" / "sweep"
    found = cli(*world.steer, "--sweep", "--alphas", "0.5,2", "-o", folder, "--json")
    swept = found.json
    (kept,) = world.artifact.glob("*/results/sweep.json")
    assert found.err == f"{kept} written\n"
    assert json.loads(kept.read_text()) == swept
    assert "### Before and after" in (world.artifact / "README.md").read_text()
    assert json.loads((folder / "sweep.json").read_text()) == swept
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in folder.iterdir()) == ["sweep.json", "sweep.png"]
    assert [point["alpha"] for point in swept["points"]] == [0.0, 0.5, 2.0]
    assert list(swept["chosen_on_validation"]) == ["1%", "5%", "10%"]
    assert swept["points"][0]["test"] == world.trained.json["training"]["test"][0]
    one = cli(*world.steer, "--alpha", "2", "--split", "valid", "--json").json
    assert swept["points"][2]["valid"] == one["steered"]


def test_a_sweep_prints_a_row_for_each_strength(cli, world, tmp_path):
    found = cli(*world.steer, "--sweep", "--alphas", "0.5,2", "-o", tmp_path / "sweep")
    rows = [line.split() for line in found.out.splitlines()]
    assert [row[0] for row in rows if row and row[0] in ("0", "0.5", "2")] == ["0", "0.5", "2"]
    assert "sweep.png written" in found.err


@pytest.mark.parametrize(
    "options", [["--neurons", "3"], ["--splice", "reconstruct"], ["--popsteer-compat"]]
)
def test_other_recipes_give_other_lists(cli, world, options):
    usual = cli(*world.steer, "--json").json
    other = cli(*world.steer, *options, "--json").json
    assert other["unsteered"] == usual["unsteered"]
    assert other["steered"] != usual["steered"]


def test_a_recipe_is_saved_and_steers_again(cli, world, tmp_path):
    artifact = shutil.copytree(world.artifact, tmp_path / "artifact")
    steer = ("steer", artifact, "--model", world.model, "--data", world.data, "--json")
    saved = cli(*steer, "--alpha", "0.5", "--neurons", "9", "--save", "gentle").json
    assert list(steerrec.load_artifact(artifact).at().steerings) == ["gentle"]
    again = cli(*steer, "--recipe", "gentle").json
    assert again == saved
    assert again["alpha"] == 0.5
    stronger = cli(*steer, "--recipe", "gentle", "--alpha", "2").json
    assert stronger == cli(*steer, "--alpha", "2", "--neurons", "9").json


def test_all_neurons_are_the_default(cli, world):
    assert cli(*world.steer, "--neurons", "64", "--json").out == cli(*world.steer, "--json").out


# --- from anywhere, and around what is there


def test_paths_may_be_relative_to_another_folder(cli, world, tmp_path):
    (tmp_path / "here").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "here")
        relative = os.path.relpath(world.folder)
        steer = ("steer", f"{relative}/artifact", "--model", f"{relative}/model/")
        found = cli(*steer, "--data", f"{relative}/visits.csv", "-o", "../recs.csv")
    assert found.code == 0
    assert (tmp_path / "recs.csv").is_file()


def test_force_replaces_a_file_a_model_and_an_artifact(cli, world, tmp_path):
    file = tmp_path / "recs.csv"
    file.write_text("old")
    assert cli(*world.steer, "-o", file, "--force").code == 0
    assert file.read_text().startswith("user_id,rank,")
    artifact = shutil.copytree(world.artifact, tmp_path / "artifact")
    (artifact / "old.txt").write_text("old")
    attach = ("attach", world.model, "--data", world.data, "-o", artifact, "--force")
    assert (
        cli(*attach, "--latents", "16", "--k", "4", "--epochs", "1", "--keep-activations").code == 0
    )
    assert not (artifact / "old.txt").exists()
    assert steerrec.load_artifact(artifact).at().sae.d_sae == 16
    assert (tmp_path / "artifact.partial" / "activations" / "activations.json").is_file()


# --- the command line itself


def test_help_names_every_command_and_every_command_has_help(cli):
    commands = ("demo", "train", "evaluate", "layers", "attach", "score", "steer")
    overview = cli("-h")
    for command in commands:
        found = cli(command, "--help")
        assert (found.code, found.err) == (0, "")
        assert f" {command} " in overview.out
        assert f"steerrec {command} [OPTIONS]" in found.out


def test_version(cli):
    assert cli("--version").out == f"{steerrec.__version__}\n"


def test_in_a_pipe_stdout_is_the_document_and_stderr_is_empty(world, tmp_path):
    """A process of its own: the one that a script would start, from another folder."""
    command = ["evaluate", world.model, "--data", world.data, "--json"]
    run = subprocess.run(
        [sys.executable, "-m", "steerrec.cli", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0
    assert run.stderr == ""
    found = json.loads(run.stdout)
    assert found["metrics"] == world.trained.json["training"]["test"][0]["metrics"]
    assert list(tmp_path.iterdir()) == []


def test_no_progress_bar_where_stderr_is_no_terminal(world):
    assert world.trained.err.startswith("240 users, 80 items, ")
    assert world.trained.err.endswith(" interactions\n")
    assert world.trained.err.count("\n") == 1
    assert world.attached.err == world.scored.err == ""


def test_compare_writes_table_json_and_plot(cli, world, tmp_path):
    folder = tmp_path / "comparison"
    command = ("compare", world.artifact, "--model", world.model, "--data", world.data)
    options = ("-o", folder, "--bootstrap", 20, "--pool", 40)
    methods = ("--methods", "popsteer,popsteer-compat,logit-adjustment,raw-popsteer,random")
    found = cli(*command, *options, *methods, "--json").json
    names = [method["name"] for method in found["methods"]]
    assert names == ["popsteer", "popsteer-compat", "logit-adjustment", "raw-popsteer", "random"]
    assert json.loads((folder / "compare.json").read_text()) == found
    table = pl.read_csv(folder / "compare.csv")
    assert len(table) == 5 * 3 * 2
    for picture in ("compare.png", "compare-users.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    row = next(r for r in found["methods"][2]["rows"] if (r["budget"], r["by"]) == (0.05, "gini"))
    line = table.row(
        by_predicate=(pl.col("method") == "logit-adjustment")
        & (pl.col("budget") == 0.05)
        & (pl.col("chosen_by") == "gini"),
        named=True,
    )
    tastes = ("rare", "mixed", "popular")
    assert [line[f"worse_{taste}_taste"] for taste in tastes] == row["by_taste"]["worse"]

    swept = cli("evaluate", world.model, "--data", world.data, "--json").json
    assert found["base"]["test"] == pytest.approx(swept["metrics"], nan_ok=True)

    refused = cli(*command, *options, *methods)
    assert refused.code == 1
    assert "--force" in refused.err
    printed = cli(*command, *options, *methods, "--force")
    assert printed.code == 0
    assert "logit-adjustment" in printed.out
    assert "within 10% of nDCG" in printed.out
    assert "at 5%: change of nDCG by the group of the item" in printed.out
    assert "rare taste" in printed.out


def test_compare_learns_steering_first(cli, world, tmp_path):
    command = ("compare", world.artifact, "--model", world.model, "--data", world.data)
    options = ("-o", tmp_path / "c", "--bootstrap", 10, "--pool", 40, "--json")
    found = cli(*command, *options, "--methods", "popsteer,learned").json
    learned = found["methods"][1]
    assert learned["fit_seconds"] > found["methods"][0]["fit_seconds"]
    assert [round(19 * setting["value"]) for setting in learned["settings"]] == list(range(20))
    assert learned["settings"][0]["test"] == found["base"]["test"]
    assert learned["description"]["learning"]["objective"] == "even"
    assert learned["description"]["learning"]["training"]["seed"] == 0
    base = found["base"]["valid"]
    for setting in (s for s in learned["settings"] if s["value"] in (0.0, 1.0)):  # the guard
        assert setting["valid"]["ndcg@10"] >= 0.9 * base["ndcg@10"]
    assert learned["rows"][-1]["metrics"]["gini@10"] <= found["base"]["test"]["gini@10"]


def test_compare_learns_for_the_users_of_the_comparison(cli, world, tmp_path):
    command = ("compare", world.artifact, "--model", world.model, "--data", world.data)
    options = ("-o", tmp_path / "c", "--bootstrap", 10, "--pool", 40, "--json")
    found = cli(*command, *options, "--methods", "popsteer,learned-served").json
    learned = found["methods"][1]
    assert learned["fit_seconds"] > 0.1
    assert learned["settings"][0]["test"] == found["base"]["test"]
    assert learned["description"]["learning"]["objective"] == "broad"
    assert learned["description"]["learning"]["training"]["seed"] == 0
    ginis = [setting["test"]["gini@10"] for setting in learned["settings"]]
    assert ginis[6] < ginis[0]


def test_compare_refuses_what_it_does_not_know(cli, world, tmp_path):
    command = ("compare", world.artifact, "--model", world.model, "--data", world.data)
    unknown = cli(*command, "-o", tmp_path / "c", "--methods", "popster")
    assert unknown.code == 1
    assert "no method 'popster'; did you mean popsteer? there are popsteer," in unknown.err
    assert not (tmp_path / "c").exists()


def test_ablate_writes_table_json_and_plot(cli, world, tmp_path):
    folder = tmp_path / "parts"
    command = ("ablate", world.artifact, "--model", world.model, "--data", world.data)
    options = ("--only", "splice,controls", "--users", "64", "-o", folder)
    found = cli(*command, *options)
    assert found.code == 0, found.err
    assert "neurons shuffled, seed 0" in found.out
    document = json.loads((folder / "ablate.json").read_text())
    studies = ["as it is", *["splice"] * 3, *["controls"] * 7]
    assert [row["study"] for row in document["rows"]] == studies
    assert (folder / "ablate.png").read_bytes().startswith(b"\x89PNG")
    assert cli(*command, *options).code == 1  # there already
    again = cli(*command, *options, "--force", "--json")
    assert again.json == document


def test_ablate_refuses_what_it_does_not_know(cli, world, tmp_path):
    command = ("ablate", world.artifact, "--model", world.model, "--data", world.data)
    found = cli(*command, "--only", "neuron", "-o", tmp_path / "parts")
    assert (found.code, found.out) == (1, "")
    assert "no study 'neuron'" in found.err
